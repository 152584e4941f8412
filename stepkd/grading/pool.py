r"""The grader: verdicts on completions, from worker processes that are killed at a hard deadline of CPU time.

math-verify can run for ever or eat all memory on text that a model wrote (``9^{9^{9^9}}``), and an alarm inside the
process works neither in threads nor against C code. So the check runs in child processes that the kernel ends when they
have used their CPU time. One thread per worker hands out items and replaces a worker that was ended; an item that was
lost is tried once more, alone. Cases that need no computer algebra are settled without a worker.

pebble's ``ProcessPool`` (5.2.3) was tried in place of this, and loses what is promised here. Its workers come from
``multiprocessing``: they import the parent's main script (and torch with it; a script without a main guard fails), and
cannot be given a hash seed of their own. A worker that is killed while it has no item, or by the SIGTERM that a cluster
sends to all processes of a job, breaks the pool. Workers share a lock: one that is killed while it holds it leaves
items without an answer.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from enum import StrEnum
from multiprocessing.connection import Pipe
from typing import Any, Literal

from stepkd.errors import DataError, StepkdError, check_bounds
from stepkd.grading.extract import DEFAULT_EXTRACTORS, check_extractors, extract_answer
from stepkd.grading.normalise import MAX_ANSWER_CHARS, quick_verdict

_START_LIMIT_S = 120.0
"""A fresh worker imports sympy; on a cold network file system that takes tens of seconds."""
_START_ATTEMPTS = 3
_MIN_MEMORY_MB = 192  # of math-verify alone
_WALL_FACTOR = 30.0
"""Wall-clock seconds per second of CPU time before a worker counts as stuck: a busy machine is no answer's fault."""
_WATCH_S = 0.5
"""How often it is looked for workers that are stuck."""
_KILL_S = 0.05
"""How often workers are killed after an interrupt, until all threads have noticed."""
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
    deadline_s: float = 2.0
    """Hard limit on grading one answer, in CPU seconds of a worker and above 0, so that a busy machine changes no
    verdict (30 times as many seconds of wall clock end an item, too); 2 suffices for all but hostile answers."""
    workers: int = 2
    """Number of processes that compare answers, at least 1; few answers need one, so 2 keep up with a sampler."""
    memory_mb: int = 1024
    """Cap on a grading process's address space in MiB, at least 192; 1024 ends an answer that would fill the memory."""

    def __post_init__(self) -> None:
        check_bounds("grading.", self, workers="[1, inf)", deadline_s="(0, inf)", memory_mb=f"[{_MIN_MEMORY_MB}, inf)")
        if self.extractors is not None:
            object.__setattr__(self, "extractors", check_extractors(self.extractors))

    def decides(self) -> dict[str, Any]:
        """What of it decides verdicts, as a job records and compares it; extractors stand beside, as they are used."""
        return {name: getattr(self, name) for name in ("convention", "deadline_s", "memory_mb")}


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
    """The verdict on one completion, with what it compared."""

    verdict: Verdict
    """One of the four outcomes."""
    extracted: str | None
    """The answer found, at most 2,000 characters of it; ``None`` if none was found."""
    gold: str
    """The reference answer it was compared with."""


@dataclass
class _Item:
    """A check that takes a worker, and its outcome."""

    request: dict[str, str]
    verdict: Verdict = Verdict.TIMEOUT


