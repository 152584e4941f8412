"""The shards of a labelling job: every rank appends to a file of its own, and reads everybody's.

A phase of the job is a fixed list of groups of items. Rank r works on the groups r, r + world size, ..., so which group
belongs to whom depends on nothing but its number, and a group is what a kill can lose. What is done is the union of all
files there are, whatever number of ranks wrote them; no rank talks to another.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stepkd.errors import DataError, StepkdError
from stepkd.evaluation.store import ResultStore, read_rows

SHARD_FOLDER = "shards"

Say = Callable[[str], None]


class Shards:
    """The shards of one phase.

    Args:
        folder: the job's folder.
        phase: name of the phase; the files are ``shards/<phase>-<rank>.jsonl``.
        rank: whose file is written.
    """

    def __init__(self, folder: str | Path, phase: str, *, rank: int = 0) -> None:
        self.folder = Path(folder) / SHARD_FOLDER
        self.phase = phase
        self.rank = rank
        self._read: dict[Path, tuple[int, list[dict[str, Any]]]] = {}

    def path(self, rank: int) -> Path:
        """The file of a rank."""
        return self.folder / f"{self.phase}-{rank}.jsonl"

    def writer(self) -> ResultStore:
        """Open this rank's file for appending; closes with the ``with`` block.

        Raises:
            StepkdError: another process is this rank of the same job.
        """
        return ResultStore(self.path(self.rank))

    def rows(self) -> list[dict[str, Any]]:
        """Rows of all finished groups in all files, sorted by ``index``; an item that two files hold counts once.

        Raises:
            DataError: a damaged file.
        """
        rows: dict[int, dict[str, Any]] = {}
        for path in sorted(self.folder.glob(f"{self.phase}-*.jsonl")):
            size = path.stat().st_size
            if path not in self._read or self._read[path][0] != size:
                self._read[path] = (size, self._rows_of(path))
            for row in self._read[path][1]:
                rows.setdefault(row["index"], row)
        return [rows[index] for index in sorted(rows)]

    @staticmethod
    def _rows_of(path: Path) -> list[dict[str, Any]]:
        try:
            return read_rows(path)
        except DataError:
            # Its owner may just now have cut off what a kill left at its end; real damage is there the second time.
            time.sleep(0.1)
            return read_rows(path)

    def finished(self) -> frozenset[int]:
        """Numbers of the groups that are complete in some file."""
        return frozenset(row["batch"] for row in self.rows())

    def wait(
        self, groups: int, world_size: int, *, timeout_s: float, say: Say | None = None, poll_s: float = 0.2
    ) -> list[dict[str, Any]]:
        """Wait until all groups are finished, by whichever rank.

        Args:
            groups: number of groups of the phase.
            world_size: number of ranks at work, to say for whom this one waits.
            timeout_s: longest time without a new group (s); 0 does not wait.
            say: told once for whom this rank waits.
            poll_s: first time between two looks (s); doubles up to 10 s.

        Returns:
            All rows of the phase.

        Raises:
            StepkdError: no new group for ``timeout_s``.
        """
        seen, since = -1, time.monotonic()
        while True:
            finished = self.finished()
            missing = [number for number in range(groups) if number not in finished]
            if not missing:
                return self.rows()
            owners = sorted({number % world_size for number in missing})
            whom = f"rank{'s' if len(owners) > 1 else ''} {', '.join(map(str, owners))}"
            if say is not None and seen < 0:
                say(f"rank {self.rank} has finished its {self.phase} and waits for {whom}")
            if len(finished) != seen:
                seen, since = len(finished), time.monotonic()
            if time.monotonic() - since >= timeout_s:
                raise StepkdError(
                    f"rank {self.rank} waits for {len(missing)} of {groups} groups of {self.phase}, which belong to "
                    f"{whom}, and nothing new came for {timeout_s:g} s. What is done is kept: give the same command "
                    "again, with any number of processes, or wait longer (--wait)"
                )
            time.sleep(min(poll_s, timeout_s))
            poll_s = min(2 * poll_s, 10.0)


def work_through(
    shards: Shards,
    groups: Sequence[Sequence[int]],
    work: Callable[[Sequence[int]], Sequence[Mapping[str, Any]]],
    *,
    rank: int,
    world_size: int,
    report: Callable[[Sequence[Mapping[str, Any]]], None] | None = None,
) -> None:
    """Do this rank's groups that nobody has done yet, one durable append per group.

    Args:
        shards: where results go.
        groups: items of every group of the phase, the same on all ranks.
        work: items of a group -> one row per item, with ``id`` and ``index``.
        rank, world_size: which groups are this rank's: those whose number modulo ``world_size`` is ``rank``.
        report: called after each group with its rows.
    """
    finished = shards.finished()
    todo = [number for number in range(rank, len(groups), world_size) if number not in finished]
    if not todo:
        return
    with shards.writer() as store:
        for number in todo:
            rows = work(groups[number])
            store.append_batch(number, rows)
            if report is not None:
                report(rows)
