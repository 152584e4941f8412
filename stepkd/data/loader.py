"""The loader: one item is one optimiser step's share of this rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from stepkd.data.batching import BatchPlan, rank_share
from stepkd.data.encode import Example
from stepkd.errors import ConfigError


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
