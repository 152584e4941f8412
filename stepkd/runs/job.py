"""Jobs: long work that fills a folder, unit by unit, and that any number of processes share.

A job's folder holds

- ``settings.json``: the kind of the job and everything that decides its result; another job, or the same one under
  other settings, is refused with the difference named;
- ``parts/PHASE/KEY.jsonl``: the rows of one unit of work, written as a whole when the unit is done, so that a file that
  is there is a unit that is done (:meth:`Job.missing` is the one place that decides this);
- ``config.yaml``: the command's settings as given, to start it again with ``--config``; they are not compared;
- the job's outputs, merged from the parts when none is missing;
- ``log/rank-N.jsonl``: when and where each unit was done. Times and names of machines stand here and nowhere else.

A job has one or more phases, each a fixed list of units; what is done of a unit depends on nothing but the settings and
the unit. Rank r of n works on the units r, r + n, ... that are missing. Ranks share a disk and nothing else: none talks
to another, whoever finds nothing missing writes the outputs, and two that do write the same bytes. A killed job loses
the units in flight; the same command, with any number of ranks, does what is missing.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Self, TypeVar

import stepkd
from stepkd.errors import ConfigError, DataError, StepkdError, check_bounds
from stepkd.runs.files import delete, json_text, write_file, write_json, write_jsonl
from stepkd.runs.launcher import check_launch, rank_device
from stepkd.runs.process import check_unused, this_process
from stepkd.runs.progress import WorkLine, metric
from stepkd.safe import refuse_credentials
from stepkd.yaml_files import as_yaml, yaml_text

SETTINGS_NAME, SUMMARY_NAME, RESULTS_NAME = "settings.json", "summary.json", "results.jsonl"
CONFIG_NAME = "config.yaml"
REPORT_NAME = "report.html"
"""The page that ``stepkd report`` may leave in any job's folder."""
PARTS, LOG = "parts", "log"
PACKAGES = ("torch", "transformers", "peft", "math-verify")
"""Packages whose versions can change a job's result."""
ABSENT = "(absent)"
"""The value of a setting that only the other side has."""
_RUNNING = "running.json"

Row = Mapping[str, Any]
U = TypeVar("U")

Report = Callable[[str, int, int, Mapping[str, float]], None]
"""Called with the phase, how far this rank is, its work in all, and running figures; a unit that is a list counts as
many as it holds, any other counts 1."""
Figures = Callable[[Sequence[Row]], Mapping[str, tuple[float, float | None]]]
"""Rows of a unit to running figures: name -> (numerator, denominator), summed over the units; None stands for the
unit's seconds. They go to the progress line and to the log."""


@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """How this process takes part in a job; nothing here changes the result."""

    rank: int = 0
    """This process among those at work, from 0; they need no process group."""
    world_size: int = 1
    """Number of processes at work; a resumed job may have another."""
    overwrite: bool = False
    """Delete an earlier job of this kind in the folder first; one process only."""
    wait_s: float = 1800.0
    """Longest wait for other ranks without news, in seconds."""
    report: Report | None = None
    """Told of progress after every unit."""
    console: Any = None
    """The rich console that progress is shown on; None: nothing is said."""
    config: Mapping[str, Any] | None = None
    """Settings of the command, written beside the result as ``config.yaml``; they are not compared on resume."""

    def say(self, *lines: str) -> None:
        """Print lines as they are, whatever their length; none for an empty one."""
        for line in filter(None, lines if self.console is not None else ()):
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def share_is_done(self, what: str) -> int:
        """Say that other ranks have work left, and give the exit code."""
        self.say(f"rank {self.rank} has done its share; the last rank to finish writes the {what}")
        return 0


