"""What every engine must do, as functions of an engine and of a policy in this process with the same float32 weights.

Plain asserts, which a process without pytest can run. ``tests/sampling/test_engine_contract.py`` runs them in this
process and on a stand-in for a server, ``test_real_vllm.py`` on vLLM itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from stepkd.data.completion import Completion
from stepkd.errors import DataError
from stepkd.grading.pool import Grader
from stepkd.models.policy import Policy
from stepkd.sampling.annotate import sampled_logps
from stepkd.sampling.engine import Branch, Engine, SamplingConfig
from stepkd.sampling.transformers_engine import TransformersEngine
from stepkd.search.best_of_n import Greedy
from stepkd.search.generate import SampledSteps
from stepkd.search.state import Problem, State, Tools

LONG = "1+2*3-4=" * 20
"""More than a block of a CPU's prefix cache (128 tokens)."""
TOLERANCE = 1e-4
"""Nats between two computations of a log-probability in float32."""
DRAWN = SamplingConfig(n=3, max_new_tokens=12, seed=3)
GREEDY = SamplingConfig(temperature=0, max_new_tokens=12)


def prompts(policy: Policy) -> list[tuple[int, ...]]:
    """A few, of 4 to 160 tokens."""
    return [tuple(policy.tokenizer(text).input_ids) for text in ("1+2=", "3*4-5=", LONG)]


def flat(drawn: Sequence[Sequence[Completion]]) -> list[Completion]:
    """All completions."""
    return [each for row in drawn for each in row]


def written(completions: Sequence[Completion]) -> list[Any]:
    """Tokens, text and end of each."""
    return [(each.token_ids.tolist(), each.text, each.finish) for each in completions]


def gap(policy: Policy, drawn: Sequence[Completion], temperature: float = 1.0) -> float:
    """Largest distance of the samples' log-probabilities from the policy's, in nats."""
    theirs = np.concatenate([each.logprobs for each in drawn])
    return float(np.abs(theirs - sampled_logps(policy, drawn, temperature)).max())


def move(policy: Policy, seed: int, by: float = 0.05) -> None:
    """What an optimiser does."""
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
                parameter.add_(noise * by)


def refused(call: Callable[[], Any]) -> str:
    """What a call says that must end in a DataError."""
    try:
        call()
    except DataError as error:
        return str(error)
    raise AssertionError("nothing was refused")


# ---- samples ---------------------------------------------------------------------------------------------------------


def completions_have_one_schema(engine: Engine, policy: Policy) -> None:
    done: list[int] = []
    drawn = engine.generate(prompts(policy), DRAWN, step=4, on_progress=done.append)
    assert [[(tuple(each.prompt_ids), each.sample) for each in row] for row in drawn] == [
        [(prompt, j) for j in range(DRAWN.n)] for prompt in prompts(policy)
    ]
    assert sum(done) == len(flat(drawn))
    assert len({each.key for each in flat(drawn)}) == len(flat(drawn)), "every sample has its own noise"
    for each in flat(drawn):
        assert (each.prompt_ids.dtype, each.token_ids.dtype) == (np.int64, np.int64)
        assert len(each.logprobs) == len(each.token_ids)
        assert each.logprobs.tolist() == each.raw_logprobs.tolist()
        assert (each.logprobs <= TOLERANCE).all()
        assert ((each.token_ids >= 0) & (each.token_ids < policy.vocab_size)).all()
        assert each.finish == ("stop" if each.token_ids[-1] in policy.eos_ids else "length")
        assert not any(token in policy.eos_ids for token in each.token_ids[:-1])
        assert each.finish == "stop" or len(each.token_ids) == DRAWN.max_new_tokens
        assert each.text == policy.tokenizer.decode(each.token_ids, skip_special_tokens=True)
    assert engine.generate([], DRAWN) == []
    assert json.loads(json.dumps(engine.facts())) == engine.facts()


def noise_is_keyed(engine: Engine, policy: Policy) -> None:
    """The same in another order, in other company and again; other noise at another step, seed, purpose or number."""
    texts = prompts(policy)
    whole = [written(row) for row in engine.generate(texts, DRAWN, step=1)]
    turned = engine.generate(texts[::-1], DRAWN, step=1, indices=[2, 1, 0])
    assert [written(row) for row in turned[::-1]] == whole
    alone = engine.generate(texts[1:2], DRAWN, step=1, indices=[1])
    assert [written(row) for row in alone] == whole[1:2]
    seeded = SamplingConfig(n=3, max_new_tokens=12, seed=4)
    others = [
        engine.generate(texts, DRAWN, step=2),
        engine.generate(texts, DRAWN, step=1, purpose="other"),
        engine.generate(texts, seeded, step=1),
        engine.generate(texts, DRAWN, step=1, indices=[3, 4, 5]),
    ]
    for other in others:
        assert all(written(a) != b for a, b in zip(other, whole, strict=True))


