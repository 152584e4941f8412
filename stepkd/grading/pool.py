r"""The grader: verdicts on completions, from worker processes that are killed at a hard deadline of CPU time.

math-verify can run for ever or eat all memory on text that a model wrote (``9^{9^{9^9}}``), and an alarm inside the
process works neither in threads nor against C code. So the check runs in child processes that the kernel ends when they
have used their CPU time. The calling thread hands out items and replaces a worker that was ended; an item that was
lost is tried once more, alone. Cases that need no computer algebra are settled without a worker.

pebble's ``ProcessPool`` (5.2.3) was tried in place of this, and loses what is promised here. Its workers come from
``multiprocessing``: they import the parent's main script (and torch with it; a script without a main guard fails), and
cannot be given a hash seed of their own. A worker that is killed while it has no item, or by the SIGTERM that a cluster
sends to all processes of a job, breaks the pool. Workers share a lock: one that is killed while it holds it leaves
items without an answer.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import os
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cache
from multiprocessing.connection import Pipe, wait
from pathlib import Path
from typing import Any, Literal

import psutil  # type: ignore[import-untyped]

from stepkd.errors import ConfigError, DataError, StepkdError, check_bounds
from stepkd.grading.extract import DEFAULT_EXTRACTORS, check_extractors, extract_answer
from stepkd.grading.normalise import MAX_ANSWER_CHARS, quick_verdict
from stepkd.safe import check_import, imported

_START_LIMIT_S = 120.0
"""A fresh worker imports sympy; on a cold network file system that takes tens of seconds."""
_START_ATTEMPTS = 3
_MIN_MEMORY_MB = 192  # of math-verify alone
_WALL_FACTOR = 30.0
"""Wall-clock seconds per second of CPU time before a worker counts as stuck, unless it waits for a CPU."""
_WATCH_S = 0.5
"""How often it is looked for workers that are stuck, or have ended without closing their pipe."""
_BOOT = (
    "import sys, json; sys.path[:], *arguments = json.loads(sys.argv[1]); "
    "from stepkd.grading.worker import main; main(*arguments)"
)


@dataclass(frozen=True, kw_only=True)
class GradingConfig:
    """How final answers are found and compared.

    Raises:
        ConfigError: a value out of range, an unknown extractor or convention.
    """

    extractors: tuple[str, ...] | None = None
    """How the final answer is found: names that are tried in order (hash, boxed, answer_phrase, latex, last_number), of
    which one alone is a strict reading; the default is the benchmark's own list, elsewhere all five."""
    convention: Literal["stepkd", "prm800k"] = "stepkd"
    """When two answers are equal: by stepkd's rules (the default), or, under prm800k, not where PRM800K's official
    grader refuses them (2/4 for 1/2, 10/2 for 5)."""
    grader: str | None = None
    """Function of yours that judges a completion, by dotted name (package.module.function); it takes the completion's
    text, the reference answer and the problem's row (with ``cut_off``), and returns true, false, or none where it finds
    no answer. The default compares answers by stepkd's rules, as votes always do."""
    deadline_s: float = 2.0
    """Hard limit on grading one answer, in CPU seconds of a worker and above 0, so that a busy machine changes no
    verdict (30 times as many seconds of wall clock end an item that stands still); 2 suffices for all but hostile
    answers."""
    workers: int = 2
    """Number of processes that compare answers, at least 1; few answers need one, so 2 keep up with a sampler."""
    memory_mb: int = 1024
    """Cap on a grading process's address space in MiB, at least 192; 1024 ends an answer that would fill the memory."""

    def __post_init__(self) -> None:
        check_bounds("grading.", self, workers="[1, inf)", deadline_s="(0, inf)", memory_mb=f"[{_MIN_MEMORY_MB}, inf)")
        if self.extractors is not None:
            object.__setattr__(self, "extractors", check_extractors(self.extractors))
        if self.grader is not None:
            check_import(self.grader.replace(":", "."), "grading.grader")

    def decides(self) -> dict[str, Any]:
        """What of it decides verdicts, as a job records and compares it; extractors stand beside, as they are used."""
        own = {} if self.grader is None else {"grader": {"name": self.grader, "sha256": _file_hash(self.grader)}}
        return {name: getattr(self, name) for name in ("convention", "deadline_s", "memory_mb")} | own


