"""The grading worker: a process that answers one request at a time, and may be killed at any moment.

Started by :class:`stepkd.grading.pool.Grader`. It guards itself: a cap on its address space, a cap on CPU time per item
(the kernel's profiling timer ends the process, whatever it is doing; a limit in whole seconds stands behind it), no
core dumps, and it ends when its pipe closes or its parent changes. Interrupts meant for the training job (Ctrl-C,
SLURM's signals) do not reach the verdicts.
"""

from __future__ import annotations

import contextlib
import math
import os
import resource
import signal
import time
from multiprocessing.connection import Connection
from typing import Any

from stepkd.errors import StepkdError
from stepkd.grading.pool import Verdict, own_grader
from stepkd.grading.verify import equivalent

_CPU_GRACE_S = 2
_PARENT_CHECK_S = 5.0
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def main(pipe: int, parent: int, memory_mb: int, deadline_s: float, grader: str | None) -> None:
    """Answer requests until the pipe closes.

    Args:
        pipe: descriptor of this end of it. The first message is what keeps the worker from working, or empty; then
            a request is answered by a verdict (None: out of memory; an error: the user's grader failed) and whether the
            worker should be replaced.
        parent: process id of the parent.
        memory_mb: cap on the address space, in MiB.
        deadline_s: CPU seconds per item; an item that takes more ends the process.
        grader: dotted name of a user's grader.
    """
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_AS, memory_mb * 2**20)
    with Connection(pipe) as connection, contextlib.suppress(EOFError, OSError):
        connection.send(_warm_up(grader))
        full = (_address_space_bytes() + memory_mb * 2**20) / 2  # a grader of one's own may import much
        while os.getppid() == parent:  # whoever the parent forked holds the pipe too, and keeps it open
            if not connection.poll(_PARENT_CHECK_S):
                continue
            request = connection.recv()
            signal.setitimer(signal.ITIMER_PROF, deadline_s)
            _limit(resource.RLIMIT_CPU, math.ceil(time.process_time() + deadline_s) + _CPU_GRACE_S)
            verdict: Any = Verdict.INCORRECT
            try:
                verdict = _judge(grader, *request)
            except MemoryError:
                verdict = None
            except StepkdError as error:
                verdict = error
            except Exception:  # sympy raises nearly everything on what it cannot do
                pass
            signal.setitimer(signal.ITIMER_PROF, 0)
            # sympy's caches only grow; a worker near its cap would fail an item that is not to blame.
            connection.send((verdict, verdict is None or _address_space_bytes() > full))


def _judge(grader: str | None, text: str, reference: str, how: Any) -> Verdict:
    """The verdict by stepkd's rules, where ``how`` is a convention, or by the user's grader, where it is a row.

    Raises:
        StepkdError: the user's grader raised, or returned something else than true, false or none.
    """
    if grader is None or isinstance(how, str):
        return Verdict.CORRECT if equivalent(text, reference, how) else Verdict.INCORRECT
    try:
        found = own_grader(grader)[0](text, reference, how)
        if found is not None and found not in (True, False):
            raise TypeError(f"it returned {found!r}, not True, False or None")
    except MemoryError:
        raise
    except Exception as error:
        place = f"problem {how.get('id', '?')!r}, completion {text[:200]!r}"
        raise StepkdError(f"the grader {grader} failed on {place}: {type(error).__name__}: {error}") from error
    return Verdict.UNPARSED if found is None else Verdict.CORRECT if found else Verdict.INCORRECT


def _warm_up(grader: str | None) -> str:
    """The first check compiles math-verify's patterns and loads the LaTeX grammar; it belongs to the start."""
    try:
        if not equivalent(r"\frac{1}{2} + x", r"x + \frac24"):
            return "x + 2/4 is not found equal to 1/2 + x: the LaTeX grammar of math-verify does not work"
        if grader is not None:
            own_grader(grader)
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _limit(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    with contextlib.suppress(ValueError, OSError):  # macOS refuses some limits; the deadline still holds
        resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _address_space_bytes() -> int:
    """What counts against the cap now (Linux; 0 elsewhere).

    Not ``ru_maxrss``: a child inherits its parent's, so below a training job of 30 GB every worker would seem full.
    """
    try:
        with open("/proc/self/statm", encoding="ascii") as pages:
            return int(pages.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 0