def greedy_tokens_are_equal(engine: Engine, policy: Policy) -> None:
    """To this process's, of prompts and of prefixes."""
    own = TransformersEngine(policy)
    drawn = flat(engine.generate(prompts(policy), GREEDY))
    assert written(drawn) == written(flat(own.generate(prompts(policy), GREEDY)))
    assert all(set(each.logprobs) == {0.0} for each in drawn)
    branches = [Branch(prompts(policy)[1], [2, 4, 6], 3), Branch(prompts(policy)[2], [131], 0)]
    spec = SamplingConfig(n=2, temperature=0, max_new_tokens=5)
    for a, b in zip(engine.continue_branches(branches, spec), own.continue_branches(branches, spec), strict=True):
        assert [written(cut) for cut in a.continuations] == [written(cut) for cut in b.continuations]


def stop_strings_end_completions(engine: Engine, policy: Policy) -> None:
    """Their tokens stay, their text goes; the first of them counts."""
    own = TransformersEngine(policy)
    whole = flat(own.generate(prompts(policy), GREEDY))
    for each in whole:
        spec = SamplingConfig(temperature=0, max_new_tokens=12, stop=(each.text[3:5], each.text[2]))
        found = flat(engine.generate(prompts(policy), spec))
        assert written(found) == written(flat(own.generate(prompts(policy), spec)))
        cut = [one for one, other in zip(found, whole, strict=True) if one.text != other.text]
        assert cut
        assert all(one.finish == "stop" for one in cut)


def the_context_ends_completions(engine: Engine, policy: Policy) -> None:
    context = engine.max_length
    assert context is not None
    (drawn,) = flat(engine.generate([(5,) * (context - 2)], GREEDY))
    assert len(drawn.token_ids) <= 2
    assert "the model's context is" in refused(lambda: engine.generate([(5,) * context], GREEDY))
    assert "has no tokens" in refused(lambda: engine.generate([()], GREEDY))
    cut = Branch((5,) * context, [context], 0)
    assert "the model's context is" in refused(lambda: engine.continue_branches([cut], GREEDY))


def samples_say_what_they_were_drawn_from(engine: Engine, policy: Policy) -> None:
    for temperature in (1.0, 0.7):
        spec = SamplingConfig(n=3, max_new_tokens=12, temperature=temperature)
        drawn = flat(engine.generate(prompts(policy), spec))
        found = gap(policy, drawn, temperature)
        assert found < TOLERANCE, f"{found} nats"


def every_version_is_sampled_from(engine: Engine, policy: Policy) -> None:
    """The policy moves, and the same version is sent once."""
    spec = SamplingConfig(n=3, max_new_tokens=12, temperature=0.7)
    for version in (1, 2):
        engine.update(version)
        drawn = flat(engine.generate(prompts(policy), spec, step=version))
        found = gap(policy, drawn, 0.7)
        assert found < TOLERANCE, f"{found} nats"
        move(policy, version)
        assert gap(policy, drawn, 0.7) > 0.1
    sent: list[int] = []
    vars(engine)["_send"] = sent.append
    engine.update(2)
    assert not sent
    engine.update(3)
    assert sent == [3]
    del vars(engine)["_send"]
    engine.update(4)
    found = gap(policy, flat(engine.generate(prompts(policy), spec)), 0.7)
    assert found < TOLERANCE, f"{found} nats"


def greedy_search_finds_the_same(engine: Engine, policy: Policy) -> None:
    """As in this process: whole solutions, and step after step."""
    problems = [Problem(i, {"id": str(i)}, ids) for i, ids in enumerate(prompts(policy))]
    found: list[Any] = []
    for each in (TransformersEngine(policy), engine):
        spec = SamplingConfig(max_new_tokens=8, seed=1)
        generator = SampledSteps(each, policy, spec, segmenter="regex:.", max_step_tokens=4, max_tokens=8)
        whole = Greedy().run(problems, Tools(generator, Grader()))
        found.append([(one.token_ids.tolist(), one.text, one.finish) for (one,) in whole])
        states = [State(problem) for problem in problems]
        while going := [i for i, state in enumerate(states) if state.end == "step"]:
            steps = generator.propose([states[i] for i in going], 1, temperature=0)
            for i, (step,) in zip(going, steps, strict=True):
                states[i] = states[i].then(step)
        found.append([([*state.token_ids], state.text, state.end) for state in states])
        assert any(len(state.steps) > 2 for state in states)
    assert found[2:] == found[:2]
    assert found[0] == found[1], "a solution is its steps"


SAMPLES = [
    completions_have_one_schema,
    noise_is_keyed,
    greedy_tokens_are_equal,
    greedy_search_finds_the_same,
    stop_strings_end_completions,
    the_context_ends_completions,
    samples_say_what_they_were_drawn_from,
]


