"""The row contracts: which columns a row has, of which type, and what is refused.

Two rules hold for every contract.

*Nothing is cast.* ``True`` is never read as 1, ``1`` never as ``True``, and ``1.0`` never as a -1/0/1 rating: a
silent cast of step labels turns ignored steps into right ones. A validator returns the row as it came, or raises.

*Extra columns are kept*, because files in the wild carry them, with one exception: an unknown column whose name is
nearly that of a contract column the row lacks (``label`` for ``labels``) is a slip and an error. ``extra="keep"``
switches that check off; ``extra="error"`` refuses every unknown column.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from stepkd.data import checks
from stepkd.data.checks import Check, RowCheck, did_you_mean
from stepkd.errors import ConfigError, DataError
from stepkd.steps.labels import label_kind

ExtraRule = Literal["check", "keep", "error"]

EXTRA_RULES: tuple[ExtraRule, ...] = ("check", "keep", "error")

__all__ = [
    "CONTRACTS",
    "DEMONSTRATION",
    "EXTRA_RULES",
    "PREFERENCE",
    "PROBLEM",
    "ROLLOUT",
    "STEPWISE",
    "STEP_PREFERENCE",
    "UNPAIRED",
    "Column",
    "Contract",
    "ExtraRule",
    "Needs",
    "check_unique_ids",
    "detect_contract",
    "label_kind",
    "problem_with",
    "validate",
]


@dataclass(frozen=True)
class Column:
    """One column of a contract."""

    name: str
    """The column's name, as the field uses it."""
    check: Check
    """Returns what is wrong with a value and how to mend it, or None."""
    required: bool = True
    """Whether the row must have it; an optional column may also hold null."""


@dataclass(frozen=True)
class Contract:
    """A kind of row: its columns and the checks that need more than one column."""

    name: str
    """Used in messages and in the ``contract`` option of files."""
    columns: tuple[Column, ...]
    """All known columns."""
    row_checks: tuple[RowCheck, ...] = ()
    """Each returns (column, message) or None; run after the columns have passed."""

    @property
    def names(self) -> tuple[str, ...]:
        """All known column names."""
        return tuple(column.name for column in self.columns)

    @property
    def required(self) -> tuple[str, ...]:
        """The names of the columns that a row must have."""
        return tuple(column.name for column in self.columns if column.required)


def validate(
    row: dict[str, Any],
    contract: Contract,
    *,
    path: str | Path | None = None,
    line: int | None = None,
    extra: ExtraRule = "check",
) -> dict[str, Any]:
    """Check a row against a contract.

    Args:
        row: the row; it is not changed.
        contract: what the row should be.
        path: the file or ``source:split`` the row came from, for the message.
        line: 1-based line or row number, for the message.
        extra: what to do with unknown columns (see the module's text): "check", "keep" or "error".

    Returns:
        The same row object.

    Raises:
        DataError: the first thing that is wrong, with file, line and column.
    """
    if extra not in EXTRA_RULES:
        raise ConfigError(f"extra={extra!r}: must be one of {', '.join(EXTRA_RULES)}")
    _check_unknown(row, contract, path=path, line=line, extra=extra)
    for column in contract.columns:
        present = column.name in row
        if not present and column.required:
            raise DataError(
                f"missing column {column.name!r} of a {contract.name} row; the row has {_listed(row)}. "
                f"If another column holds it, say so with columns: {{{column.name}: <that column>}}",
                path=path,
                line=line,
                column=column.name,
            )
        if not present or (row[column.name] is None and not column.required):
            continue
        message = column.check(row[column.name])
        if message is not None:
            raise DataError(message, path=path, line=line, column=column.name)
    for row_check in contract.row_checks:
        found = row_check(row)
        if found is not None:
            raise DataError(found[1], path=path, line=line, column=found[0])
    return row


def _listed(row: Mapping[str, Any]) -> str:
    return ", ".join(repr(name) for name in row) if row else "no columns"


