"""Which examples form a batch: one plan per epoch, the same on every rank, resumable anywhere; and the loader of it.

One batch is one optimiser step's worth of examples over all ranks. The plan depends only on (seed, epoch) and the
lengths, so a run can stop after any batch and go on there. Inside a batch, examples are sorted by length before they
are dealt to ranks and cut into micro-batches: padding is small, ranks get similar work, and, because losses are
normalised over the whole batch, none of this changes a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from stepkd.data.encode import Example
from stepkd.errors import ConfigError
from stepkd.randomness import generator


class BatchPlan:
    """Order and grouping of examples, epoch by epoch.

    Args:
        lengths: tokens of every example, each >= 1.
        size: global batch size in ``unit``.
        unit: ``sequences``, or ``tokens`` (prompt + completion, without padding): a batch takes examples until the next
            one would exceed ``size``, and holds at least one.
        seed: seed of the shuffle.
        shuffle: keep file order when False.
        groups: group of every example; examples of a group stay together.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        size: int,
        unit: Literal["sequences", "tokens"] = "sequences",
        seed: int = 0,
        shuffle: bool = True,
        groups: Sequence[int] | None = None,
    ) -> None:
        if unit not in ("sequences", "tokens"):
            raise ConfigError(f"batch unit {unit!r}: must be 'sequences' or 'tokens'")
        if size < 1:
            raise ConfigError(f"global batch size {size}: must be at least 1")
        if not len(lengths):
            raise ConfigError("there are no examples to form batches of")
        if groups is not None and len(groups) != len(lengths):
            raise ValueError(f"{len(groups)} groups for {len(lengths)} examples")
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.size = size
        self.unit = unit
        self.seed = seed
        self.shuffle = shuffle
        self.groups = groups

    @property
    def num_batches(self) -> int | None:
        """Batches per epoch; None in token units, where it varies with the shuffle."""
        if self.unit == "tokens":
            return None
        full, rest = divmod(len(self.lengths), self.size)
        return full + (1 if rest else 0)

    def batches(self, epoch: int) -> list[list[int]]:
        """Example numbers of every global batch of an epoch, every example exactly once."""
        order = np.arange(len(self.lengths))
        if self.shuffle:
            order = generator(self.seed, "shuffle", epoch).permutation(order)
        if self.groups is not None:
            order = self._grouped(order)
        return self._group(order)

    def _grouped(self, order: np.ndarray) -> np.ndarray:
        """Groups in the order of their first example, examples within a group in the given order."""
        assert self.groups is not None
        members: dict[int, list[int]] = {}
        for i in order.tolist():
            members.setdefault(self.groups[i], []).append(i)
        return np.array([i for group in members.values() for i in group], dtype=np.int64)

    def _group(self, order: np.ndarray) -> list[list[int]]:
        if self.unit == "sequences":
            return [order[i : i + self.size].tolist() for i in range(0, len(order), self.size)]
        batches: list[list[int]] = []
        tokens = 0
        for i in order.tolist():
            if not batches or tokens + self.lengths[i] > self.size:
                batches.append([])
                tokens = 0
            batches[-1].append(i)
            tokens += int(self.lengths[i])
        return batches


def rank_share(
    indices: Sequence[int],
    lengths: Sequence[int],
    rank: int,
    world_size: int,
    groups: Sequence[int] | None = None,
) -> list[int]:
    """This rank's part of a global batch: every ``world_size``-th example (or group of examples) in order of length.

    The union over ranks is the batch, without repeats; a rank can get nothing when the batch is smaller than the world.
    """
    if groups is None:
        return sorted(indices, key=lambda i: (lengths[i], i))[rank::world_size]
    members: dict[int, list[int]] = {}
    for i in sorted(indices, key=lambda i: (lengths[i], i)):
        members.setdefault(groups[i], []).append(i)
    by_length = sorted(members.values(), key=lambda group: (sum(lengths[i] for i in group), group[0]))
    return [i for group in by_length[rank::world_size] for i in group]