ALONE = JobOptions()
"""One process that does all units, resumes what it finds, and says nothing."""


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """Settings that every job of the command line has; a job's own settings are a subclass."""

    out: str
    """Folder of the job: its settings, parts and results; a folder that holds this job is resumed."""
    overwrite: bool = False
    """Delete an earlier job of this kind in ``out`` and start again; one process only."""
    wait_s: float = 1800.0
    """Longest wait for other processes of the job without news, in seconds, 0 or more; half an hour is longer than
    any unit should take."""
    device: str = "auto"
    """Where models compute: ``cpu``, ``cuda``, ``cuda:N``, or ``auto``, which takes a GPU for every process where there
    is one."""

    def __post_init__(self) -> None:
        check_bounds("", self, wait_s="[0, inf)")

    def start(self, verbs: Mapping[str, str]) -> tuple[Self, JobOptions]:
        """Look at the launch and begin to report progress on a console.

        Args:
            verbs: what the progress line says in every phase; its name where none is given.

        Returns:
            The same settings with this process's device, and how it takes part.

        Raises:
            ConfigError: a launch that cannot work.
        """
        from rich.console import Console

        from stepkd.runs.process import quiet_libraries

        quiet_libraries()
        console, launch = Console(), check_launch()
        rank = f"rank {launch.rank}: " if launch.world_size > 1 else ""
        line = WorkLine(console, redraw=launch.world_size == 1)

        def report(phase: str, done: int, total: int, figures: Mapping[str, float]) -> None:
            shown = "".join(
                f"  {metric(name, value)} {name}" if name.endswith("/s") else f"  {name} {value:.1%}"
                for name, value in figures.items()
            )
            line.work(f"{rank}{verbs.get(phase, phase)}", done, total, shown)

        options = JobOptions(
            rank=launch.rank,
            world_size=launch.world_size,
            overwrite=self.overwrite,
            wait_s=self.wait_s,
            report=report,
            console=console,
            config=as_yaml(self),
        )
        return replace(self, device=rank_device(self.device, launch)), options