def _check_unknown(
    row: Mapping[str, Any], contract: Contract, *, path: str | Path | None, line: int | None, extra: ExtraRule
) -> None:
    if extra == "keep":
        return
    absent = [name for name in contract.names if name not in row]
    for name in row:
        if name in contract.names:
            continue
        meant = _slip_of(str(name), absent)
        if meant is not None:
            raise DataError(
                f"unknown column {name!r}; did you mean {meant!r}? Rename it with columns: {{{meant}: {name}}}"
                ", or keep it under its name with extra_columns: keep",
                path=path,
                line=line,
                column=str(name),
            )
        if extra == "error":
            raise DataError(
                f"unknown column {name!r} in a {contract.name} row; {did_you_mean(str(name), contract.names)}",
                path=path,
                line=line,
                column=str(name),
            )


def _slip_of(name: str, absent: Sequence[str]) -> str | None:
    """The absent column that ``name`` is nearly spelt like; short ones (``id``) only in another case."""
    if name.lower() in absent:
        return name.lower()
    close = difflib.get_close_matches(name.lower(), [known for known in absent if len(known) > 3], n=1, cutoff=0.8)
    return close[0] if close else None


# --- the contracts -------------------------------------------------------------------------------------------------

_PROMPT = Column("prompt", checks.prompt)
_ID = Column("id", checks.filled_text, required=False)
_ANSWER = Column("answer", checks.filled_text, required=False)

PROBLEM = Contract(
    "problem",
    (_PROMPT, Column("answer", checks.filled_text), _ID, Column("solution", checks.filled_text, required=False)),
)
"""A problem with its gold answer; `solution` is a worked solution."""

Needs = Mapping[tuple[str, ...], str]
"""Columns of which a row must have one -> who reads it, for the message."""


def problem_with(needs: Needs) -> Contract:
    """A problem of which only the prompt and what somebody reads is required.

    Args:
        needs: what is read beside the prompt.
    """
    columns = tuple(replace(column, required=column.name == "prompt") for column in PROBLEM.columns)
    return Contract("problem", columns, tuple(checks.one_of_columns(names, why) for names, why in needs.items()))


DEMONSTRATION = Contract("demonstration", (_PROMPT, Column("solution", checks.filled_text), _ID, _ANSWER))
"""A prompt with a worked solution, and perhaps no gold answer: enough for SFT, not for evaluation."""

STEPWISE = Contract(
    "stepwise",
    (
        _PROMPT,
        Column("completions", checks.steps),
        Column("labels", checks.labels),
        Column("outcome", checks.boolean, required=False),
        _ANSWER,
        _ID,
    ),
    (checks.same_length("completions", "labels"),),
)
"""Step texts with one label each (TRL's stepwise-supervision type); a null label marks an unrated step."""

UNPAIRED = Contract(
    "unpaired",
    (_PROMPT, Column("completion", checks.filled_text), Column("label", checks.boolean), _ID, _ANSWER),
)
"""A completion that is desirable or not (TRL's unpaired preference type, what KTO reads)."""

_TOKEN_IDS = checks.list_of(checks.is_token_id, "token ids (whole numbers from 0)")

PREFERENCE = Contract(
    "preference",
    (
        _PROMPT,
        Column("chosen", checks.filled_text),
        Column("rejected", checks.filled_text),
        Column("chosen_ids", _TOKEN_IDS, required=False),
        Column("rejected_ids", _TOKEN_IDS, required=False),
        Column("chosen_visits", checks.whole_number, required=False),
        Column("rejected_visits", checks.whole_number, required=False),
        _ID,
        _ANSWER,
    ),
    (checks.sides_differ,),
)
"""Two completions of one prompt, the better one first; `chosen_ids` and `rejected_ids` are those that were sampled, the
end token included where there is one, `..._visits` how often a tree search came by."""

STEP_PREFERENCE = Contract(
    "step_preference",
    (
        *PREFERENCE.columns,
        Column("prefix", checks.prefix_steps),
        Column("prefix_ids", _TOKEN_IDS, required=False),
    ),
    PREFERENCE.row_checks,
)
"""Two next steps after a shared `prefix` of steps (empty at the start of the solution). Texts keep their separators, so
that ``"".join(prefix) + chosen`` is what was written; `prefix_ids` are the sampled ids of the prefix."""