@cache
def own_grader(name: str) -> tuple[Callable[[str, str, Mapping[str, Any]], bool | None], Path]:
    """A user's grader, and the file that defines it.

    Args:
        name: its dotted name.

    Raises:
        ConfigError: it cannot be imported, is no function of a file, or does not take three arguments.
    """
    function = imported(name, "grading.grader")
    try:
        inspect.signature(function).bind("text", "reference", {})
        file = Path(str(sys.modules[function.__module__].__file__))
        file.stat()
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        raise ConfigError(
            f"grading.grader: {name!r} must be a function of a Python file that takes (text, reference, row): {error}"
        ) from error
    return function, file


def _file_hash(name: str) -> str:
    """The sha256 of the file of a user's grader (that file alone) as it is now: workers import it when they start."""
    return hashlib.sha256(own_grader(name)[1].read_bytes()).hexdigest()


class Verdict(StrEnum):
    """The four possible outcomes of grading one completion."""

    CORRECT = "correct"
    """The answer found equals the reference answer."""
    INCORRECT = "incorrect"
    """The answer found does not equal it, or cannot be read as mathematics."""
    UNPARSED = "unparsed"
    """No answer was found in the completion."""
    TIMEOUT = "timeout"
    """The check ran past the deadline or the memory cap, or its process died."""


@dataclass(frozen=True)
class Grade:
    """The verdict on one completion, with the answer it found."""

    verdict: Verdict
    """One of the four outcomes."""
    extracted: str | None
    """The answer found, at most 2,000 characters of it; ``None`` if none was found."""


@dataclass
class _Item:
    """A check that takes a worker, and its outcome."""

    request: tuple[str, str, str | Mapping[str, Any]]
    """Candidate, reference answer and convention; for a user's grader text, reference answer and row."""
    verdict: Verdict = Verdict.TIMEOUT


class _Worker:
    """A child interpreter and this side of its pipe.

    It is a fresh interpreter (not a fork: the parent may hold torch's threads; not ``multiprocessing``: that would
    import the parent's main script again).
    """

    def __init__(self, memory_mb: int, deadline_s: float, grader: str | None) -> None:
        self.pipe, theirs = Pipe()
        with theirs:
            paths = [path for path in sys.path if isinstance(path, str)]
            arguments = json.dumps([paths, theirs.fileno(), os.getpid(), memory_mb, deadline_s, grader])
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", _BOOT, arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                # A fixed hash seed: the order of sympy's sets, and so a verdict, must not differ between runs.
                env={**os.environ, "PYTHONHASHSEED": "0"},
            )
        self.owner = os.getpid()
        self.ready = False  # whether it has sent its first message
        self.item: _Item | None = None  # what it is checking
        self.limit = time.monotonic() + _START_LIMIT_S  # when it counts as stuck

    def give(self, item: _Item, wall_s: float) -> None:
        """Have an item checked."""
        self.item, self.limit = item, time.monotonic() + wall_s
        with contextlib.suppress(OSError):  # it has just ended, which its pipe will say
            self.pipe.send(item.request)

    def is_starved(self) -> bool:
        """Whether it could work and gets no CPU, as on a busy machine, which is no answer's fault."""
        with contextlib.suppress(psutil.Error):
            return bool(psutil.Process(self.process.pid).status() == psutil.STATUS_RUNNING)
        return False

    def stop(self) -> None:
        """Kill the worker, reap it and close the pipe; safe to repeat. After a fork it is the other process's."""
        if self.owner == os.getpid():
            self.process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # a process stuck in the kernel is reaped later
                self.process.wait(timeout=5.0)
        self.pipe.close()


