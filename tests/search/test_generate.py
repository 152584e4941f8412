"""Steps from a model: where they end, what they hold, and that they depend on nothing but their state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from tiny_policy import tiny_policy

from stepkd.data.completion import Completion
from stepkd.data.templates import get_template
from stepkd.errors import ConfigError, DataError
from stepkd.models.policy import Policy
from stepkd.sampling.engine import SamplingConfig
from stepkd.sampling.transformers_engine import TransformersEngine
from stepkd.search.generate import SampledSteps
from stepkd.search.state import Problem, State
from stepkd.steps.segment import get_segmenter, segment
from stepkd.steps.text import text_from_ids


@pytest.fixture(scope="module")
def policy() -> Policy:
    """Untrained, with a peaked distribution."""
    return tiny_policy()


def ids_of(policy: Policy, text: str) -> tuple[int, ...]:
    return tuple(policy.tokenizer(text, add_special_tokens=False)["input_ids"])


class Typist:
    """An engine that types the given text behind whatever it is given, then the end token; stops as engines do."""

    def __init__(self, policy: Policy, text: str, start: str) -> None:
        self.policy, self.max_length = policy, policy.max_length
        self.whole = (*ids_of(policy, start + text), policy.tokenizer.eos_token_id)
        self.calls: list[list[str]] = []

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        spec: SamplingConfig,
        *,
        purpose: str,
        limits: Sequence[int],
        **_: Any,
    ) -> list[list[Completion]]:
        decode = self.policy.tokenizer.decode
        self.calls.append([decode(prompt) for prompt in prompts])
        results = []
        for prompt, limit in zip(prompts, limits, strict=True):
            ids: list[int] = []
            finish = "length"
            while len(ids) < limit:
                ids.append(self.whole[len(prompt) + len(ids)])
                if ids[-1] in self.policy.eos_ids or any(stop in decode(ids) for stop in spec.stop):
                    finish = "stop"
                    break
            logprobs = tuple(-1.0 for _ in ids)
            known = {"raw_logprobs": logprobs, "finish": finish}
            results.append([Completion(prompt, ids, **known, sample=j) for j in range(spec.n)])
        return results


def typed(
    policy: Policy, text: str, *, steps: int = 9, segmenter: str = "newline", stop: tuple[str, ...] = (), **options: Any
) -> list[tuple[str, str]]:
    """Text and end of one step after another."""
    prompt = "Q: 1+1\n"
    engine = Typist(policy, text, prompt)
    generator = SampledSteps(engine, policy, SamplingConfig(stop=stop), segmenter=segmenter, **options)
    state, found = State(Problem(0, {"id": "p"}, ids_of(policy, prompt))), []
    for _ in range(steps):
        ((step, twin),) = generator.propose([state], 2)
        assert (step.text, step.token_ids, twin.sample) == (twin.text, twin.token_ids, 1)
        assert step.logprob == pytest.approx(-len(step.token_ids))
        found.append((step.text, step.end))
        if step.end != "step":
            return found
        state = State(state.problem, (*state.steps, step.text), (*state.token_ids, *step.token_ids), (*state.path, 0))
        assert policy.tokenizer.decode(state.token_ids) == state.text
    return found


def test_steps_end_at_newlines(policy: Policy) -> None:
    assert typed(policy, "1+1=2\nso 2\n#### 2") == [("1+1=2\n", "step"), ("so 2\n", "step"), ("#### 2", "stop")]
    assert typed(policy, "#### 2\n") == [("#### 2\n", "step"), ("", "stop")], "the end token alone ends the solution"


def test_blank_lines_open_the_next_step(policy: Policy) -> None:
    assert typed(policy, "\n \na\n\n\nb") == [("\n \na\n", "step"), ("\n\nb", "stop")]


def test_blank_line_steps(policy: Policy) -> None:
    """A blank line with a space in it is no stop string, but ends the step all the same."""
    found = typed(policy, "a\nb\n\nc\n \nd\n\n#### 2", segmenter="blank_line")
    assert found == [("a\nb\n\n", "step"), ("c\n \n", "step"), ("d\n\n", "step"), ("#### 2", "stop")]


@pytest.mark.parametrize(
    ("segmenter", "expected"),
    [
        ("step_heading", [("Step 1: a.\n", "step"), ("Step 2: b. c\n", "step"), ("Step 3", "stop")]),
        ("sentence", [("Step 1: a.\n", "step"), ("Step 2: b.", "step"), (" c\n", "step"), ("Step 3", "stop")]),
        ("whole", [("Step 1: a.\nStep 2: b. c\nStep 3", "stop")]),
        ("regex:[.]", [("Step 1: a.", "step"), ("\nStep 2: b.", "step"), (" c\nStep 3", "stop")]),
    ],
)
def test_other_segmenters_cut_what_was_sampled(policy: Policy, segmenter: str, expected: Any) -> None:
    assert typed(policy, "Step 1: a.\nStep 2: b. c\nStep 3", segmenter=segmenter) == expected


class Pieces:
    """A policy whose tokens are given pieces of text; the last one is the end token."""

    max_length = None
    spec = None

    def __init__(self, *pieces: str) -> None:
        self.pieces = [*pieces, ""]
        self.eos_ids = {len(pieces)}
        self.tokenizer = self
        self.eos_token_id = len(pieces)

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return "".join(self.pieces[i] for i in ids)

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        """Tokens that spell the text, the longest first."""
        ids: list[int] = []
        while text:
            ids.append(max((i for i, p in enumerate(self.pieces) if p and text.startswith(p)), key=self._length))
            text = text[len(self.pieces[ids[-1]]) :]
        return {"input_ids": ids}

    def _length(self, i: int) -> int:
        return len(self.pieces[i])


@pytest.mark.parametrize("segmenter", ["newline", "blank_line"])
def test_a_token_across_the_boundary_belongs_to_the_step_before(segmenter: str) -> None:
    """Its text goes with it, as in a completion that is cut as a whole; the next step begins behind it."""
    pieces: Any = Pieces("Q: 1+1\n", "ab", ".\n\n", ".\n\nCd", "e", "\n\n")
    assert typed(pieces, "ab.\n\nab.\n\nCde\n\n\n\nab", segmenter=segmenter) == [
        *(("ab.\n\n", "step"), ("ab.\n\nCd", "step"), ("e\n\n", "step"), ("\n\nab", "stop"))
    ]
    stop = typed(pieces, "ab.\n\nCde", segmenter=segmenter, stop=("\nC",))
    assert stop == [("ab.\n", "stop")], "a string that ends the solution, inside of a token"


def test_confidence_may_cut(policy: Policy) -> None:
    """Every token of the typist has probability exp(-1) = 0.37."""
    assert typed(policy, "abc", segmenter="adaptive_step:0.5") == [("a", "step"), ("b", "step"), ("c", "stop")]
    assert typed(policy, "abc", segmenter="adaptive_step:0.3") == [("abc", "stop")]


def test_strings_that_end_the_solution(policy: Policy) -> None:
    assert typed(policy, "a\n#### 2 END more", stop=(" END",)) == [("a\n", "step"), ("#### 2", "stop")]
    found = typed(policy, "#### 2\nQuestion: x", stop=("\nQuestion",))
    assert found == [("#### 2\n", "step"), ("", "stop")], "it may begin in an earlier step"


def test_long_steps_are_cut_off(policy: Policy) -> None:
    assert typed(policy, "abcdef\n", max_step_tokens=4) == [("abcd", "length")]
    assert typed(policy, "abc\ndef\n", max_step_tokens=4) == [("abc\n", "step"), ("def\n", "step"), ("", "stop")]
    assert typed(policy, "\n\n\n\n\n\nx", max_step_tokens=4) == [("\n\n\n\n", "length")]


def test_long_solutions_are_cut_off(policy: Policy) -> None:
    """Also where the end would have come within the step's own limit."""
    assert typed(policy, "abc\ndef", max_tokens=6) == [("abc\n", "step"), ("de", "length")]
    assert typed(policy, "abc\nd", max_tokens=6) == [("abc\n", "step"), ("d", "stop")]
    assert typed(policy, "abc\nd", max_tokens=4) == [("abc\n", "length")]