class _Worker:
    """A child interpreter and this side of its pipe.

    It is a fresh interpreter (not a fork: the parent may hold torch's threads; not ``multiprocessing``: that would
    import the parent's main script again).
    """

    def __init__(self, memory_mb: int, deadline_s: float) -> None:
        self._pipe, theirs = Pipe()
        with theirs:
            paths = [path for path in sys.path if isinstance(path, str)]
            arguments = json.dumps([paths, theirs.fileno(), os.getpid(), memory_mb, deadline_s])
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", _BOOT, arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                # A fixed hash seed: the order of sympy's sets, and so a verdict, must not differ between runs.
                env={**os.environ, "PYTHONHASHSEED": "0"},
            )
        self.limit = math.inf  # when it counts as stuck

    def ask(self, request: Mapping[str, Any] | None, wall_s: float) -> dict[str, Any] | None:
        """The reply to a request (to None: its first message); None where it has ended."""
        self.limit = time.monotonic() + wall_s
        try:
            if request is not None:
                self._pipe.send_bytes(json.dumps(request).encode("ascii"))
            while not self._pipe.poll(_WATCH_S):
                # Its end may not close the pipe: another process, forked when it started, may hold the other side.
                if self.process.poll() is not None and not self._pipe.poll():
                    return None
            reply: dict[str, Any] = json.loads(self._pipe.recv_bytes())
        except (EOFError, OSError):
            return None
        self.limit = math.inf
        return reply

    def stop(self) -> None:
        """Kill the worker, reap it and close the pipe; safe to repeat."""
        self.process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # a process stuck in the kernel is reaped later
            self.process.wait(timeout=5.0)
        self._pipe.close()

    def disown(self) -> None:
        """After a fork: let go of a worker that another process started."""
        self._pipe.close()
        self.process.returncode = 0  # nothing to reap here


