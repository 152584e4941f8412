"""Which examples form a batch: one plan per epoch, the same on every rank, resumable anywhere; and the loader of it.

One batch is one optimiser step's worth of examples over all ranks. The plan depends only on (seed, epoch) and the
lengths, so a run can stop after any batch and resume there. Inside a batch, examples are sorted by length before they
are dealt to ranks and cut into micro-batches: padding is small, ranks get similar work, and, because losses are
normalised over the whole batch, none of this changes a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, replace
from typing import Any

import numpy as np

from stepkd.data.completion import Completion
from stepkd.errors import ConfigError
from stepkd.randomness import generator


@dataclass(frozen=True, eq=False)
class BatchPlan:
    """Order and grouping of examples, epoch by epoch: the same on every rank and after a resume."""

    lengths: Sequence[int]
    """Tokens of every example, each >= 1."""
    _: KW_ONLY
    size: int
    """Examples of a batch over all ranks, at least 1."""
    seed: int = 0
    """Seed of the shuffle."""
    shuffle: bool = True
    """Keep file order when False."""
    groups: Sequence[int] | None = None
    """Group of every example; examples of a group stay together."""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ConfigError(f"data.global_batch_size={self.size}: must be at least 1")
        assert len(self.lengths), "no examples"
        assert self.groups is None or len(self.groups) == len(self.lengths)

    @property
    def num_batches(self) -> int:
        """Batches per epoch; the last one may be smaller than ``size``."""
        return -(-len(self.lengths) // self.size)

    def batches(self, epoch: int) -> list[list[int]]:
        """Example numbers of every global batch of an epoch, every example exactly once.

        Args:
            epoch: number of the pass, from 0; with the seed it keys the shuffle.

        Returns:
            ``size`` numbers for each batch, fewer in the last one.
        """
        order = list(range(len(self.lengths)))
        if self.shuffle:
            order = generator(self.seed, "shuffle", epoch).permutation(len(order)).tolist()
        if self.groups is not None:  # groups in the order of their first example
            order = [i for group in _grouped(order, self.groups) for i in group]
        return [order[i : i + self.size] for i in range(0, len(order), self.size)]


def _grouped(indices: Iterable[int], keys: Sequence[Hashable]) -> list[list[int]]:
    """Examples of one key together, keys and examples in the given order."""
    members: dict[Hashable, list[int]] = {}
    for i in indices:
        members.setdefault(keys[i], []).append(i)
    return list(members.values())


def rank_share(
    indices: Sequence[int],
    lengths: Sequence[int],
    rank: int,
    world_size: int,
    groups: Sequence[int] | None = None,
) -> list[int]:
    """This rank's part of a global batch: every ``world_size``-th example (or group of examples) in order of length.

    The union over ranks is the batch, without repeats; a rank can get nothing when the batch is smaller than the world.

    Args:
        indices: example numbers of the batch.
        lengths: tokens of every example of the data.
        rank, world_size: which share of how many.
        groups: group of every example of the data; a group is not divided. None: each example alone.

    Returns:
        Example numbers, shortest first (groups by their sum).
    """
    ordered = sorted(indices, key=lambda i: (lengths[i], i))
    if groups is None:
        return ordered[rank::world_size]
    by_length = sorted(_grouped(ordered, groups), key=lambda group: (sum(lengths[i] for i in group), group[0]))
    return [i for group in by_length[rank::world_size] for i in group]


def mismatched(prompts: Sequence[Hashable]) -> list[int | None]:
    """Pair every example with one of another prompt: its partner's number, or None where there is no other prompt.

    With different prompts this is the rotation by one that KTO's reference point wants: example i meets the completion
    of example i - 1. Where prompts repeat, examples are ordered by prompt (first seen first) and rotated by the size of
    the largest group, so that every completion still serves once; when one prompt has more than half of the batch, the
    examples that would meet their own prompt have no partner.

    Args:
        prompts: prompt of every example, in the order of the global batch.

    Returns:
        For each example the number of the one whose completion it meets, or None.
    """
    groups = _grouped(range(len(prompts)), prompts)
    order = [i for group in groups for i in group]
    shift = max(map(len, groups), default=0)
    partners: list[int | None] = [None] * len(prompts)
    for place, i in enumerate(order):
        partner = order[(place - shift) % len(order)]
        partners[i] = partner if prompts[partner] != prompts[i] else None
    return partners


@dataclass(frozen=True)
class Position:
    """Where in the data a run stands: the next batch to train on."""

    epoch: int = 0
    """Passes over the data that are complete."""
    batch: int = 0
    """Batches of the current pass that are complete."""


@dataclass(frozen=True)
class StepBatch:
    """This rank's share of one global batch."""

    examples: tuple[Completion, ...]
    """The rank's examples; may be empty when the global batch is smaller than the world."""
    indices: tuple[int, ...]
    """Number of each example in the data set: keys the randomness of whatever is sampled for it."""
    dummy: Completion
    """Stands in for this rank when others have more micro-batches."""
    next_position: Position
    """Where the data stands once this batch has been trained on."""
    peers: tuple[Completion, ...] = ()
    """All examples of the global batch, in the plan's order: the same on every rank."""
    places: tuple[int, ...] = ()
    """Position of each of this rank's examples among the peers."""