@dataclass(eq=False)
class Job:
    """One rank's view of a job.

    Raises (every method that writes):
        MachineError: a failed write (disk full, quota, permissions); every finished unit is intact.
    """

    out: Path
    """The folder, on a disk that all ranks share."""
    kind: str
    """What the job is, a noun for messages and settings: ``evaluation``, ``labelling job``."""
    outputs: Sequence[str] = ()
    """Names of the files and folders that the job leaves beside its settings and parts; absolute paths for others."""
    options: JobOptions = ALONE
    """How this process takes part."""

    # ---- the folder ------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Refuse a folder that cannot take this job, before anything slow and without changing anything.

        Raises:
            ConfigError: not a folder, files of something else in it, a job of another kind, or (``overwrite``) more
                than such a job in it, or several processes; or another one is at work there (:meth:`alone`).
        """
        if self.options.overwrite and self.options.world_size > 1:
            raise ConfigError(
                f"--overwrite is for one process, and {self.options.world_size} are started: delete {self.out} first"
            )
        if self.out.exists() and not self.out.is_dir():
            raise ConfigError(f"--out {self.out} is a file: give a folder")
        with contextlib.suppress(OSError, ValueError, KeyError):
            check_unused(self.out, json.loads((self.out / LOG / _RUNNING).read_bytes()))
        names = sorted(path.name for path in self.out.iterdir()) if self.out.is_dir() else []
        own = {SETTINGS_NAME, CONFIG_NAME, REPORT_NAME, PARTS, LOG, *self.outputs}
        foreign = [name for name in names if name not in own and not name.endswith(".tmp")]
        if SETTINGS_NAME not in names:
            if found := foreign or [name for name in names if name in own - {LOG}]:
                raise ConfigError(
                    f"{self.out} is not empty ({some(found)}) and holds no {self.kind} (no {SETTINGS_NAME}): give "
                    "another --out"
                )
        elif (kind := read_settings(self.out)["kind"]) != self.kind:
            raise ConfigError(f"{self.out} holds another kind of job ({kind}), not {_a(self.kind)}: give another --out")
        elif self.options.overwrite and foreign:
            raise ConfigError(
                f"{self.out} holds more than {_a(self.kind)} ({some(foreign)}), so --overwrite does not touch it: "
                "move those files away, or give another --out"
            )

    def begin(self, settings: Mapping[str, Any], *, free: Iterable[str] = ()) -> dict[str, Any]:
        """Make the folder ready: begin the job, resume it, or (``overwrite``) delete an earlier one first.

        Args:
            settings: everything that decides the result, JSON values; the kind is added.
            free: settings (dotted names, or groups of them) that may differ from those of an earlier start.

        Returns:
            The settings that the folder holds.

        Raises:
            ConfigError: the folder holds something else, or the job under other settings (they are named); or a
                setting holds a credential.
        """
        refuse_credentials(flat(settings) | flat(self.options.config or {}))
        self.check()
        wanted = json.loads(json_text({"kind": self.kind, **settings}, path=self.out / SETTINGS_NAME))
        if self.options.overwrite:  # the settings go last: a kill in between leaves what --overwrite still accepts
            own = (self.out / name for name in (*self.outputs, CONFIG_NAME, REPORT_NAME, PARTS, LOG, SETTINGS_NAME))
            for path in (*self.out.glob(".*.tmp"), *own):
                delete(path)
        if (self.out / SETTINGS_NAME).is_file():
            found = read_settings(self.out)
            check_same(found, wanted, self.out, free=free)
        else:
            found = wanted
            write_json(self.out / SETTINGS_NAME, wanted)
        if self.options.config is not None:
            again = {name: value for name, value in self.options.config.items() if name != "overwrite"}
            text = yaml_text(again)  # what repeats a command must not delete what it did
            write_file(self.out / CONFIG_NAME, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))
        self._log({"event": "start", "command": shlex.join(sys.argv), **this_process()})
        return dict(found)

    def settled(self, name: str, measure: Callable[[], Any]) -> Any:
        """A setting that the machine decides, once for the whole job: rank 0 measures it at the first start, and other
        ranks and later starts take it from the folder's settings.

        Args:
            name: its dotted name among the settings that :meth:`begin` is given.
            measure: decides it.

        Returns:
            Its value, a JSON value; None where the folder's settings have none.

        Raises:
            StepkdError: rank 0 left no settings for ``wait_s``.
        """
        settings = self.out / SETTINGS_NAME
        if self.options.rank == 0 and (self.options.overwrite or not settings.is_file()):
            found = measure()
            self._log({"event": "measured", name: found})
            return found
        waits = f"rank {self.options.rank} waits for what rank 0 measures ({name})"
        self._await(settings.is_file, lambda: waits, waits)
        return flat(read_settings(self.out)).get(name)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Have :meth:`check` keep other processes out while a block works: units that train share more than parts."""
        mark = self.out / LOG / _RUNNING
        write_json(mark, this_process())
        try:
            yield
        finally:
            mark.unlink(missing_ok=True)

    # ---- units -----------------------------------------------------------------------------------------------------

    def missing(self, phase: str, units: Iterable[str]) -> list[str]:
        """The units of a phase that nobody has done yet, in their order: those without a part."""
        folder = self.out / PARTS / phase
        done = {path.stem for path in folder.iterdir() if path.suffix != ".tmp"} if folder.is_dir() else set()
        return [key for key in units if key not in done]

    def work(
        self, phase: str, units: Mapping[str, U], do: Callable[[U], Sequence[Row]], figures: Figures | None = None
    ) -> None:
        """Do this rank's units of a phase that nobody has done yet.

        Args:
            phase: its name, that of a folder.
            units: every unit of the phase by its key, the same and in the same order on all ranks.
            do: a unit to its rows, at least one, JSON values; they depend on nothing but the settings and the unit.
            figures: running figures for the progress line.

        Raises:
            DataError: a row that JSON cannot hold.
        """

        def write(unit: U, path: Path) -> None:
            rows = do(unit)
            assert rows, f"the unit {path} left no row, and a part without rows counts as damaged"
            write_jsonl(path, rows)

        self.work_files(phase, units, write, ".jsonl", figures)

    def work_files(
        self,
        phase: str,
        units: Mapping[str, U],
        write: Callable[[U, Path], object],
        suffix: str,
        figures: Figures | None = None,
    ) -> None:
        """:meth:`work` for parts in another format: ``write`` is given the unit and the path of its part."""
        mine = list(units)[self.options.rank :: self.options.world_size]
        todo = self.missing(phase, mine)
        sizes = {key: len(unit) if isinstance(unit := units[key], list) else 1 for key in mine}
        total = sum(sizes.values())
        done = total - sum(sizes[key] for key in todo)
        sums: dict[str, tuple[float, float]] = {}
        for key in todo:
            start = time.perf_counter()
            path = self.part(phase, key, suffix)
            write(units[key], path)
            seconds = time.perf_counter() - start
            found = figures(_read_part(path)) if figures else {}
            pairs = {name: (more, seconds if of is None else of) for name, (more, of) in found.items()}
            entry = {name: round(more / of, 4) for name, (more, of) in pairs.items() if of}
            self._log({"phase": phase, "unit": key, "seconds": round(seconds, 3), **entry})
            done += sizes[key]
            for name, (more, of) in pairs.items():
                good, seen = sums.get(name, (0.0, 0.0))
                sums[name] = (good + more, seen + of)
            if self.options.report is not None:
                shown = {name: good / seen for name, (good, seen) in sums.items() if seen}
                self.options.report(phase, done, total, shown)

    def once(
        self, phase: str, key: str, do: Callable[[], Row], *, inputs: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Do one unit unless it is done, and give what it left.

        Args:
            phase, key: which unit.
            do: does it; returns facts about the result, JSON values.
            inputs: fingerprints of what it works from, kept beside the facts; None: nothing to compare.

        Returns:
            The facts.

        Raises:
            ConfigError: the unit was done from other inputs (they are named).
        """
        path = self.part(phase, key)
        if self.missing(phase, [key]):
            self.work(phase, {key: None}, lambda _: [{"inputs": dict(inputs or {}), "facts": do()}])
        (record,) = _read_part(path)
        wanted = record["inputs"] if inputs is None else json.loads(json_text(dict(inputs)))
        if found := differences(record["inputs"], wanted):
            raise ConfigError(
                f"{path} is finished, and what it was made from has changed since:\n{_then_and_now(found)}\nPut the "
                "files back, or start again with another --out (or --overwrite)."
            )
        return dict(record["facts"])

    def facts(self, phase: str, key: str) -> dict[str, Any] | None:
        """What :meth:`once` left of a unit; None: it is not done. Nothing is written."""
        rows = self.rows(phase, [key])
        return None if rows is None else dict(rows[0]["facts"])

    def rows(self, phase: str, units: Iterable[str]) -> list[dict[str, Any]] | None:
        """All rows of a phase, by their ``index`` where they have one; None while a unit is missing."""
        units = list(units)
        if self.missing(phase, units):
            return None
        return _merged(self.part(phase, key) for key in units)

    def wait(self, phase: str, units: Iterable[str]) -> list[dict[str, Any]]:
        """All rows of a phase, waiting for the other ranks' units.

        Raises:
            StepkdError: no unit became ready for ``wait_s``.
        """
        units = list(units)

        def whom() -> str:
            ranks = sorted({units.index(key) % self.options.world_size for key in self.missing(phase, units)})
            return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"

        self._await(
            lambda: not self.missing(phase, units),
            lambda: f"rank {self.options.rank} has finished its {phase} and waits for {whom()}",
            f"rank {self.options.rank} waits for units of {phase}",
            lambda: len(self.missing(phase, units)),
        )
        return self.rows(phase, units) or []

    def part(self, phase: str, key: str, suffix: str = ".jsonl") -> Path:
        """The file that a unit leaves when it is done."""
        return self.out / PARTS / phase / f"{key}{suffix}"

    # ---- outputs ---------------------------------------------------------------------------------------------------

    def finish(self, name: str, rows: Iterable[Row], summary: Mapping[str, Any]) -> None:
        """Write a file of rows and ``summary.json``, and tidy up; every rank that gets here writes the same bytes."""
        write_jsonl(self.out / name, rows)
        write_json(self.out / SUMMARY_NAME, summary)
        self.tidy()

    def tidy(self) -> None:
        """Delete what processes left that were killed while they wrote; nobody writes when no unit is missing."""
        for path in (self.out / PARTS).rglob(".*.tmp"):
            path.unlink(missing_ok=True)

    def _log(self, entry: Mapping[str, Any]) -> None:
        path = self.out / LOG / f"rank-{self.options.rank}.jsonl"
        now = datetime.now(UTC).isoformat(timespec="seconds")
        with contextlib.suppress(OSError):  # a full disk is reported where a result is lost, not here
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "a", encoding="utf-8") as stream:
                stream.write(json_text({"time": now, **entry}) + "\n")

    def _await(
        self,
        ready: Callable[[], bool],
        line: Callable[[], str],
        failure: str,
        news: Callable[[], Any] = lambda: None,
    ) -> None:
        """Wait until something is there; give up after ``wait_s`` without news."""
        seen, since, pause, told = news(), time.monotonic(), 0.1, False
        while not ready():
            if (now := news()) != seen:
                seen, since = now, time.monotonic()
            if time.monotonic() - since >= self.options.wait_s:
                raise StepkdError(
                    f"{failure} in {self.out}, and nothing new came for {self.options.wait_s:g} s: are all ranks "
                    "running, on the same disk? What is done is kept: give the same command again, with any number of "
                    "processes, or wait longer (--wait_s)"
                )
            if not told:
                self.options.say(line())
                told = True
            time.sleep(min(pause, self.options.wait_s))
            pause = min(2 * pause, 10.0)


def numbered(groups: Sequence[U]) -> dict[str, U]:
    """Units by their number, in order: ``000000``, ``000001``, ..."""
    return {f"{number:06d}": group for number, group in enumerate(groups)}


def package_versions() -> dict[str, str]:
    """Versions of stepkd and of the packages that touch results."""
    return {"stepkd": stepkd.__version__, **{name: metadata.version(name) for name in PACKAGES}}


def read_settings(folder: str | Path, name: str = SETTINGS_NAME) -> dict[str, Any]:
    """``settings.json`` of a job's folder, or the file of that name that a job left beside its result.

    Raises:
        DataError: none there, or damaged.
    """
    path = Path(folder) / name
    try:
        settings = json.loads(path.read_bytes())
        settings["kind"]
    except OSError as error:
        raise DataError(
            f"no settings of a job there ({error.strerror}): is this the --out of a job?", path=path
        ) from error
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"not the settings of a job ({error}): give another --out", path=path) from error
    return dict(settings)


def finished_rows(folder: str | Path, phase: str) -> list[dict[str, Any]]:
    """All rows of a phase of a finished job, by their ``index`` where they have one.

    Raises:
        DataError: a damaged part.
    """
    return _merged(sorted((Path(folder) / PARTS / phase).glob("*.jsonl")))


def read_results(folder: str | Path) -> list[dict[str, Any]]:
    """The rows that a job left in ``results.jsonl``; while it is not finished, those of its parts so far.

    Raises:
        DataError: there are none, or they are damaged.
    """
    path = Path(folder) / RESULTS_NAME
    rows = _read_part(path) if path.is_file() else _merged((Path(folder) / PARTS).glob("*/*.jsonl"))
    if not rows:
        raise DataError("no results there: is this the --out of a job, and is it finished?", path=path)
    return rows


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested settings as dotted names and plain values; of a list of groups, each by its number."""
    if isinstance(value, list | tuple):
        value = dict(enumerate(value)) if any(isinstance(item, Mapping) for item in value) else list(value)
    if not isinstance(value, Mapping) or (not value and name):
        return {name: value}
    found: dict[str, Any] = {}
    for key, item in value.items():
        found |= flat(item, f"{name}.{key}" if name else str(key))
    return found


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], *, free: Iterable[str] = ()
) -> dict[str, tuple[Any, Any]]:
    """Settings that differ, as dotted name -> (old value, new value); :data:`ABSENT` where a side has none.

    The number of CPU threads decides rounding and counts, but not where both sides computed on an accelerator.

    Args:
        old, new: nested settings.
        free: dotted names, or groups of them, that are left out.
    """
    then, now, allowed = flat(old), flat(new), tuple(free)
    if all(not str(side.get("device", "cpu")).startswith("cpu") for side in (then, now)):
        allowed += ("threads",)

    def value(side: Mapping[str, Any], key: str) -> tuple[bool, Any]:
        return isinstance(side.get(key), bool), side.get(key, ABSENT)  # to Python, True is 1

    return {
        key: (then.get(key, ABSENT), now.get(key, ABSENT))
        for key in {**then, **now}
        if value(then, key) != value(now, key)
        and not any(key == name or key.startswith(f"{name}.") for name in allowed)
    }