# ---- scores ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def plain(policy: Policy, completion: Completion) -> torch.Tensor:
    """(T, V) log-probabilities from the model's own full logits, one row at a time."""
    ids = torch.tensor([[*completion.prompt_ids, *completion.token_ids]])
    logits = policy.causal_lm(input_ids=ids).logits[0, len(completion.prompt_ids) - 1 : -1, : policy.vocab_size]
    return torch.log_softmax(logits, -1)


def scores_equal_full_logits(engine: Engine, policy: Policy) -> None:
    """Of text that nobody sampled, whatever the order; none for a completion without tokens."""
    texts = prompts(policy)
    given = [Completion(np.array(a), np.array(b)) for a, b in zip(texts, ((5, 6, 7), (), (8, 5)), strict=True)]
    given += [Completion(np.array([7]), np.array(texts[2])), Completion(np.array(texts[0]), np.array([9]))]
    for top_k in (0, 5):
        found = engine.score(given, top_k)
        for each, scores in zip(given, found, strict=True):
            number = len(each.token_ids)
            assert (scores.logps_T.shape, scores.ids_Tk.shape, scores.logps_Tk.shape) == (
                (number,), (number, top_k), (number, top_k),
            )  # fmt: skip
            assert (scores.logps_T.dtype, scores.ids_Tk.dtype, scores.logps_Tk.dtype) == (
                np.float64, np.int64, np.float64,
            )  # fmt: skip
            if number:
                logps_TV = plain(policy, each)
                best = logps_TV.topk(top_k, -1)
                own_T = logps_TV.gather(-1, torch.from_numpy(each.token_ids)[:, None])[:, 0]
                assert np.abs(scores.logps_T - own_T.numpy()).max() < TOLERANCE
                assert np.abs(scores.logps_Tk - best.values.numpy()).max(initial=0) < TOLERANCE
                at_Tk = np.take_along_axis(logps_TV.numpy(), scores.ids_Tk, -1)
                assert np.abs(scores.logps_Tk - at_Tk).max(initial=0) < TOLERANCE
                assert all(len(set(row)) == top_k for row in scores.ids_Tk.tolist())
        for a, b in zip(engine.score(given[::-1], top_k)[::-1], found, strict=True):
            assert np.abs(a.logps_T - b.logps_T).max(initial=0) < TOLERANCE
    assert engine.score([], 3) == []


def samples_score_what_they_say(engine: Engine, policy: Policy) -> None:
    drawn = flat(engine.generate(prompts(policy), DRAWN))
    for each, scores in zip(drawn, engine.score(drawn), strict=True):
        assert np.abs(scores.logps_T - each.raw_logprobs).max() < TOLERANCE


def text_that_cannot_be_scored_is_refused(engine: Engine, policy: Policy) -> None:
    longest = engine.scored_length
    assert longest is not None

    def score(prompt: Sequence[int], own: Sequence[int], name: str = "") -> Any:
        return engine.score([Completion(np.array(prompt), np.array(own), id=name)])

    assert len(score((5,) * (longest - 2), (6, 7))[0].logps_T) == 2
    said = refused(lambda: score((5,) * (longest - 1), (6, 7), "row 8"))
    assert f"prompt and completion row 8 have {longest + 1} tokens and the model's context is {longest}" in said
    assert "prompt 0 has no tokens" in refused(lambda: score((), (5,)))
    for unknown in (-1, policy.vocab_size):
        said = refused(lambda unknown=unknown: score((5,), (unknown,)))  # type: ignore[misc]
        assert f"hold id {unknown}, and the model has ids 0 to {policy.vocab_size - 1}" in said


def choices_equal_full_logits(engine: Engine, policy: Policy) -> None:
    """What comes behind a prompt, given that it is one of some tokens; a prompt may fill what can be scored."""
    assert engine.scored_length is not None
    texts, tokens = [*prompts(policy), (5,) * engine.scored_length], [9, 5, 40]
    found = engine.choice_logps(texts, tokens)
    nothing = [Completion(np.array(text), np.array([0])) for text in texts]
    expected = torch.stack([plain(policy, each)[0, tokens].double().log_softmax(-1) for each in nothing]).numpy()
    assert (found.shape, found.dtype) == ((4, 3), np.float64)
    assert np.abs(found - expected).max() < TOLERANCE
    assert np.abs(engine.choice_logps(texts[::-1], tokens[::-1]) - expected[::-1, ::-1]).max() < TOLERANCE
    assert engine.choice_logps([], tokens).shape == (0, 3)


SCORES = [
    scores_equal_full_logits,
    samples_score_what_they_say,
    text_that_cannot_be_scored_is_refused,
    choices_equal_full_logits,
]
