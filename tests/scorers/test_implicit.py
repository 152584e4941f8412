"""A policy and its reference as a scorer: by hand, what does not change it, what a run says by itself, bad input."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from stepkd.data.templates import get_template
from stepkd.errors import ConfigError, ModelError
from stepkd.models.checkpoint import weights_fingerprint
from stepkd.models.policy import Policy
from stepkd.models.spec import PolicyConfig, build_tiny
from stepkd.scorers.implicit import ImplicitPRM
from stepkd.scorers.load import Implicit, load_scorer, scorer_of
from stepkd.scorers.scorer import Solutions, reduce_scores, score_one, score_rows

STEPS = ["a+b = 3\n", "so\n", "#### 3"]


@pytest.fixture
def policy(make_policy: Callable[..., Policy]) -> Policy:
    """Its reference has the weights of another seed."""
    own = make_policy()
    own.set_reference(Policy(*build_tiny("tiny-0.1m", seed=3, dtype="float64")))
    return own


def scorer(policy: Policy, **settings: Any) -> ImplicitPRM:
    return ImplicitPRM(policy, **{"template": "task", "beta": 0.05} | settings)


def log_ratios(policy: Policy, prompt: str, steps: list[str]) -> list[float]:
    """Of every step: all logits, one token after the other."""
    (reference,) = policy._frozen
    lead = len(policy.tokenizer(prompt)["input_ids"])
    ids = torch.tensor(policy.tokenizer(prompt + "".join(steps))["input_ids"])
    found = []
    with torch.no_grad():
        own, other = (each.causal_lm(ids[None]).logits[0].log_softmax(-1) for each in (policy, reference))
    at = lead
    for step in steps:
        end = at + len(policy.tokenizer(step)["input_ids"])
        found.append(sum(float(own[t - 1, ids[t]] - other[t - 1, ids[t]]) for t in range(at, end)))
        at = end
    return found


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_scores_by_hand(policy: Policy) -> None:
    ratios = log_ratios(policy, "p", STEPS)
    assert len({round(ratio, 3) for ratio in ratios}) == 3
    whole, own = scorer(policy), scorer(policy, cumulative=False)
    found = score_one(whole, "p", STEPS)
    assert found == pytest.approx([sigmoid(0.05 * sum(ratios[:k])) for k in (1, 2, 3)], abs=1e-12)
    steps = score_one(own, "p", STEPS)
    assert steps == pytest.approx([sigmoid(0.05 * ratio) for ratio in ratios], abs=1e-12)
    assert (whole.meaning, own.meaning) == ("value", "correctness")
    assert reduce_scores(found, meaning=whole.meaning) == found[-1], "the reward of the whole solution"
    logits = [math.log(score / (1 - score)) for score in steps]
    assert sum(logits) == pytest.approx(math.log(found[-1] / (1 - found[-1])), abs=1e-9)


def test_a_policy_that_is_its_reference_scores_one_half(make_policy: Callable[..., Policy]) -> None:
    policy = make_policy()
    policy.freeze_copy()
    assert score_one(scorer(policy), "p", STEPS) == [0.5, 0.5, 0.5]


def test_other_solutions_and_later_steps_change_nothing(policy: Policy, problems: list[Solutions]) -> None:
    each = scorer(policy)
    for problem, scores in zip(problems, each.score(problems), strict=True):
        for steps, values in zip(problem.solutions, scores, strict=True):
            prompt = str(problem.row["prompt"])
            assert values == pytest.approx(score_one(each, prompt, steps), abs=1e-12)
            closed = [step if step.endswith("\n") else f"{step}\n" for step in steps[:-1]]
            assert values[:-1] == pytest.approx(score_one(each, prompt, closed) if closed else [], abs=1e-12)


def test_sampled_ids_are_read_without_their_end(policy: Policy) -> None:
    tokenizer = policy.tokenizer
    parts = [tokenizer(step)["input_ids"] for step in STEPS]
    ids = [*chain(*parts), tokenizer.eos_token_id]
    ends = [len(parts[0]), len(parts[0]) + len(parts[1]), len(ids)]
    row = {"id": "r", "prompt": "p", "token_ids": ids, "step_ends": ends, "completion": "".join(STEPS)}
    each = scorer(policy)
    assert score_rows(each, [row])[0] == pytest.approx(score_one(each, "p", STEPS), abs=1e-12)


def test_steps_beyond_either_context_are_not_scored(policy: Policy) -> None:
    whole = score_one(scorer(policy), "p", STEPS)
    room = len("p") + len("".join(STEPS[:2]))
    (reference,) = policy._frozen
    reference.causal_lm.config.max_position_embeddings = room
    for each in (scorer(policy), scorer(policy, max_length=room)):
        found = score_one(each, "p", STEPS)
        assert found[:2] == pytest.approx(whole[:2], abs=1e-12)
        assert math.isnan(found[2])


def test_bad_models_and_settings(policy: Policy) -> None:
    for beta in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ConfigError, match=r"beta=.*must be positive"):
            scorer(policy, beta=beta)
    with pytest.raises(ConfigError, match="beta=0: must be positive"):
        Implicit("m", beta=0)
    with torch.no_grad():
        next(policy.parameters()).fill_(math.nan)
    with pytest.raises(ModelError, match="not numbers"):
        score_one(scorer(policy), "p", STEPS)


# --- runs ----------------------------------------------------------------------------------------------------------


def run_of(folder: Path, policy: PolicyConfig, **section: Any) -> Path:
    """A run folder with another model's weights, as a preference method writes it."""
    trained = Policy.load(PolicyConfig(policy.path, init_seed=7))
    weights = {f"policy.{name}": value for name, value in trained.trainable_parameters()}
    own = {"policy": asdict(policy), "template": asdict(get_template("task")), **section}
    (folder / "checkpoints").mkdir(parents=True)
    torch.save({"state_dict": weights, "stepkd": own}, folder / "checkpoints" / "last.ckpt")
    return folder


