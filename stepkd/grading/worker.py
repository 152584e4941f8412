"""The grading worker: a process that reads one JSON line per item, answers with one, and may be killed at any moment.

Started by :class:`stepkd.grading.process.WorkerProcess`. It guards itself: a cap on its address space, a cap on CPU
time per item (the kernel's profiling timer ends the process, whatever it is doing; a limit in whole seconds stands
behind it), no core dumps, and it ends when its pipe closes or its parent changes. Interrupts meant for the training job
(Ctrl-C, SLURM's signals) do not reach the verdicts.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import select
import signal
import time
from typing import Any

from stepkd.grading.extract import extract_answer
from stepkd.grading.normalise import MAX_ANSWER_CHARS
from stepkd.grading.verify import equivalent

_CPU_GRACE_S = 2
_PARENT_CHECK_S = 5.0
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def main(memory_mb: int, deadline_s: float, parent: int) -> None:
    """Serve items until the pipe closes.

    Args:
        memory_mb: cap on the address space, in MiB.
        deadline_s: CPU seconds per item; an item that takes more ends the process.
        parent: process id of the parent.
    """
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    requests, replies = _take_over_pipes()
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_AS, memory_mb * 2**20)
    try:
        # The first call compiles math-verify's patterns and loads the LaTeX grammar: part of the start, not of an item.
        if not equivalent(r"\frac{1}{2} + x", r"x + \frac24"):
            raise RuntimeError("x + 2/4 is not found equal to 1/2 + x: the LaTeX grammar of math-verify does not work")
    except BaseException as error:
        _reply(replies, {"failed": f"{type(error).__name__}: {error}"})
        return
    _reply(replies, {"ready": True})
    half = memory_mb * 2**20 // 2
    while (line := _next_line(requests, parent)) is not None:
        _allow_cpu(deadline_s)
        try:
            reply = _grade(json.loads(line))
        except MemoryError:
            reply = {"verdict": "timeout"}
        signal.setitimer(signal.ITIMER_PROF, 0)
        # sympy's caches only grow; a worker at half its cap would fail an item that is not to blame.
        retire = _address_space_bytes() > half
        _reply(replies, reply | {"retire": retire})
        if retire:
            return


def _grade(item: dict[str, Any]) -> dict[str, Any]:
    extracted = item.get("candidate")
    if extracted is None:
        extracted = extract_answer(item["text"], item["extractors"], which=item["which"])
    if extracted is None:
        return {"verdict": "unparsed", "extracted": None}
    try:
        verdict = "correct" if equivalent(extracted, item["gold"], item["convention"]) else "wrong"
    except MemoryError:
        raise
    except Exception:  # sympy raises nearly everything on what it cannot do
        verdict = "wrong"
    return {"verdict": verdict, "extracted": extracted[:MAX_ANSWER_CHARS]}


def _take_over_pipes() -> tuple[int, int]:
    """Move the pipes away from descriptors 0 and 1, so that a library that prints cannot break the protocol."""
    requests, replies = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.close(null)
    return requests, replies


def _limit(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    with contextlib.suppress(ValueError, OSError):  # macOS refuses some limits; the deadline still holds
        resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _allow_cpu(deadline_s: float) -> None:
    signal.setitimer(signal.ITIMER_PROF, deadline_s)
    _limit(resource.RLIMIT_CPU, math.ceil(time.process_time() + deadline_s) + _CPU_GRACE_S)


def _address_space_bytes() -> int:
    """What counts against the cap now (Linux; 0 elsewhere).

    Not ``ru_maxrss``: a child inherits its parent's, so below a training job of 30 GB every worker would seem full.
    """
    try:
        with open("/proc/self/statm", encoding="ascii") as pages:
            return int(pages.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 0


def _next_line(requests: int, parent: int) -> bytes | None:
    """One request; None when the pipe is closed or the parent is gone."""
    pieces: list[bytes] = []  # a long line arrives in many
    while not pieces or not pieces[-1].endswith(b"\n"):
        readable, _, _ = select.select([requests], [], [], _PARENT_CHECK_S)
        if readable:
            pieces.append(os.read(requests, 1 << 20))
        if (readable and not pieces[-1]) or os.getppid() != parent:
            return None
    return b"".join(pieces)


def _reply(replies: int, message: dict[str, Any]) -> None:
    # ASCII JSON: lone surrogates and NUL travel as escapes.
    data = json.dumps(message).encode("ascii") + b"\n"
    while data:
        data = data[os.write(replies, data) :]
