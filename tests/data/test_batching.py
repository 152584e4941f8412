"""Batches: every example once, the same on every rank and in every process, within the budget."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepkd.data.batching import BatchPlan, micro_batches, rank_share
from stepkd.errors import ConfigError

LENGTHS = np.random.default_rng(0).integers(5, 200, size=103).tolist()
lengths_lists = st.lists(st.integers(1, 50), min_size=1, max_size=40)
PLANS = [
    {"size": 8},
    {"size": 8, "bucket_window": 4},
    {"size": 8, "shuffle": False},
    {"size": 600, "unit": "tokens"},
    {"size": 600, "unit": "tokens", "bucket_window": 4},
    {"size": 1},
    {"size": 1000},
    {"size": 1, "unit": "tokens"},
]


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_every_example_exactly_once_per_epoch(plan: dict[str, Any]) -> None:
    batches = BatchPlan(LENGTHS, **plan)
    for epoch in range(3):
        drawn = [i for batch in batches.batches(epoch) for i in batch]
        assert sorted(drawn) == list(range(len(LENGTHS)))
        assert all(batches.batches(epoch)), "no empty batch"
        if batches.num_batches is not None:
            assert len(batches.batches(epoch)) == batches.num_batches


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_same_key_same_plan(plan: dict[str, Any]) -> None:
    first, second = BatchPlan(LENGTHS, **plan), BatchPlan(LENGTHS, **plan)
    second.batches(0)  # what was asked before changes nothing
    assert first.batches(2) == second.batches(2)
    if plan.get("shuffle", True) and plan["size"] != 1000:
        assert first.batches(0) != first.batches(1)
        assert first.batches(0) != BatchPlan(LENGTHS, **plan, seed=1).batches(0)
    if not plan.get("shuffle", True):
        assert [i for batch in first.batches(1) for i in batch] == list(range(len(LENGTHS)))


def test_the_same_in_another_process() -> None:
    code = (
        "from stepkd.data.batching import BatchPlan; "
        f"print(BatchPlan({LENGTHS}, size=300, unit='tokens', seed=5, bucket_window=3).batches(7))"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert other.strip() == str(BatchPlan(LENGTHS, size=300, unit="tokens", seed=5, bucket_window=3).batches(7))


@given(lengths_lists, st.integers(1, 120), st.integers(1, 4), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_token_batches_stay_within_the_budget(lengths: list[int], size: int, window: int, epoch: int) -> None:
    batches = BatchPlan(lengths, size=size, unit="tokens", bucket_window=window).batches(epoch)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert sum(lengths[i] for i in batch) <= size or len(batch) == 1


def test_token_batches_are_filled() -> None:
    batches = BatchPlan(LENGTHS, size=600, unit="tokens", shuffle=False).batches(0)
    for batch, after in pairwise(batches):
        assert sum(LENGTHS[i] for i in batch) + LENGTHS[after[0]] > 600


@given(lengths_lists, st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_ranks_share_a_batch_without_repeats(lengths: list[int], world_size: int) -> None:
    batch = list(range(0, len(lengths), 2))
    shares = [rank_share(batch, lengths, rank, world_size) for rank in range(world_size)]
    assert sorted(i for share in shares for i in share) == batch
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    assert shares[0] == sorted(shares[0], key=lambda i: (lengths[i], i))


def test_ranks_get_similar_work() -> None:
    batch = list(range(64))
    work = [sum(LENGTHS[i] for i in rank_share(batch, LENGTHS, rank, 4)) for rank in range(4)]
    assert max(work) / min(work) < 1.15


def padding(batches: list[list[int]]) -> float:
    """Share of padding when every batch is padded to its longest row."""
    cells = sum(len(batch) * max(LENGTHS[i] for i in batch) for batch in batches)
    return 1 - sum(LENGTHS) / cells


@pytest.mark.parametrize("unit", [{"size": 8}, {"size": 800, "unit": "tokens"}], ids=str)
def test_buckets_reduce_padding(unit: dict[str, Any]) -> None:
    shares = [padding(BatchPlan(LENGTHS, **unit, bucket_window=window).batches(0)) for window in (1, 3, 13)]
    assert shares[0] > shares[1] > shares[2]
    assert shares[0] > 0.3
    assert shares[2] < 0.15


def test_bucketed_batches_come_in_random_order() -> None:
    means = [np.mean([LENGTHS[i] for i in b]) for b in BatchPlan(LENGTHS, size=8, bucket_window=13).batches(0)]
    assert means != sorted(means)
    ordered = BatchPlan(LENGTHS, size=8, bucket_window=13, shuffle=False).batches(0)
    means = [np.mean([LENGTHS[i] for i in b]) for b in ordered]
    assert means == sorted(means)


@pytest.mark.parametrize(("rows", "full", "rest"), [(103, 12, 7), (96, 12, 0)])
def test_the_last_batch_may_be_smaller(rows: int, full: int, rest: int) -> None:
    plan = BatchPlan(LENGTHS[:rows], size=8)
    assert plan.num_batches == full + bool(rest)
    assert sorted(map(len, plan.batches(0)), reverse=True) == [8] * full + [rest] * bool(rest)


@given(lengths_lists, st.integers(1, 200))
@settings(max_examples=100, deadline=None)
def test_micro_batches(lengths: list[int], max_tokens: int) -> None:
    groups = micro_batches(lengths, max_tokens)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    longest = [max(lengths[i] for i in group) for group in groups]
    assert longest == sorted(longest, reverse=True)
    assert longest[0] == max(lengths)
    for group, width in zip(groups, longest, strict=True):
        assert len(group) * width <= max_tokens or len(group) == 1


def test_micro_batches_of_nothing() -> None:
    assert micro_batches([], 10) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unit": "rows"}, "batch unit 'rows': must be 'sequences' or 'tokens'"),
        ({"size": 0}, "global batch size 0: must be at least 1"),
        ({"bucket_window": 0}, "bucket_window=0: must be at least 1"),
        ({"lengths": []}, "there are no examples"),
    ],
    ids=str,
)
def test_bad_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BatchPlan(**{"lengths": LENGTHS, "size": 8, **changes})


def test_bad_micro_batch_budget() -> None:
    with pytest.raises(ConfigError, match="micro_batch_tokens=0: must be at least 1"):
        micro_batches([1], 0)
