"""Whether an engine follows the weights: in closed form, a healthy bfloat16 run, deaf engines, several addresses.

A policy is a table of logits here, one row for every context; an engine is such a table, and what rounding adds.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from stepkd.data.completion import Completion, Numbers
from stepkd.errors import ModelError
from stepkd.sampling.engine import SamplingConfig
from stepkd.sampling.follow import FollowCheck, Follower, reading

SPEC = SamplingConfig()
ROUNDING = {"float32": 1e-6, "bfloat16": 0.08}
"""Standard deviation of an engine's logits: gives 0.05 nats a token where a policy is unsure."""


def test_distances_are_by_what_the_policy_leaves_open() -> None:
    """0.2 nats on tokens of probability 1/2, and 0.1 on tokens of 3/4, are the same share of the rest."""
    half, most = np.log([0.5, 0.5]), np.log([0.75, 0.75])
    found = [
        reading(half + 0.2, half, half),
        reading(most - 0.1, most, most),
        reading(half[:1] - 1, half[:1] - 2, np.zeros(1)),
    ]
    assert [each.nats for each in found] == pytest.approx([0.2, 0.1, 1.0])
    assert [each.share for each in found] == pytest.approx([0.4, 0.4, 100.0])


@pytest.mark.parametrize(
    ("gap", "moved", "follows"),
    [
        (0.1, 0.0, None),  # nothing moved
        (0.2, 0.1, None),  # as far as noise explains
        (0.21, 0.1, False),  # further than the trainer moved
        (0.21, 0.4, False),  # nearer to the old weights
        (0.21, 0.43, True),  # grown, and nearer to the new ones
        (0.1, 0.5, True),
        (0.39, 0.9, True),
        (0.41, 9.0, False),  # beyond all growth
        (0.2, None, True),  # resumed: nothing is known of what moved
        (0.21, None, False),
    ],
)
def test_one_batch_is_judged_by_distances(gap: float, moved: float | None, follows: bool | None) -> None:
    follower = Follower(noise=0.1, before=0.1)
    assert follower.follows(gap, moved) is follows
    assert follower.strayed == (follows is False)
    assert follower.before == (gap if follows else 0.1)


def test_a_distance_that_is_no_number_strays() -> None:
    assert Follower(noise=0.1, before=0.1).follows(float("nan"), 1.0) is False
    assert Follower(noise=0.1, before=0.1).follows(0.05, float("nan")) is None


def test_batches_that_stray_count_while_they_come_one_after_the_other() -> None:
    follower = Follower(noise=0.1, before=0.1)
    for gap in (0.9, 0.9, 0.1, 0.9, 0.9):
        follower.follows(gap, 1.0)
    assert follower.strayed == 2


class Table:
    """Logits of 40 tokens in 2,000 contexts; ``sharpness`` multiplies them."""

    device, vocab_size = torch.device("cpu"), 40
    eos_ids: frozenset[int] = frozenset()

    def __init__(self, sharpness: float = 1.0, dtype: torch.dtype = torch.float32) -> None:
        self.logits, self.direction = np.random.default_rng(0).standard_normal((2, 2000, 40))
        self.sharpness, self.dtype = sharpness, dtype
        self.engine_noise: dict[str, Any] = {}

    def parameters(self) -> Any:
        return iter([torch.zeros(1, dtype=self.dtype)])

    def move(self, by: float) -> None:
        """What an optimiser does."""
        self.logits = self.logits + by * self.direction

    def copy(self) -> Numbers:
        """What is sent to an engine."""
        return self.sharpness * self.logits


def draw(logits: Numbers, rounding: float, step: int, n: int = 24, temperature: float = 1.0) -> list[Completion]:
    """Completions of 12 tokens, each in a context of its own."""
    noise, found = np.random.default_rng(step), []
    for number in range(n):
        contexts = noise.integers(len(logits), size=12)
        rounded_TV = logits[contexts] + rounding * noise.standard_normal((12, 40))
        logps_TV = log_softmax(rounded_TV / temperature, axis=-1)
        ids = (logps_TV + noise.gumbel(size=logps_TV.shape)).argmax(-1)
        found.append(Completion(contexts, ids, logprobs=logps_TV[np.arange(12), ids], id=str(number)))
    return found


