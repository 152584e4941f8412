"""One rank's side of a sharded, resumable job: the folder, the phases, and the two files at the end.

A job is a manifest (what decides the result), one or more phases (fixed lists of groups of items, each group appended
to the rank's shard as a whole), and at the end a file of rows and a summary. The ranks share a disk and nothing else:
whoever finds that no group is missing writes the end result, and everybody who does writes the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepkd.errors import DataError
from stepkd.evaluation.folder import SUMMARY_NAME
from stepkd.labels.folder import prepare_job_folder
from stepkd.labels.shards import Shards, work_through
from stepkd.runs.files import write_json, write_jsonl

Record = Mapping[str, Any]

Report = Callable[[str, int, int, Mapping[str, float]], None]
"""Called with the phase, items this rank has done, its items in all, and running figures."""

Figures = Callable[[Sequence[Record]], tuple[str, int, int]]
"""Of the records of a group: name of a running figure, its numerator and its denominator."""


@dataclass(eq=False)
class ShardedJob:
    """One rank's view of a job."""

    out: Path
    """The job's folder, on a disk that all ranks share."""
    rank: int = 0
    """This process among those at work; they need no process group."""
    world_size: int = 1
    """Number of these; a resumed job may have another."""
    launch: str | None = None
    """A word that the ranks of this launch share; see :func:`~stepkd.labels.folder.prepare_job_folder`."""
    overwrite: bool = False
    """Delete an earlier job in the folder when this one begins."""
    wait_s: float = 1800.0
    """Longest wait for other ranks without news (s)."""
    report: Report | None = None
    """Told of progress after every group."""
    say: Callable[[str], None] | None = None
    """Told what is waited for."""

    def __post_init__(self) -> None:
        self._shards: dict[str, Shards] = {}

    def begin(self, manifest: Mapping[str, Any]) -> None:
        """Make the folder ready, or find that it holds this job already.

        Raises:
            ConfigError: the folder holds another job (its settings are named), or something else.
            StepkdError: the folder cannot be written, or rank 0 does not come.
        """
        prepare_job_folder(
            self.out,
            manifest,
            rank=self.rank,
            world_size=self.world_size,
            launch=self.launch,
            overwrite=self.overwrite,
            wait_s=self.wait_s,
            say=self.say,
        )

    def work(
        self,
        phase: str,
        groups: Sequence[Sequence[int]],
        work: Callable[[Sequence[int]], Sequence[Record]],
        figures: Figures,
    ) -> None:
        """Do this rank's groups of a phase that nobody has done yet.

        Args:
            phase: its name; the shards are ``shards/<phase>-<rank>.jsonl``.
            groups: items of every group, the same on all ranks; a group is what a kill can lose.
            work: items of a group to one record per item, with ``id`` and ``index``.
            figures: what is reported beside the progress.
        """
        shards = self._phase(phase)
        mine = range(self.rank, len(groups), self.world_size)
        total, finished = sum(len(groups[number]) for number in mine), shards.finished()
        done = sum(len(groups[number]) for number in mine if number in finished)
        good = seen = 0

        def report(rows: Sequence[Record]) -> None:
            nonlocal done, good, seen
            name, more_good, more_seen = figures(rows)
            done, good, seen = done + len(rows), good + more_good, seen + more_seen
            if self.report is not None:
                self.report(phase, done, total, {name: good / seen} if seen else {})

        work_through(shards, groups, work, rank=self.rank, world_size=self.world_size, report=report)

    def wait(self, phase: str, groups: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
        """All records of a phase, waiting for the other ranks' groups; sorted by ``index``.

        Raises:
            StepkdError: the others do not come.
        """
        return self._phase(phase).wait(len(groups), self.world_size, timeout_s=self.wait_s, say=self.say)

    def records(self, phase: str, groups: Sequence[Sequence[int]]) -> list[dict[str, Any]] | None:
        """All records of a phase, sorted by ``index``; None while groups of other ranks are missing."""
        records = self._phase(phase).rows()
        return None if len({record["batch"] for record in records}) < len(groups) else records

    def write(self, name: str, rows: Iterable[Record], summary: Mapping[str, Any], *, refuse: str | None) -> None:
        """Write the summary and the rows; every rank that gets here writes the same.

        Args:
            name: file of the rows.
            rows: what the job made.
            summary: counts, for ``summary.json``.
            refuse: why there are no rows to write; None: there are some.

        Raises:
            DataError: ``refuse``, after the summary was written.
        """
        write_json(self.out / SUMMARY_NAME, summary)
        if refuse is not None:
            raise DataError(refuse, path=self.out)
        write_jsonl(self.out / name, rows)

    def _phase(self, phase: str) -> Shards:
        return self._shards.setdefault(phase, Shards(self.out, phase, rank=self.rank))
