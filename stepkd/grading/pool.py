r"""The grader: verdicts on completions, from worker processes that are killed at a hard deadline of CPU time.

math-verify can run for ever or eat all memory on text that a model wrote (``9^{9^{9^9}}``), and an alarm inside the
process works neither in threads nor against C code. So the check runs in child processes that the kernel ends when they
have used their CPU time; this module hands out items and replaces what was ended. An item that was lost is tried once
more, alone. Cases that need no computer algebra are settled without a worker.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from multiprocessing.connection import wait
from typing import Any

from stepkd.errors import ConfigError, DataError, StepkdError
from stepkd.grading.extract import DEFAULT_EXTRACTORS, Which, check_extractors, extract_answer, is_linear
from stepkd.grading.normalise import MAX_ANSWER_CHARS, quick_verdict
from stepkd.grading.process import WorkerGone, WorkerProcess

CONVENTIONS = ("stepkd", "prm800k")
"""Whose rules decide: this package's, or also those of PRM800K's official grader (:mod:`stepkd.grading.verify`)."""
_START_LIMIT_S = 120.0
"""A fresh worker imports sympy; on a cold network file system that takes tens of seconds."""
_START_ATTEMPTS = 3
_MIN_MEMORY_MB = 192
_WALL_FACTOR = 30.0
"""Wall-clock seconds per second of CPU time before a worker counts as stuck: a busy machine is no answer's fault."""


class Verdict(StrEnum):
    """The four possible outcomes of grading one completion."""

    CORRECT = "correct"
    """The answer found equals the reference answer."""
    WRONG = "wrong"
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
    """The answer found, at most 2,000 characters of it; ``None`` if none was found or the search itself timed out."""
    gold: str
    """The reference answer it was compared with."""


@dataclass
class _Item:
    request: dict[str, Any]
    indices: list[int]
    extracted: str | None
    gold: str
    lost: bool = False