@dataclass(eq=False)
class StepLoader:
    """Iterates one pass over the data from the position the run stands at.

    There are no worker processes: examples are tokenised once at start-up, and grouping them costs nothing. Iteration
    reads the position through ``position`` each time, so the training module is the only place that knows how far the
    run has come, and prefetching can neither skip nor repeat a batch.

    Raises:
        ConfigError: on iteration, when the position lies beyond the epoch: the data or the batch size has changed.
    """

    examples: Sequence[Completion]
    """The data set."""
    plan: BatchPlan
    """The batches of each epoch."""
    _: KW_ONLY
    rank: int = 0
    """Which share to deliver."""
    world_size: int = 1
    """Number of shares."""
    position: Callable[[], Position] = Position
    """Returns where to start."""
    limit: float = 1.0
    """How much of a pass counts as all of it: a number of batches, or a share of them (the Trainer's
    ``limit_train_batches``). The pass after it starts afresh."""

    def __post_init__(self) -> None:
        shortest = min(self.examples, key=lambda example: (not len(example.token_ids), example.size, example.id))
        if not len(shortest.token_ids):  # prompts to sample from; a dummy batch needs a target all the same
            shortest = replace(shortest, token_ids=shortest.prompt_ids[-1:], step_ends=np.array([1]))
        self._dummy = shortest

    def __len__(self) -> int:
        return self.plan.num_batches

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands; makes the loader resumable in Lightning's eyes.

        Returns:
            ``epoch`` and ``batch`` of the next batch to train on.
        """
        return asdict(self.position())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to do: the module restores the position, and iteration reads it from there."""

    def __iter__(self) -> Iterator[StepBatch]:
        start = self.position()
        batches = self.plan.batches(start.epoch)
        batches = batches[: self.limit if isinstance(self.limit, int) else int(self.limit * len(batches))]
        if start.batch >= len(batches):
            raise ConfigError(
                f"the run stands before batch {start.batch} of epoch {start.epoch}, and this data makes only "
                f"{len(batches)} batches: resume with the data and batch size that the checkpoint was made with"
            )
        for b in range(start.batch, len(batches)):
            last = b + 1 == len(batches)
            mine = rank_share(batches[b], self.plan.lengths, self.rank, self.world_size, self.plan.groups)
            place = {i: position for position, i in enumerate(batches[b])}
            yield StepBatch(
                tuple(self.examples[i] for i in mine),
                tuple(mine),
                self._dummy,
                Position(start.epoch + 1, 0) if last else Position(start.epoch, b + 1),
                peers=tuple(self.examples[i] for i in batches[b]),
                places=tuple(place[i] for i in mine),
            )
