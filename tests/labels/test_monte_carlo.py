"""Monte-Carlo labels: against a labeller written out by hand, where a solution is over, early stop, company, errors."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from continuations import SPEC, TOKENIZER, Scripted, lively_policy, solution, some_solutions

from stepkd.errors import DataError
from stepkd.grading.pool import Grader, GradingConfig
from stepkd.labels.labellers import Labeller, Solution, StepLabels
from stepkd.labels.monte_carlo import MonteCarloLabeller, consistent_labels
from stepkd.models.policy import Policy
from stepkd.randomness import generator
from stepkd.sampling.engine import SamplingConfig
from stepkd.sampling.transformers_engine import TransformersEngine


@pytest.fixture(scope="module")
def policy() -> Policy:
    return lively_policy()


@pytest.fixture(scope="module")
def grader() -> Grader:
    return Grader(GradingConfig(extractors=("hash", "last_number"), workers=1))


def by_hand(policy: Policy, grader: Grader, each: Solution, spec: SamplingConfig) -> tuple[list[int], list[int]]:
    """Successes and trials: one prefix at a time, tokens by plain sampling with the documented key, text by joining."""
    successes, trials = [], []
    for _, cut in each.spans:
        successes.append(0)
        trials.append(0)
        if cut == len(each.token_ids) and each.finish == "stop":
            continue
        length = len(each.prompt_ids) + cut
        for j in range(spec.n):
            uniforms = generator(spec.seed, "monte-carlo", 0, each.index, length, j).random(spec.max_new_tokens)
            ids, drawn = [*each.prompt_ids, *each.token_ids[:cut]], []
            for uniform in uniforms:
                inputs = torch.tensor([ids])
                with torch.no_grad():
                    logits = policy.head(policy.hidden(inputs, torch.ones_like(inputs))[0, -1:])
                cdf = torch.softmax(logits[0] / spec.temperature, -1).cumsum(-1)
                token = int((cdf <= uniform * cdf[-1]).sum())
                ids.append(token)
                drawn.append(token)
                if token == TOKENIZER.eos_token_id:
                    break
            text = "".join(each.steps)[: len(TOKENIZER.decode(each.token_ids[:cut]))] + TOKENIZER.decode(
                drawn, skip_special_tokens=True
            )
            trials[-1] += 1
            cut_off = drawn[-1] != TOKENIZER.eos_token_id
            grades = grader.grade([text], [str(each.row["answer"])], cut_off=[cut_off])
            successes[-1] += grades[0].verdict == "correct"
    return successes, trials


def test_labels_equal_those_made_by_hand(policy: Policy, grader: Grader) -> None:
    labeller = MonteCarloLabeller(TransformersEngine(policy), policy, grader, replace(SPEC, n=6), reduce="mean")
    solutions = some_solutions()[:3]
    total = 0
    for each, labels in zip(solutions, labeller.label(solutions), strict=True):
        successes, trials = by_hand(policy, grader, each, replace(SPEC, n=6))
        assert labels.facts["successes"] == successes
        assert labels.facts["trials"] == trials
        text = "".join(each.steps).replace("<eos>", "")
        grades = grader.grade([text], [str(each.row["answer"])], cut_off=[each.finish == "length"])
        own = grades[0].verdict == "correct"
        values = tuple(s / t if t else float(own) for s, t in zip(successes, trials, strict=True))
        assert labels.values == values == labels.labels
        total += sum(0 < s < t for s, t in zip(successes, trials, strict=True))
    assert total >= 1  # shares strictly between 0 and 1: the comparison can fail


def test_reductions_of_the_same_continuations(policy: Policy, grader: Grader) -> None:
    def labels(**settings: Any) -> list[StepLabels]:
        return MonteCarloLabeller(TransformersEngine(policy), policy, grader, SPEC, **settings).label(some_solutions())

    plain = labels()
    assert any(False in each.labels for each in plain)
    assert any(True in each.labels for each in plain)
    for each, first, back in zip(plain, labels(reduce="first_error"), labels(reduce="propagate"), strict=True):
        assert each.values is not None
        assert each.values == first.values == back.values
        assert each.facts == first.facts == back.facts
        assert each.labels == tuple(value is not None and value > 0 for value in each.values)
        incorrect = each.labels.index(False) if False in each.labels else len(each.labels)
        assert first.labels == tuple(each.labels[i] if i <= incorrect else None for i in range(len(each.labels)))
        assert back.labels == tuple(any(each.labels[i:]) for i in range(len(each.labels)))


def test_the_result_of_a_solution_is_its_own(policy: Policy, grader: Grader) -> None:
    """Alone, in other company, in other batches: labels, values and facts stay the same."""
    solutions = some_solutions()
    labeller = MonteCarloLabeller(TransformersEngine(policy), policy, grader, SPEC)
    expected = labeller.label(solutions)
    assert [labeller.label([each])[0] for each in solutions] == expected
    assert labeller.label(solutions[::-1])[::-1] == expected
    few = TransformersEngine(policy, max_rows=5)
    assert MonteCarloLabeller(few, policy, grader, SPEC).label(solutions) == expected
    assert labeller.label([]) == []


@pytest.mark.parametrize(
    ("steps", "given", "open_prefixes"),
    [
        (["a\n", "b\n", "#### 3<eos>"], {}, 2),
        (["a\n", "b\n", "#### 3"], {"finish": "length"}, 3),  # a 3, or the beginning of 31
        (["a\n", "#### 3\n", "so it is<eos>"], {}, 1),  # the final answer is there
        (["a\n", "#### 3\n", "so it is"], {"finish": "length"}, 2),
        (["a\n", "#### 3", "1\n", "yes<eos>"], {}, 2),  # a part of the final answer only
        (["a\n", "b<eos>", "c"], {"finish": "length"}, 1),  # nothing follows an end token
        (["#### 3<eos>"], {}, 0),
        (["a 3\n", "b 3\n", "3<eos>"], {}, 2),  # a number is not marked as final
    ],
)
def test_where_a_solution_is_over(
    policy: Policy, grader: Grader, steps: list[str], given: dict[str, Any], open_prefixes: int
) -> None:
    """There its own answer decides; open steps get continuations, all of which fail here."""
    engine = Scripted(lambda prefix, j: " never")
    ends = {"finish": "stop"} | given
    each = solution(steps, "3", correct=True, **ends)
    labels = MonteCarloLabeller(engine, policy, grader, replace(SPEC, n=2)).label([each])[0]
    started = [bool(count) for count in labels.facts["trials"]]
    assert sum(started) == open_prefixes == len(engine.prefixes)
    assert engine.prefixes == ["Q\n" + "".join(steps[: i + 1]) for i in range(len(steps)) if started[i]]
    assert labels.values is not None
    assert [v for v, drawn in zip(labels.values, started, strict=True) if not drawn] == [1.0] * (
        len(steps) - open_prefixes
    )


def test_a_full_context_is_an_end(policy: Policy, grader: Grader, monkeypatch: pytest.MonkeyPatch) -> None:
    each = solution(["ab", "cd", "ef"], "3", finish="length")
    monkeypatch.setattr(policy.causal_lm.config, "max_position_embeddings", len(each.prompt_ids) + 5)
    labels = MonteCarloLabeller(TransformersEngine(policy), policy, grader, SPEC).label([each])[0]
    assert labels.facts["trials"] == [8, 8, 0]
    assert labels.values is not None
    assert labels.values[2] == 0.0


def test_the_solutions_own_answer_decides_at_its_end(policy: Policy, grader: Grader) -> None:
    labeller = MonteCarloLabeller(Scripted(lambda prefix, j: ""), policy, grader, replace(SPEC, n=1))
    steps = ["a\n", "#### 3<eos>"]
    for correct in (True, False):
        assert labeller.label([solution(steps, "3", correct=correct)])[0].labels[-1] is correct


def test_a_solution_that_was_not_graded_has_no_value_at_its_end(policy: Policy, grader: Grader) -> None:
    labeller = MonteCarloLabeller(Scripted(lambda prefix, j: ""), policy, grader, replace(SPEC, n=1))
    steps = ["a\n", "#### 3<eos>"]
    for answer, correct in (("3", None), ("", True)):
        with pytest.raises(DataError, match=r"p0/0: needs an 'answer'.* and 'correct' where"):
            labeller.label([solution(steps, answer, correct=correct)])
    assert labeller.label([solution(["a"], "3", correct=None, finish="length")])[0].values == (0.0,)


def test_prefix_and_continuation_are_decoded_together(policy: Policy, grader: Grader) -> None:
    """An answer may begin in the prefix and end in the continuation."""
    engine = Scripted(lambda prefix, j: ("2", "3", "")[j])
    labels = MonteCarloLabeller(engine, policy, grader, replace(SPEC, n=3), reduce="mean").label(
        [solution(["#### 1", "9<eos>"], "12")]
    )[0]
    assert labels.values == (pytest.approx(1 / 3), 0.0)


def test_text_after_a_stop_string_does_not_count(policy: Policy, grader: Grader) -> None:
    each = solution(["see Q: 1\n", "end<eos>"], "5")
    for stop, value in ((("Q:",), 1.0), ((), 0.0)):
        spec = replace(SPEC, n=1, stop=stop)
        engine = Scripted(lambda prefix, j: "so 5 Q: 6")
        assert MonteCarloLabeller(engine, policy, grader, spec).label([each])[0].values == (value, 0.0)


def test_labels_of_steps_whose_result_nobody_takes_up_are_dropped() -> None:
    """A step without a number keeps its label, and so does one that no continuation speaks for or against."""
    steps = ["2*3=6\n", "so\n", "6+1=8\n", "8.0 it is\n", "#### 8"]
    texts = [["6+1=7\n#### 7"], ["#### 7"], ["no, #### 7", "18, 0.8\n#### 7"], ["8-1=7", "#### 7"], []]
    labels, used = consistent_labels(steps, [True, True, True, True, True], texts)
    assert labels == (True, True, None, True, True)
    assert used == [["6+1=7\n#### 7"], ["#### 7"], [], ["8-1=7"], []]
    assert consistent_labels(steps, [0.5, False, 0.0, None, 1.0], texts)[0] == (0.5, False, 0.0, None, 1.0)
    assert consistent_labels(steps, [0.125] * 5, texts)[0] == (0.125,) * 5, "a step that is called incorrect keeps it"
    assert consistent_labels(steps, [0.5, 0.5, 0.5, 0.5, 0.5], texts)[0] == (0.5, 0.5, None, 0.5, 0.5)


def test_continuations_are_kept_and_checked_when_asked_for(policy: Policy, grader: Grader) -> None:
    """The first that succeeds and takes up the result; a text behind a stop string does not count."""
    steps = ["1+1=2\n", "2+2=5\n", "#### 5<eos>"]
    tails = [" 9\n#### 4<eos>", "2+2=4\n#### 4 Q: 5", "#### 9"]
    engine = Scripted(lambda prefix, j: tails[j])
    spec = replace(SPEC, n=3, stop=("Q:",))

    def labelled(**options: Any) -> StepLabels:
        return MonteCarloLabeller(engine, policy, grader, spec, **options).label([solution(steps, "4")])[0]

    plain, kept, checked = labelled(), labelled(keep_continuations=True), labelled(consistent=True)
    assert plain.labels == kept.labels == (True, True, False)
    assert kept.facts == dict(plain.facts) | {"continuations": [" 9\n#### 4", " 9\n#### 4", None]}
    assert checked.labels == (True, None, False)
    assert checked.values == plain.values
    assert checked.facts == dict(plain.facts) | {"suspicious": 1}
    both = labelled(consistent=True, keep_continuations=True)
    assert both.facts["continuations"] == ["2+2=4\n#### 4 ", None, None]


def test_work_is_counted(policy: Policy, grader: Grader) -> None:
    solutions = some_solutions()
    engine = TransformersEngine(policy)
    labels = MonteCarloLabeller(engine, policy, grader, SPEC).label(solutions)
    longest = [  # every solution is read up to its last open step, once
        max((len(s.prompt_ids) + e for (_, e), n in zip(s.spans, each.facts["trials"], strict=True) if n), default=0)
        for s, each in zip(solutions, labels, strict=True)
    ]
    assert [each.facts["prefill_tokens"] for each in labels] == longest
    assert sum(each.facts["generated_tokens"] for each in labels) > 0


def test_provenance(policy: Policy, grader: Grader) -> None:
    labeller: Labeller = MonteCarloLabeller(
        TransformersEngine(policy), policy, grader, replace(SPEC, top_k=5, stop=("Q:",))
    )
    provenance = labeller.provenance()
    assert json.loads(json.dumps(provenance)) == provenance
    weights = provenance.pop("weights")
    assert isinstance(weights, str)
    assert weights
    assert provenance == {
        "labeller": "monte_carlo",
        "model": "LlamaForCausalLM",
        "revision": None,
        "J": 8,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 5,
        "max_new_tokens": 12,
        "stop": ["Q:"],
        "seed": 3,
        "reduce": "any",
    }
    consistent = MonteCarloLabeller(TransformersEngine(policy), policy, grader, SPEC, consistent=True)
    assert consistent.provenance()["consistent"] is True