@dataclass(kw_only=True, eq=False)
class Grader:
    """Grades completions against reference answers; a context manager, usable from any thread.

    Workers start when the first item needs one, and live until :meth:`close`, the end of the ``with`` block, garbage
    collection or the end of the interpreter. One call grades at a time; further threads wait. After a fork the child
    starts workers of its own. POSIX only.

    Raises:
        ConfigError: a value out of range, an unknown extractor or convention.
    """

    workers: int = 2
    """Number of worker processes, at least 1."""
    deadline_s: float = 2.0
    """CPU seconds of a worker per item, so that a busy machine changes no verdict; 30 times as many seconds of wall
    clock end an item too."""
    memory_mb: int = 1024
    """Cap on a worker's address space in MiB, at least 192."""
    extractors: Sequence[str] = DEFAULT_EXTRACTORS
    """Names for :func:`stepkd.grading.extract_answer`, tried in order."""
    which: Which | None = None
    """The occurrence that counts, ``"first"`` or ``"last"``; ``None`` follows each extractor's convention."""
    convention: str = "stepkd"
    """``"stepkd"``, or ``"prm800k"`` for what PRM800K's official grader accepts
    (:func:`stepkd.grading.verify.equivalent`)."""

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ConfigError(f"workers is {self.workers}; the grader needs at least 1")
        if not 0 < self.deadline_s < float("inf"):
            raise ConfigError(f"deadline_s is {self.deadline_s}; give a positive, finite number of seconds")
        if self.memory_mb < _MIN_MEMORY_MB:
            raise ConfigError(f"memory_mb is {self.memory_mb}; math-verify alone needs {_MIN_MEMORY_MB}")
        if self.which not in (None, "first", "last"):
            raise ConfigError(f"which is {self.which!r}; give 'first', 'last' or nothing")
        if self.convention not in CONVENTIONS:
            raise ConfigError(f"convention is {self.convention!r}; known: {', '.join(CONVENTIONS)}")
        self.extractors = check_extractors(self.extractors)
        self._become_owner()

    def _become_owner(self) -> None:
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._pool: list[WorkerProcess] = []
        self._failed_starts = 0
        self._finalizer = weakref.finalize(self, _stop_all, self._pool, self._owner)

    def __reduce__(self) -> tuple[Any, ...]:
        # Copies (spawned ranks, deep copies of a module) carry the settings and start workers of their own.
        settings = {each.name: getattr(self, each.name) for each in fields(self)}
        return (functools.partial(Grader, **settings), ())

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
            that swallows the error can come back as ``wrong``.)

        Raises:
            DataError: different lengths, a completion or an answer that is not text, an empty answer.
            StepkdError: the workers cannot be started (math-verify missing, ``memory_mb`` too small).
        """
        golds = _check_input(completions, answers)
        cut = [False] * len(golds) if cut_off is None else cut_off
        requests = [self._request(text or "", is_cut) for text, is_cut in zip(completions, cut, strict=True)]
        return self._verdicts(requests, golds)

    def same(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """Whether short answers are equal.

        Args:
            pairs: an answer and a reference answer each, as :func:`extract_answer` returns them.

        Returns:
            One verdict per pair; False also after a timeout.
        """
        grades = self._verdicts([{"candidate": candidate} for candidate, _ in pairs], [gold for _, gold in pairs])
        return [grade.verdict is Verdict.CORRECT for grade in grades]

    def _request(self, text: str, is_cut: bool) -> dict[str, Any]:
        """What a worker needs to know: the answer (None: there is none), or the text where a pattern looks for it."""
        if text and not is_cut and not is_linear(self.extractors):  # no pattern reads a text that was cut off
            return {"text": text, "extractors": list(self.extractors), "which": self.which}
        return {"candidate": extract_answer(text, self.extractors, which=self.which, cut_off=is_cut)}

    def _verdicts(self, requests: Sequence[dict[str, Any]], golds: Sequence[str]) -> list[Grade]:
        grades: dict[int, Grade] = {}
        items: dict[tuple[str, str], _Item] = {}
        for index, (request, gold) in enumerate(zip(requests, golds, strict=True)):
            found = request.get("candidate")
            shown = found and found[:MAX_ANSWER_CHARS]
            quick = quick_verdict(found, gold) if found is not None and self.convention == "stepkd" else None
            if found is None and "text" not in request:
                grades[index] = Grade(Verdict.UNPARSED, None, gold)
            elif quick is not None:
                grades[index] = Grade(Verdict.CORRECT if quick else Verdict.WRONG, shown, gold)
            else:  # samples of one problem often agree
                request |= {"gold": gold, "convention": self.convention}
                key = (request["text"] if found is None else found, gold)
                items.setdefault(key, _Item(request, [], shown, gold)).indices.append(index)
        if items:
            self._run(list(items.values()), grades)
        return [grades[index] for index in range(len(golds))]

    def _run(self, items: list[_Item], grades: dict[int, Grade]) -> None:
        if self._owner != os.getpid():
            inherited = self._pool
            self._finalizer.detach()
            self._become_owner()
            for worker in inherited:
                worker.disown()
        with self._lock:
            try:
                self._serve(items, grades)
            except BaseException:
                # An interrupt leaves workers with items whose replies nobody awaits.
                self._drop(list(self._pool))
                raise

    def _serve(self, items: list[_Item], grades: dict[int, Grade]) -> None:
        waiting = deque(range(len(items)))
        lost: deque[int] = deque()
        open_items = len(items)

        def settle(number: int, verdict: str, extracted: str | None) -> None:
            nonlocal open_items
            open_items -= 1
            for index in items[number].indices:
                grades[index] = Grade(Verdict(verdict), extracted, items[number].gold)

        def lose(worker: WorkerProcess, number: int) -> None:
            self._drop([worker])
            if items[number].lost:
                settle(number, Verdict.TIMEOUT, items[number].extracted)
            else:  # once more, when no other item is being checked
                items[number].lost = True
                lost.append(number)

        while open_items:
            self._drop([worker for worker in self._pool if worker.idle and worker.exit_code is not None])
            while len(self._pool) < min(self.workers, max(1, open_items - len(lost))):
                self._start()
            for worker in [w for w in self._pool if w.idle]:
                alone = not waiting and all(other.item is None for other in self._pool)
                if waiting or (lost and alone):
                    number = waiting.popleft() if waiting else lost.popleft()
                    try:
                        worker.send(number, items[number].request, deadline_s=_WALL_FACTOR * self.deadline_s)
                    except WorkerGone:
                        lose(worker, number)
            for worker in self._wait():
                busy_with = worker.item
                try:
                    reply = worker.receive()
                except WorkerGone:
                    reply = {"verdict": Verdict.TIMEOUT}
                    if busy_with is None:
                        self._note_failed_start(worker)
                        continue
                if reply is None:
                    continue
                if busy_with is None:
                    self._welcome(worker, reply)
                elif reply["verdict"] == Verdict.TIMEOUT:
                    lose(worker, busy_with)
                else:
                    worker.item = None
                    settle(busy_with, reply["verdict"], reply["extracted"])
                    if reply["retire"]:
                        self._drop([worker])

    def _wait(self) -> list[WorkerProcess]:
        """The workers that have something to read or are past their limit; waits until there is one."""
        active = [worker for worker in self._pool if not worker.idle]
        if not active:
            return []
        patience = min(worker.limit for worker in active) - time.monotonic()
        readable = wait([worker.fileno() for worker in active], max(0.0, patience))
        now = time.monotonic()
        return [worker for worker in active if worker.fileno() in readable or now >= worker.limit]

    def _start(self) -> None:
        try:
            worker = WorkerProcess(memory_mb=self.memory_mb, deadline_s=self.deadline_s)
        except OSError as error:
            raise StepkdError(f"cannot start a grading worker: {error}") from error
        worker.limit = time.monotonic() + _START_LIMIT_S
        self._pool.append(worker)

    def _welcome(self, worker: WorkerProcess, reply: dict[str, Any]) -> None:
        if "failed" in reply:
            raise StepkdError(
                f"a grading worker cannot start: {reply['failed']} (memory_mb={self.memory_mb}; is math-verify "
                "installed with its 'antlr4' extra?)"
            )
        worker.ready = True
        self._failed_starts = 0

    def _note_failed_start(self, worker: WorkerProcess) -> None:
        late = time.monotonic() >= worker.limit
        self._drop([worker])
        reason = f"was not ready after {_START_LIMIT_S:.0f} s" if late else f"ended with exit code {worker.exit_code}"
        self._failed_starts += 1
        if self._failed_starts >= _START_ATTEMPTS:
            self._failed_starts = 0
            raise StepkdError(
                f"{_START_ATTEMPTS} grading workers in a row failed to start; the last one {reason}. Raise memory_mb "
                f"(now {self.memory_mb}) or check that {sys.executable} can import math_verify"
            )

    def _drop(self, workers: Iterable[WorkerProcess]) -> None:
        for worker in workers:
            self._pool.remove(worker)
            worker.stop()


def _stop_all(pool: list[WorkerProcess], owner: int) -> None:
    if os.getpid() == owner:
        for worker in pool:
            worker.stop()
        pool.clear()


def _check_input(completions: Sequence[str | None], answers: Sequence[str]) -> list[str]:
    """Validate both columns and reduce whole solutions to their answers."""
    for name, column in (("completions", completions), ("answers", answers)):
        if isinstance(column, str | bytes):
            raise DataError(f"{name} is one text; give a list of them (or call grade_one)", column=name)
    if len(completions) != len(answers):
        raise DataError(f"{len(completions)} completions but {len(answers)} answers; give one answer per completion")
    for index, completion in enumerate(completions):
        if completion is not None and not isinstance(completion, str):
            raise DataError(f"completions[{index}] is {type(completion).__name__}, not text", column="completions")
    golds = []
    for index, answer in enumerate(answers):
        if not isinstance(answer, str):
            raise DataError(f"answers[{index}] is {type(answer).__name__}, not text; use str()", column="answers")
        gold = extract_answer(answer, ("hash", "boxed")) or answer.strip()
        if not gold:
            raise DataError(f"answers[{index}] is empty; every problem needs a reference answer", column="answers")
        golds.append(gold)
    return golds


def verdict_counts(grades: Iterable[Grade]) -> dict[str, int]:
    """How often each verdict occurs, with a zero for those that do not."""
    counts = {verdict.value: 0 for verdict in Verdict}
    for grade in grades:
        counts[grade.verdict.value] += 1
    return counts