def test_a_full_context_ends_the_solution(policy: Policy) -> None:
    room = policy.max_length
    assert room is not None
    long = State(Problem(3, {"id": "p3"}, (5,) * 7), ("x",), (6,) * (room - 11))
    engine = TransformersEngine(policy)
    generator = SampledSteps(engine, policy, SamplingConfig(seed=1), max_step_tokens=64)
    ((step,),) = generator.propose([long], 1)
    assert len(step.token_ids) <= 4
    assert step.end != "step" or len(step.token_ids) < 4
    full = State(long.problem, ("x",), (6,) * (room - 7))
    with pytest.raises(DataError, match=f"p3.*fills the model's context of {room}"):
        generator.propose([full], 1)
    with pytest.raises(DataError, match="fills the model's context"):
        generator.complete([full], 1)


def test_a_step_is_the_first_one_of_the_whole_completion(policy: Policy) -> None:
    """Stopping early changes nothing: with the same noise, the uncut sample begins with the step."""
    spec = SamplingConfig(n=6, max_new_tokens=24, seed=5)
    generator = SampledSteps(TransformersEngine(policy), policy, spec, segmenter="regex:[a-m]", max_step_tokens=24)
    problem = Problem(2, {"id": "p"}, ids_of(policy, "12+3="))
    ((*steps,),) = generator.propose([State(problem)], 6)
    (whole,) = TransformersEngine(policy).generate([problem.prompt_ids], spec, purpose="search_step", indices=[(2,)])
    assert len({step.text for step in steps}) > 2
    for step, continuation in zip(steps, whole, strict=True):
        completion = text_from_ids(policy.tokenizer, continuation.token_ids)
        _, end = segment(get_segmenter("regex:[a-m]"), completion)[0]
        assert step.token_ids == tuple(continuation.token_ids[:end].tolist())
        assert step.logprob == pytest.approx(sum(continuation.raw_logprobs[:end]), rel=1e-10)
        assert step.end == ("step" if end < len(continuation.token_ids) else continuation.finish)