def test_a_run_says_beta_reference_and_template(tmp_path: Path) -> None:
    start = PolicyConfig("tiny-0.1m", init_seed=2)
    known = weights_fingerprint(Policy.load(start))
    run = run_of(tmp_path / "run", start, settings={"beta": 0.3}, frozen={"reference": known})
    assert scorer_of(f"implicit:{run}") == Implicit(str(run))
    found = load_scorer(f"implicit:{run}", device="cpu")
    assert isinstance(found, ImplicitPRM)
    facts = found.provenance()
    assert (facts["scorer"], facts["beta"], facts["reference"], facts["template"]) == ("implicit", 0.3, known, "task")
    trained = Policy.load(PolicyConfig("tiny-0.1m", init_seed=7))
    trained.set_reference(Policy.load(start))
    assert score_one(found, "p", STEPS) == score_one(scorer(trained, beta=0.3), "p", STEPS)
    other = load_scorer(Implicit(str(run), reference="tiny-0.1m", beta=0.1), device="cpu")
    assert isinstance(other, ImplicitPRM)
    assert other.beta == 0.1
    assert other.provenance()["reference"] != known


def test_a_run_whose_reference_has_changed_or_of_another_method_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    start = PolicyConfig("tiny-0.1m")
    changed = run_of(tmp_path / "a", start, settings={"beta": 0.3}, frozen={"reference": "0123"})
    with pytest.raises(ModelError, match=r"another model now than when it was trained.*0123 then"):
        load_scorer(f"implicit:{changed}")
    means = run_of(tmp_path / "c", start, settings={"beta": 0.3, "length_normalised": True}, frozen={"reference": "0"})
    with pytest.raises(ConfigError, match="length_normalised: true: it learnt the mean"):
        load_scorer(f"implicit:{means}")
    load_scorer(Implicit(str(changed), dtype="bfloat16"))
    assert "whether the reference of" in caplog.text
    assert "scorer.dtype=bfloat16" in caplog.text
    other = run_of(tmp_path / "b", start, settings={}, frozen={"policy": ""})
    for model in (str(other), "tiny-0.1m"):
        with pytest.raises(ConfigError, match=r"no run of KTO, DPO or ImplicitPRM.* give scorer.beta and scorer.refer"):
            load_scorer(f"implicit:{model}")
