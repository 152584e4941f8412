"""Errors that are meant for the person at the keyboard.

Every error a user can cause derives from :class:`StepkdError`. The command line prints its message without a
traceback and exits with code 2 (1 for :class:`MachineError`); library users can catch one class. Messages name the
value, the place and the fix.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterable
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

NOT_MEASURED = (
    "auto is measured, for jobs that sample (evaluate, label, pairs); in a training or in scores the numbers would "
    "depend on the machine. Null takes the type that the weights are stored in"
)


class StepkdError(Exception):
    """Base class: a mistake in the input, the settings or the environment, with a message that says how to mend it."""


class ConfigError(StepkdError):
    """A setting that contradicts another one, is out of range, or cannot work in this environment."""


class ModelError(StepkdError):
    """A model folder, checkpoint, tokenizer or adapter that cannot be used as asked."""


class TrainingError(StepkdError):
    """Training cannot continue: a non-finite loss or gradient, or a batch without a single target."""


class MachineError(TrainingError):
    """What the machine ended, and no mistake in the input: memory or a disk is full, or another process is gone."""


class DataError(StepkdError):
    """A row or file that breaks its contract.

    Args:
        message: what is wrong and how to mend it.
        path: the file (or ``source:split`` name) the row came from.
        line: 1-based line (JSON Lines) or row number.
        column: the column concerned.
    """

    def __init__(
        self, message: str, *, path: str | Path | None = None, line: int | None = None, column: str | None = None
    ) -> None:
        self.path = None if path is None else str(path)
        self.line = line
        self.column = column
        place = ", ".join(
            part
            for part in (
                self.path,
                None if line is None else f"line {line}",
                None if column is None else f"column {column!r}",
            )
            if part
        )
        super().__init__(f"{place}: {message}" if place else message)


class UnreadableSolution(DataError):
    """A solution that cannot be laid out: it holds the step marker itself, or nothing but an end token.

    Sampled solutions may; they are left out of training and not scored, and both are counted.
    """


_PLACE = "write to a folder that you may write to"
_DISK = {
    errno.ENOSPC: "free some space there, or write to another disk",
    errno.EDQUOT: "your share of that disk is used up: free some space there, or write to another disk",
    errno.EFBIG: "no file may grow that large there: raise the limit (ulimit -f), or write elsewhere",
    errno.EIO: "look at the disk or its connection, or write to another one",
    errno.EROFS: _PLACE,
    errno.EACCES: _PLACE,
    errno.EPERM: _PLACE,
    errno.ENOTDIR: "a part of that path is a file: give another",
    errno.EISDIR: "that is a folder: give another name",
    errno.EEXIST: "that is a file: give another name",
}


def disk_error(error: BaseException, path: str | Path | None = None, outcome: str = "") -> MachineError | None:
    """A failed write in words, whichever library it comes from; None for any other error.

    Args:
        error: what was raised.
        path: what was to be written; the error's own file when None.
        outcome: a sentence about what is left, for the message.
    """
    if isinstance(error, StepkdError):
        return None
    text = str(error)
    code = error.errno if isinstance(error, OSError) else None
    if code is None and (found := re.search(r"(?:os error|[Ee]rrno) (\d+)", text)):
        code = int(found.group(1))
    if code is None and "inline_container" in text:  # torch's writer says no more itself
        code = getattr(error.__context__, "errno", None) or errno.ENOSPC
    if code not in _DISK:
        return None
    place = path or getattr(error, "filename", None)
    reason = os.strerror(code)
    if code in (errno.ENOSPC, errno.EDQUOT) and place:
        folder = next(each for each in Path(place).absolute().parents if each.is_dir())
        reason += f" ({shutil.disk_usage(folder).free / 2**20:,.1f} MiB free there)"
    remedy = _DISK[code]
    return MachineError(f"cannot write {place or 'the output'}: {reason}. {outcome}{remedy[0].upper()}{remedy[1:]}")


def nearest(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """`` Did you mean 'x'?`` for the known name closest to a wrong one; empty when none is close.

    Args:
        name: what the user wrote.
        known: the names that would have been accepted.
        cutoff: similarity from which a name counts as close, in [0, 1].
    """
    close = get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f" Did you mean {close[0]!r}?" if close else ""


def check_bounds(place: str, settings: object, **bounds: str) -> None:
    """Raise a ConfigError that names the first setting out of its bounds; NaN is out of any, None within.

    Fields whose type is a Literal are checked too: see :func:`check_choice`.

    Args:
        place: what stands before the settings' names in the message, with its dot.
        settings: has them as attributes.
        **bounds: setting -> interval, such as ``[0, 1)``; ``inf)`` leaves infinity out.
    """
    for name, choices in _literals(type(settings)).items():  # type: ignore[arg-type]
        if getattr(settings, name) is not None:
            check_choice(f"{place}{name}", getattr(settings, name), choices)
    for name, interval in bounds.items():
        value = getattr(settings, name)
        least, most = map(float, interval[1:-1].split(","))
        on_edge = (interval[0] == "[" and value == least) or (interval[-1] == "]" and value == most)
        if value is None or on_edge or least < value < most:
            continue
        words = f"lie in {interval}"
        if interval.endswith("inf)"):
            words = {"(0, inf)": "be positive", "[0, inf)": "be 0 or positive"}.get(interval, f"be at least {least:g}")
        raise ConfigError(f"{place}{name}={value}: must {words}")


@cache
def _literals(kind: Any) -> dict[str, list[str]]:
    """What the fields of a class may be that are one of several words (or None)."""
    found = {}
    for name, hint in get_type_hints(kind).items():
        members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        members = tuple(each for each in members if each is not type(None))
        if members and all(get_origin(each) is Literal for each in members):
            found[name] = [word for each in members for word in get_args(each)]
    return found


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raise a ConfigError that names the nearest choice if ``value`` is not one of ``choices``.

    Args:
        name: what is chosen, for the message.
        value: what the user wrote.
        choices: what would have been accepted.
    """
    known = list(choices)
    if value in known:
        return
    near = get_close_matches(str(value), known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(f"unknown {name} {value!r}: {hint}choose from {', '.join(known)}")