ROLLOUT = Contract(
    "rollout",
    (
        Column("problem_id", checks.filled_text),
        _PROMPT,
        Column("completion", checks.text),
        Column("token_ids", checks.list_of(checks.is_token_id, "token ids (whole numbers from 0)")),
        Column("logprobs", checks.list_of(checks.is_logprob, "log-probabilities (finite, at most 0)")),
        Column("step_ends", checks.list_of(checks.is_whole_number, "token positions (whole numbers)")),
        Column("finish", checks.one_of("stop", "length")),
        Column("correct", checks.boolean_or_null),
        Column("model", checks.filled_text),
        Column("sampling", checks.mapping),
        Column("seed", checks.whole_number),
        Column(
            "raw_logprobs", checks.list_of(checks.is_logprob, "log-probabilities (finite, at most 0)"), required=False
        ),
        Column("step_labels", checks.labels, required=False),
        Column(
            "step_values", checks.list_of(checks.is_probability_or_null, "values in [0, 1] or null"), required=False
        ),
        Column(
            "step_scores", checks.list_of(checks.is_probability_or_null, "scores in [0, 1] or null"), required=False
        ),
        _ID,
        _ANSWER,
    ),
    (
        checks.same_length("token_ids", "logprobs"),
        checks.same_length("token_ids", "raw_logprobs"),
        checks.ends_partition,
        checks.same_length("step_ends", "step_labels"),
        checks.same_length("step_ends", "step_values"),
        checks.same_length("step_ends", "step_scores"),
    ),
)
"""A sampled completion with its token ids; `step_ends` are exclusive token ends; `correct` is null until graded.

`logprobs` are under the distribution that was sampled from; `raw_logprobs`, where they differ, at temperature 1.
`step_values` are chances of a right answer estimated by rollouts, `step_scores` what a step scorer says."""

CONTRACTS: dict[str, Contract] = {
    contract.name: contract
    for contract in (PROBLEM, DEMONSTRATION, STEPWISE, UNPAIRED, PREFERENCE, STEP_PREFERENCE, ROLLOUT)
}
"""All contracts by name."""


def detect_contract(row: Mapping[str, Any], *, path: str | Path | None = None, line: int | None = None) -> Contract:
    """Tell from its columns which contract a row follows; the values are not looked at.

    Args:
        row: a row under the contract's column names.
        path: for the message.
        line: for the message.

    Returns:
        The most specific contract whose telling columns the row has.

    Raises:
        DataError: no contract fits; the message names the nearest one and what it lacks.
    """
    telling = (
        (ROLLOUT, {"token_ids", "completion"}),
        (STEPWISE, {"completions", "labels"}),
        (STEP_PREFERENCE, {"chosen", "rejected", "prefix"}),
        (PREFERENCE, {"chosen", "rejected"}),
        (UNPAIRED, {"completion", "label"}),
        (PROBLEM, {"prompt", "answer"}),
        (DEMONSTRATION, {"prompt", "solution"}),
    )
    for contract, names in telling:
        if names <= set(row):
            return contract
    nearest = max((contract for contract, _ in telling), key=lambda c: _share(c, row))
    lacking = [name for name in nearest.required if name not in row]
    hints = [f"{name}: <column>" for name in lacking]
    raise DataError(
        f"no row contract fits the columns {_listed(row)}; nearest is {nearest.name!r}, which lacks "
        f"{', '.join(map(repr, lacking))}. Map the file's names with columns: {{{', '.join(hints)}}}, "
        "or name the source the file comes from (for example gsm8k)",
        path=path,
        line=line,
    )


def _share(contract: Contract, row: Mapping[str, Any]) -> float:
    return sum(name in row for name in contract.required) / len(contract.required)


def check_unique_ids(rows: Sequence[Mapping[str, Any]], *, path: str | Path | None = None) -> None:
    """Refuse rows that share an id; evaluation resumes and pairs by id, training data may repeat one.

    Args:
        rows: rows with an ``id`` each.
        path: for the message.

    Raises:
        DataError: two rows have the same id.
    """
    seen: dict[object, int] = {}
    for number, row in enumerate(rows, start=1):
        first = seen.setdefault(row["id"], number)
        if first != number:
            raise DataError(
                f"rows {first} and {number} share the id {row['id']!r}; make ids unique or drop the column",
                path=path,
                column="id",
            )