@pytest.fixture(autouse=True)
def tables(monkeypatch: pytest.MonkeyPatch) -> None:
    def sampled_logps(policy: Table, completions: Sequence[Completion], temperature: float) -> Numbers:
        own = [log_softmax(policy.copy()[each.prompt_ids] / temperature, axis=-1) for each in completions]
        return np.concatenate([a[np.arange(12), each.token_ids] for a, each in zip(own, completions, strict=True)])

    monkeypatch.setattr("stepkd.sampling.follow.sampled_logps", sampled_logps)


def check_of(policy: Table, **facts: Any) -> FollowCheck:
    return FollowCheck(SimpleNamespace(policy=policy, facts=lambda: facts))  # type: ignore[arg-type]


@pytest.mark.parametrize("by", [0.002, 0.02])
@pytest.mark.parametrize("ends", [1.0, 12.0])
def test_a_healthy_engine_whose_noise_grows_is_not_stopped(by: float, ends: float) -> None:
    """The student begins sure of itself and ends unsure, so that the same rounding is several times as many nats."""
    policy, nats = Table(sharpness=8.0 if ends == 1 else 2.0), []
    check, rounding = check_of(policy, dtype="torch.bfloat16"), ROUNDING["bfloat16"]
    pace = (ends / policy.sharpness) ** (1 / 150)
    for version in range(150):
        batch = draw(policy.copy(), rounding, version)
        check({"": batch}, SPEC, f"version {version}")
        policy.move(by)
        policy.sharpness *= pace
        assert check._of[""].strayed < 2
        drawn = np.concatenate([each.logprobs for each in batch])
        nats.append(rounding * float(1 - np.exp(drawn).mean()))
    assert ends > 1 or nats[-1] > 2 * nats[0]


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize("by", [2e-3, 0.02, 0.5])
def test_a_deaf_engine_is_found_however_small_the_steps(kind: str, by: float) -> None:
    policy = Table()
    check, held = check_of(policy, dtype=f"torch.{kind}"), policy.copy()
    for version in range(5):
        held = policy.copy()
        check({"": draw(held, ROUNDING[kind], version)}, SPEC, f"version {version}")
        policy.move(by)

    def train() -> None:
        for version in range(5, 500):
            check({"": draw(held, ROUNDING[kind], version)}, SPEC, f"version {version}")
            policy.move(by)

    with pytest.raises(ModelError, match=r"from the weights of version \d+: .* the trainer's moved by") as stopped:
        train()
    assert by < 0.5 or "of version 7:" in str(stopped.value)


def test_a_part_of_the_weights_that_stays_old_is_found() -> None:
    """As a head that was sent and not taken: most of what the trainer moved arrives."""
    policy, first = Table(), Table().copy()
    check = check_of(policy, dtype="torch.bfloat16")

    def train() -> None:
        for version in range(100):
            held = 0.7 * policy.copy() + 0.3 * first
            check({"": draw(held, ROUNDING["bfloat16"], version)}, SPEC, f"version {version}")
            policy.move(0.1)

    with pytest.raises(ModelError, match="does not sample from the weights"):
        train()


def test_an_engine_that_was_equal_at_first_has_the_noise_of_float32() -> None:
    policy = Table()
    check = check_of(policy, dtype="torch.float32")
    for version in range(5):
        check({"": draw(policy.copy(), 2e-5 * min(version, 1), version)}, SPEC, f"version {version}")
        policy.move(0.1)
    assert (check._of[""].strayed, policy.engine_noise["noise"]) == (0, pytest.approx(1e-4, rel=0.2))


def test_one_of_several_addresses_is_named() -> None:
    policy = Table()
    check, old = check_of(policy, dtype="torch.float32"), policy.copy()

    def train() -> None:
        for version in range(10):
            drawn = {"http://a": draw(policy.copy(), 1e-6, version), "http://b": draw(old, 1e-6, version)}
            check(drawn, SPEC, f"version {version}")
            policy.move(0.1)

    with pytest.raises(ModelError, match="weights of version 3 at http://b"):
        train()