class Grader:
    """Grades completions against reference answers; a context manager, usable from any thread.

    Workers start when the first item needs one, and live until :meth:`close`, the end of the ``with`` block, garbage
    collection or the end of the interpreter. One call grades at a time; further threads wait. After a fork the child
    starts workers of its own. POSIX only.

    Args:
        config: the settings; None: the defaults.
        extractors: how answers are found where the settings do not say it (a benchmark's own).

    Raises:
        ConfigError: an unknown extractor.
    """

    def __init__(self, config: GradingConfig | None = None, *, extractors: Sequence[str] = DEFAULT_EXTRACTORS) -> None:
        self.config = config or GradingConfig()
        self.extractors = self.config.extractors or check_extractors(extractors)
        self._become_owner()

    def _become_owner(self) -> None:
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._pool: list[_Worker] = []
        self._finalizer = weakref.finalize(self, _stop_all, self._pool, self._owner)

    def __reduce__(self) -> tuple[Any, ...]:
        # Copies (spawned ranks, deep copies of a module) carry the settings and start workers of their own.
        return Grader, (replace(self.config, extractors=self.extractors),)

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill and reap the workers; a later call to :meth:`grade` starts new ones."""
        if self._owner == os.getpid():
            with self._lock:
                self._drop(list(self._pool))

    def grade_one(self, completion: str | None, answer: str) -> Grade:
        """Grade one completion; see :meth:`grade`."""
        return self.grade([completion], [answer])[0]

    def grade(
        self, completions: Sequence[str | None], answers: Sequence[str], *, cut_off: Sequence[bool] | None = None
    ) -> list[Grade]:
        r"""Grade completions against reference answers.

        Args:
            completions: the model's texts, of any length and content; ``None`` counts as empty.
            answers: one reference answer per completion, as text. A whole solution is reduced to its ``####`` or
                ``\boxed`` answer.
            cut_off: per completion whether it ended at its longest length. Of such a text a closed box and a finished
                ``####`` line are answers; anything else is ``unparsed``.

        Returns:
            One grade per completion, in order. No text makes this raise: a deadline, a memory cap or a crash of the
            check is the verdict ``timeout``, for that item only. (A check that runs out of memory inside a library
            that swallows the error can come back as ``incorrect``.)

        Raises:
            DataError: different lengths, an answer that is not text, an empty answer.
            StepkdError: the workers cannot be started (math-verify missing, ``memory_mb`` too small).
        """
        golds = _check_input(completions, answers)
        cut = [False] * len(golds) if cut_off is None else cut_off
        found = [extract_answer(t or "", self.extractors, cut_off=c) for t, c in zip(completions, cut, strict=True)]
        return [
            Grade(verdict, answer and answer[:MAX_ANSWER_CHARS], gold)
            for verdict, answer, gold in zip(self._verdicts(found, golds), found, golds, strict=True)
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
            quick = quick_verdict(found, gold) if found is not None and convention == "stepkd" else None
            if found is None:
                verdicts.append(Verdict.UNPARSED)
            elif quick is not None:
                verdicts.append(Verdict.CORRECT if quick else Verdict.INCORRECT)
            else:
                request = {"candidate": found, "gold": gold, "convention": convention}
                verdicts.append(items.setdefault((found, gold), _Item(request)))
        if items:
            self._run(list(items.values()))
        return [each.verdict if isinstance(each, _Item) else each for each in verdicts]

    def _run(self, items: Sequence[_Item]) -> None:
        if self._owner != os.getpid():
            inherited = self._pool
            self._finalizer.detach()
            self._become_owner()
            for worker in inherited:
                worker.disown()
        with self._lock:
            try:
                for lost in self._check(items):
                    self._check([lost])  # once more, when no other item is being checked
            except BaseException:
                self._drop(list(self._pool))
                raise

    def _check(self, items: Sequence[_Item]) -> list[_Item]:
        """Have items checked; returns those whose worker was ended."""
        waiting, lost = deque(items), list[_Item]()
        self._drop([worker for worker in self._pool if worker.process.poll() is not None])
        count = min(self.config.workers, len(items))
        with ThreadPoolExecutor(count, thread_name_prefix="grading") as threads:
            going: set[Future[None]] = set()
            try:
                for idle in [*self._pool, *[None] * count][:count]:
                    going.add(threads.submit(self._serve, idle, waiting, lost))
                while going:
                    done, going = wait(going, _WATCH_S, FIRST_EXCEPTION)
                    for thread in done:
                        thread.result()
                    for worker in list(self._pool):
                        if time.monotonic() >= worker.limit:
                            worker.process.kill()
            except BaseException:
                waiting.clear()
                while not all(thread.done() for thread in going):
                    for worker in list(self._pool):  # also one that has just been started in place of another
                        worker.process.kill()
                    time.sleep(_KILL_S)
                raise
        return lost

    def _serve(self, worker: _Worker | None, waiting: deque[_Item], lost: list[_Item]) -> None:
        """Have items checked by one worker, or those that come in its place, until there are none left."""
        while True:
            try:
                item = waiting.popleft()
            except IndexError:
                return
            worker = worker or self._start()
            reply = worker.ask(item.request, _WALL_FACTOR * self.config.deadline_s)
            if reply is None or reply["verdict"] == Verdict.TIMEOUT:
                lost.append(item)
            else:
                item.verdict = Verdict(reply["verdict"])
            if reply is None or reply["retire"]:
                self._drop([worker])
                worker = None

    def _start(self) -> _Worker:
        for _ in range(_START_ATTEMPTS):
            try:
                worker = _Worker(self.config.memory_mb, self.config.deadline_s)
            except OSError as error:
                raise StepkdError(f"cannot start a grading worker: {error}") from error
            self._pool.append(worker)
            first = worker.ask(None, _START_LIMIT_S)
            if first == {}:
                return worker
            late = time.monotonic() >= worker.limit
            self._drop([worker])
            if first is not None:
                last = f"says: {first['failed']}"
                break
            last = f"was not ready after {_START_LIMIT_S:.0f} s" if late else f"had exit code {worker.process.poll()}"
        raise StepkdError(
            f"no grading worker starts, the last one {last}. Raise memory_mb (now {self.config.memory_mb}) or "
            f"check that {sys.executable} can import math_verify, installed with its 'antlr4' extra"
        )

    def _drop(self, workers: Iterable[_Worker]) -> None:
        for worker in workers:
            with contextlib.suppress(ValueError):
                self._pool.remove(worker)
            worker.stop()


def _stop_all(pool: list[_Worker], owner: int) -> None:
    if os.getpid() == owner:
        for worker in pool:
            worker.stop()
        pool.clear()


def _check_input(completions: Sequence[str | None], answers: Sequence[str]) -> list[str]:
    """Check both columns and reduce whole solutions to their answers."""
    if len(completions) != len(answers):
        raise DataError(f"{len(completions)} completions but {len(answers)} answers; give one answer per completion")
    for index, answer in enumerate(answers):
        if not isinstance(answer, str):
            raise DataError(f"answers[{index}] is {type(answer).__name__}, not text; use str()", column="answers")
    golds = [extract_answer(answer, ("hash", "boxed")) or answer.strip() for answer in answers]
    if "" in golds:
        raise DataError(
            f"answers[{golds.index('')}] is empty; every problem needs a reference answer", column="answers"
        )
    return golds