def test_states_do_not_depend_on_their_batch(policy: Policy) -> None:
    """Nor do their costs: each has room of its own, of at most 14 tokens."""
    spec = SamplingConfig(max_new_tokens=14, seed=3)
    engine = TransformersEngine(policy, max_rows=4)
    problems = [Problem(i, {"id": str(i)}, ids_of(policy, text)) for i, text in enumerate(("7", "long 12+34=", "abc"))]
    states = [State(problem) for problem in problems]
    more = ids_of(policy, "12\n")
    states += [State(problems[0], ("12\n",), more, path) for path in ((0,), (1,))]
    states += [State(problems[1], ("9" * 12,), ids_of(policy, "9" * 12), (0,))]
    generator = SampledSteps(engine, policy, spec, segmenter="regex:[a-m]", max_step_tokens=12, max_tokens=14)
    for draw in (generator.propose, generator.complete):
        generator.costs.clear()
        together = draw(states, 3)
        costs = {problem.index: generator.costs[problem.index].total() for problem in problems}
        backwards = draw(states[::-1], 3)[::-1]
        assert [[s.token_ids for s in g] for g in backwards] == [[s.token_ids for s in g] for g in together]
        generator.costs.clear()
        for state, expected in zip(states, together, strict=True):
            (alone,) = draw([state], 3)
            assert [(s.token_ids, s.text, s.end) for s in alone] == [(s.token_ids, s.text, s.end) for s in expected]
        assert {problem.index: generator.costs[problem.index].total() for problem in problems} == costs
        assert together[3] != together[4], "the same text, reached by two samples, draws two noises"
        first = [[own[0].token_ids] for own in together]
        assert [[s.token_ids for s in g] for g in draw(states, 1)] == first, "fewer samples are the first of more"


def test_tokens_are_counted_by_problem(policy: Policy) -> None:
    generator = SampledSteps(TransformersEngine(policy), policy, SamplingConfig(max_new_tokens=6), segmenter="whole")
    states = [State(Problem(i, {"id": str(i)}, (9, 8))) for i in (4, 7)]
    steps, rest = generator.propose(states, 2), generator.complete(states, 1)
    for name, groups in (("steps", steps), ("continuations", rest)):
        spent = {i: generator.costs[i][name] for i in (4, 7)}
        assert spent == {i: sum(len(s.token_ids) for s in g) for i, g in zip((4, 7), groups, strict=True)}
    assert set(generator.provenance()) >= {"model", "weights", "temperature", "seed", "max_step_tokens"}
    assert generator.provenance()["segmenter"] == {"name": "whole"}
    cut = SampledSteps(TransformersEngine(policy), policy, SamplingConfig(), segmenter="adaptive_step:0.25")
    assert cut.provenance()["segmenter"] == {
        "name": "adaptive_step", "threshold": 0.25
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_step_tokens": 0}, "max_step_tokens=0"),
        ({"segmenter": "entropy:1.0"}, "signals that sampling does not give"),
        ({"segmenter": "newlin"}, "newline"),
    ],
)
def test_bad_settings(policy: Policy, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SampledSteps(TransformersEngine(policy), policy, SamplingConfig(), **options)
    with pytest.raises(ConfigError, match="temperature 0"):
        SampledSteps(TransformersEngine(policy), policy, SamplingConfig(temperature=0))


def test_prompts_about_drafts_are_read_with_the_template(policy: Policy) -> None:
    engine, problem = Typist(policy, "", ""), Problem(3, {"id": "p", "prompt": "1+1", "answer": "2"}, (7,))
    with pytest.raises(ConfigError, match="prompt template"):
        SampledSteps(engine, policy, SamplingConfig()).asked(problem, "1+1?")
    generator = SampledSteps(engine, policy, SamplingConfig(), template=get_template("plain"))
    asked = generator.asked(problem, "1+1\n\nDraft:\n3\n")
    assert asked is not None
    assert asked.index == 3
    assert asked.row == {"id": "p", "prompt": "1+1\n\nDraft:\n3\n", "answer": "2"}
    assert policy.tokenizer.decode(asked.prompt_ids) == "Question: 1+1\n\nDraft:\n3\n\nAnswer:\n"
    assert policy.max_length == 1024
    fits = generator.asked(problem, "x" * (1023 - len("Question: \nAnswer:\n")))
    assert fits is not None
    assert generator.room(State(fits)) == 1
    assert generator.asked(problem, "x" * (1024 - len("Question: \nAnswer:\n"))) is None