def mismatched(prompts: Sequence[Hashable]) -> list[int | None]:
    """Pair every example with one of another prompt: its partner's number, or None where there is no other prompt.

    With different prompts this is the rotation by one that KTO's reference point wants: example i meets the completion
    of example i - 1. Where prompts repeat, examples are ordered by prompt (first seen first) and rotated by the size of
    the largest group, so that every completion still serves once; when one prompt has more than half of the batch, the
    examples that would meet their own prompt have no partner.

    Args:
        prompts: prompt of every example, in the order of the global batch.
    """
    members: dict[Hashable, list[int]] = {}
    for i, prompt in enumerate(prompts):
        members.setdefault(prompt, []).append(i)
    order = [i for group in members.values() for i in group]
    shift = max(map(len, members.values()), default=0)
    partners: list[int | None] = [None] * len(prompts)
    for place, i in enumerate(order):
        partner = order[(place - shift) % len(order)]
        partners[i] = partner if prompts[partner] != prompts[i] else None
    return partners


def micro_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Cut examples into micro-batches of at most ``max_tokens`` tokens, padding included.

    Args:
        lengths: tokens of each example.
        max_tokens: rows times longest row of a micro-batch stays within this; an example longer than the budget gets a
            micro-batch of its own.

    Returns:
        Positions in ``lengths``, longest first, so that the largest micro-batch comes first and memory trouble shows at
        the first step.
    """
    if max_tokens < 1:
        raise ConfigError(f"micro_batch_tokens={max_tokens}: must be at least 1")
    groups: list[list[int]] = []
    longest = 0
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if not groups or (len(groups[-1]) + 1) * longest > max_tokens:
            groups.append([])
            longest = max(lengths[i], 1)
        groups[-1].append(i)
    return groups


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

    examples: tuple[Example, ...]
    """The rank's examples; may be empty when the global batch is smaller than the world."""
    indices: tuple[int, ...]
    """Number of each example in the data set: keys the randomness of whatever is sampled for it."""
    filler: Example
    """Stands in for this rank when others have more micro-batches."""
    next_position: Position
    """Where the data stands once this batch has been trained on."""
    peers: tuple[Example, ...] = ()
    """All examples of the global batch, in the plan's order: the same on every rank."""
    places: tuple[int, ...] = ()
    """Position of each of this rank's examples among the peers."""


class StepLoader:
    """Iterates one pass over the data from the position the run stands at.

    There are no worker processes: examples are tokenised once at start-up, and grouping them costs nothing. Iteration
    reads the position through ``position`` each time, so the training module is the only place that knows how far the
    run has come, and prefetching can neither skip nor repeat a batch.

    Args:
        examples: the data set.
        plan: the batches of each epoch.
        rank, world_size: which share to deliver.
        position: returns where to start.
        limit: how much of a pass counts as all of it: a number of batches, or a share of them (the Trainer's
            ``limit_train_batches``). The pass after it starts afresh.

    Raises:
        ConfigError: on iteration, when the position lies beyond the epoch: the data or the batch size has changed.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        plan: BatchPlan,
        *,
        rank: int = 0,
        world_size: int = 1,
        position: Callable[[], Position] = Position,
        limit: float = 1.0,
    ) -> None:
        self.examples = examples
        self.plan = plan
        self.rank = rank
        self.world_size = world_size
        self.position = position
        self.limit = limit
        shortest = min(examples, key=lambda example: (not example.completion_ids, example.length, example.id))
        if not shortest.completion_ids:  # prompts to sample from; a dummy batch needs a target all the same
            shortest = replace(shortest, completion_ids=shortest.prompt_ids[-1:], spans=((0, 1),))
        self._filler = shortest

    def __len__(self) -> int:
        if self.plan.num_batches is None:
            raise TypeError("batches measured in tokens: their number is known only epoch by epoch")
        return self.plan.num_batches

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands; makes the loader resumable in Lightning's eyes."""
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
            mine = rank_share(
                batches[b],
                self.plan.lengths,  # type: ignore[arg-type]
                self.rank,
                self.world_size,
                self.plan.groups,
            )
            place = {i: position for position, i in enumerate(batches[b])}
            yield StepBatch(
                tuple(self.examples[i] for i in mine),
                tuple(mine),
                self._filler,
                Position(start.epoch + 1, 0) if last else Position(start.epoch, b + 1),
                peers=tuple(self.examples[i] for i in batches[b]),
                places=tuple(place[i] for i in mine),
            )