class Grader:
    """Grades completions against reference answers; a context manager, usable from any thread.

    Workers start when the first item needs one, and live until :meth:`close`, the end of the ``with`` block, garbage
    collection or the end of the interpreter. One call grades at a time; further threads wait. After a fork the child
    starts workers of its own. POSIX only.

    Args:
        config: the settings; None: the defaults.
        extractors: how answers are found where the settings do not say it (a benchmark's own).

    Raises:
        ConfigError: an unknown extractor, or a grader that cannot be used.
    """

    def __init__(self, config: GradingConfig | None = None, *, extractors: Sequence[str] = DEFAULT_EXTRACTORS) -> None:
        self.config = config or GradingConfig()
        self.config.decides()  # imports a user's grader
        self.extractors = self.config.extractors or check_extractors(extractors)
        self._owner, self._lock = os.getpid(), threading.Lock()
        self._pool: list[_Worker] = []
        weakref.finalize(self, _stop, self._pool)

    def __reduce__(self) -> tuple[Any, ...]:
        # Copies (spawned ranks, deep copies of a module) carry the settings and start workers of their own.
        return Grader, (replace(self.config, extractors=self.extractors),)

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill and reap the workers; a later call to :meth:`grade` starts new ones."""
        if self._owner != os.getpid():  # a fork: another thread's lock stays held in it for ever
            return _stop(self._pool)
        with self._lock:
            _stop(self._pool)

    def grade_one(self, completion: str | None, answer: str) -> Grade:
        """Grade one completion; see :meth:`grade`."""
        return self.grade([completion], [answer])[0]

    def grade(
        self,
        completions: Sequence[str | None],
        answers: Sequence[str],
        *,
        cut_off: Sequence[bool] | None = None,
        rows: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[Grade]:
        r"""Grade completions against reference answers.

        Args:
            completions: the model's texts, of any length and content; ``None`` counts as empty.
            answers: one reference answer per completion, as text. A whole solution is reduced to its ``####`` or
                ``\boxed`` answer.
            cut_off: per completion whether it ended at its longest length. Of such a text a closed box and a finished
                ``####`` line are answers; anything else is ``unparsed``.
            rows: per completion its problem's row, for a grader of the user's own; None: empty ones. Such a grader
                alone decides; what the extractors find is still ``extracted``.

        Returns:
            One grade per completion, in order. No text makes this raise: a deadline, a memory cap or a crash of the
            check is the verdict ``timeout``, for that item only. (A check that runs out of memory inside a library
            that swallows the error can come back as ``incorrect``.)

        Raises:
            DataError: different lengths, or an empty answer.
            StepkdError: the workers cannot be started (math-verify missing, ``memory_mb`` too small), or a grader of
                the user's own raised or returned something else.
        """
        if len(completions) != len(answers):
            raise DataError(f"{len(completions)} completions but {len(answers)} answers; give one for each")
        golds = [extract_answer(answer, ("hash", "boxed")) or answer.strip() for answer in answers]
        if "" in golds:
            raise DataError(f"answers[{golds.index('')}] is empty: every problem needs an answer", column="answers")
        cut = [False] * len(golds) if cut_off is None else cut_off
        found = [extract_answer(t or "", self.extractors, cut_off=c) for t, c in zip(completions, cut, strict=True)]
        if self.config.grader is None:
            verdicts = self._verdicts(found, golds)
        else:
            given = zip(completions, answers, rows or [{}] * len(cut), cut, strict=True)
            items = [_Item((text or "", gold, {**row, "cut_off": c})) for text, gold, row, c in given]
            self._run(items)
            verdicts = [item.verdict for item in items]
        return [
            Grade(verdict, answer and answer[:MAX_ANSWER_CHARS])
            for verdict, answer in zip(verdicts, found, strict=True)
        ]

    def same(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """Whether short answers are equal.

        Args:
            pairs: an answer and a reference answer each, as :func:`extract_answer` returns them.

        Returns:
            One verdict per pair; False also after a timeout.
        """
        verdicts = self._verdicts([candidate for candidate, _ in pairs], [gold for _, gold in pairs])
        return [verdict is Verdict.CORRECT for verdict in verdicts]

    def _verdicts(self, candidates: Sequence[str | None], golds: Sequence[str]) -> list[Verdict]:
        verdicts: list[Verdict | _Item] = []
        items: dict[tuple[str, str], _Item] = {}  # samples of one problem often agree
        convention = self.config.convention
        for found, gold in zip(candidates, golds, strict=True):
            quick = None if found is None else quick_verdict(found, gold)
            if found is None:
                verdicts.append(Verdict.UNPARSED)
            elif quick is None or (quick and convention != "stepkd"):
                verdicts.append(items.setdefault((found, gold), _Item((found, gold, convention))))
            else:
                verdicts.append(Verdict.CORRECT if quick else Verdict.INCORRECT)
        if items:
            self._run(list(items.values()))
        return [each.verdict if isinstance(each, _Item) else each for each in verdicts]

    def _run(self, items: Sequence[_Item]) -> None:
        if self._owner != os.getpid():  # a fork: the workers, and whoever holds the lock, are the other process's
            self._owner, self._lock = os.getpid(), threading.Lock()
            _stop(self._pool)
        with self._lock:
            try:
                for lost in self._check(items):
                    self._check([lost])  # once more, when no other item is being checked
            except BaseException:
                _stop(self._pool)
                raise

    def _check(self, items: Sequence[_Item]) -> list[_Item]:
        """Have items checked; returns those whose worker was ended."""
        waiting, lost, failures = deque(items), list[_Item](), 0
        self._drop([worker for worker in self._pool if worker.process.poll() is not None])
        while waiting or any(worker.item for worker in self._pool):
            for worker in self._pool:
                if waiting and worker.ready and worker.item is None:
                    worker.give(waiting.popleft(), _WALL_FACTOR * self.config.deadline_s)
            busy = sum(worker.item is not None for worker in self._pool)
            while len(self._pool) < min(self.config.workers, busy + len(waiting)):
                self._pool.append(self._start())
            working = [worker for worker in self._pool if worker.item or not worker.ready]
            heard = wait([worker.pipe for worker in working], _WATCH_S)
            for worker in working:
                reply: Any = None
                if worker.pipe in heard:
                    with contextlib.suppress(EOFError, OSError):
                        reply = worker.pipe.recv()
                # Its end may not close the pipe: another process, forked when it started, may hold the other side.
                elif worker.process.poll() is None and (
                    time.monotonic() < worker.limit or (worker.ready and worker.is_starved())
                ):
                    continue
                item, worker.item = worker.item, None
                if item is None:  # the first message
                    worker.ready = reply == ""
                    failures = 0 if worker.ready else failures + 1
                    if reply or failures == _START_ATTEMPTS:
                        raise self._cannot_start(worker, reply)
                elif reply is None or reply[0] is None:
                    lost.append(item)
                elif isinstance(reply[0], StepkdError):
                    raise reply[0]
                else:
                    item.verdict = Verdict(reply[0])
                if reply is None or (item and reply[1]):
                    self._drop([worker])
        return lost

    def _start(self) -> _Worker:
        try:
            return _Worker(self.config.memory_mb, self.config.deadline_s, self.config.grader)
        except OSError as error:
            raise StepkdError(f"cannot start a grading worker: {error}") from error

    def _cannot_start(self, worker: _Worker, said: str | None) -> StepkdError:
        late = time.monotonic() >= worker.limit
        worker.stop()
        ended = f"was not ready after {_START_LIMIT_S:.0f} s" if late else f"had exit code {worker.process.poll()}"
        return StepkdError(
            f"no grading worker starts, the last one {f'says: {said}' if said else ended}. Raise memory_mb (now "
            f"{self.config.memory_mb}) or check that {sys.executable} can import math_verify, installed with its "
            "'antlr4' extra"
        )

    def _drop(self, workers: Sequence[_Worker]) -> None:
        for worker in workers:
            self._pool.remove(worker)
            worker.stop()


def _stop(pool: list[_Worker]) -> None:
    while pool:
        pool.pop().stop()