def test_a_resumed_run_knows_its_noise() -> None:
    """An engine that kept old weights over the kill is found, though its first samples would pass as noise."""
    policy = Table()
    check, old = check_of(policy, dtype="torch.bfloat16"), policy.copy()
    check({"": draw(old, 0.02, 0)}, SPEC, "version 0")
    known = dict(policy.engine_noise)
    assert known["noise"] == known["before"] > 0
    assert known["of"] == "torch.bfloat16 None"
    policy.move(0.1)

    def resumed(known: dict[str, Any]) -> dict[str, Any]:
        policy.engine_noise = known
        again = check_of(policy, dtype="torch.bfloat16")
        for step in range(3):
            again({"": draw(old, 0.02, step)}, SPEC, "version 1")
        return policy.engine_noise

    assert resumed({})["noise"] > 2 * known["noise"]
    other = resumed({**known, "of": "torch.float32 None"})
    assert other["noise"] > 2 * known["noise"], "that of another number format says nothing"
    with pytest.raises(ModelError, match=r"version 1: .* times what rounding explains"):
        resumed(known)


@pytest.mark.parametrize(
    ("by", "kind", "facts", "stops"),
    [
        (0.05, torch.float32, {"dtype": "torch.float32"}, True),
        (0.05, torch.float32, {"dtype": "torch.bfloat16"}, False),
        (0.05, torch.bfloat16, {}, False),
        (0.3, torch.float32, {"dtype": "torch.bfloat16"}, True),
        (0.3, torch.float32, {"dtype": "torch.bfloat16", "quantization": "awq"}, False),
        (0.3, torch.uint8, {"dtype": "torch.bfloat16", "quantization": "None"}, False),
        (0.3, torch.float32, {"dtype": "None"}, True),
    ],
)
def test_first_samples_are_as_near_as_number_formats_explain(
    by: float, kind: torch.dtype, facts: dict[str, str], stops: bool, caplog: pytest.LogCaptureFixture
) -> None:
    policy = Table(dtype=kind)
    check, old = check_of(policy, **facts), policy.copy()
    policy.move(by)
    if stops:
        with pytest.raises(ModelError, match="is the most that rounding explains"):
            check({"": draw(old, 0, 0)}, SPEC, "version 0")
    else:
        check({"": draw(old, 0, 0)}, SPEC, "version 0")
        assert ("as quantised weights may" in caplog.text) == (by > 0.1)


def test_samples_that_are_cut_show_nothing_and_it_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    policy = Table()
    check = check_of(policy)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            check({"": draw(policy.copy(), 0, 0)}, SamplingConfig(top_p=0.9), "version 0")
    assert caplog.text.count("cannot show whether the engine follows") == 1
    assert not check._of


@pytest.mark.parametrize("first", [1.0, 0.4])
def test_temperatures_compare(first: float) -> None:
    """The trainer stands still, as in a job: neither a lower temperature strays nor a higher one."""
    policy = Table(dtype=torch.bfloat16)
    check, rounding, other = check_of(policy), ROUNDING["bfloat16"], 1.4 - first
    for step, temperature in enumerate([first, other, other, other, first]):
        batch = draw(policy.copy(), rounding, step, temperature=temperature)
        check({"": batch}, SamplingConfig(temperature=temperature), "version 0")
        assert check._of[""].strayed == 0
    noise = check._of[""].noise
    assert noise == pytest.approx(0.8 * rounding, rel=0.3)


def test_an_end_token_that_stands_for_an_unknown_id_is_not_compared() -> None:
    policy = Table()
    policy.eos_ids = frozenset({3})
    check = check_of(policy, dtype="torch.float32")
    stands = Completion(np.array([5]), np.array([3]), logprobs=np.array([-40.0]), finish="length")
    check({"": [*draw(policy.copy(), 0, 0, n=3), stands], "http://a": [stands]}, SPEC, "version 0")
    assert check._of.keys() == {""}