def check_same(old: Mapping[str, Any], new: Mapping[str, Any], place: str | Path, *, free: Iterable[str] = ()) -> None:
    """Refuse to resume under settings that would give another result.

    Args:
        old, new: settings then and now.
        place: the folder, for the message.
        free: see :func:`differences`.

    Raises:
        ConfigError: naming every setting that differs, with both values.
    """
    if found := differences(old, new, free=free):
        hint = "\n(CPU threads change rounding; OMP_NUM_THREADS sets it.)" if "threads" in found else ""
        raise ConfigError(
            f"{place} was begun under other settings, so it cannot be resumed:\n{_then_and_now(found)}{hint}\nGive the "
            "old settings again, another --out, or --overwrite to start again."
        )


def _then_and_now(found: Mapping[str, tuple[Any, Any]]) -> str:
    return "\n".join(f"  {key}: {then!r} then, {now!r} now" for key, (then, now) in found.items())


def _merged(parts: Iterable[Path]) -> list[dict[str, Any]]:
    return sorted((row for part in parts for row in _read_part(part)), key=lambda row: row.get("index", 0))


def _read_part(path: Path) -> list[dict[str, Any]]:
    try:
        with open(path, encoding="utf-8") as stream:
            rows = [json.loads(line) for line in stream]
        if not rows:
            raise ValueError("it is empty")
        return rows
    except (OSError, ValueError) as error:
        raise DataError(f"a damaged part ({error}): delete it and give the same command again", path=path) from error


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def some(names: Sequence[str]) -> str:
    """The first of some names, for a message."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
