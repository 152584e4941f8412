"""The row contracts, one pydantic model each: which columns a row has, of which type, and what is refused.

Two rules hold for every contract.

*Nothing is cast.* ``True`` is never read as 1, ``1`` never as ``True``, and ``1.0`` never as a -1/0/1 rating: a
silent cast of step labels turns ignored steps into correct ones. :func:`validate` returns the row as it came, or
raises. (Pydantic's strict float takes whatever converts itself, ``numpy.bool_`` included, so numbers are judged by
their type.)

*Extra columns are kept*, because files in the wild carry them, with one exception: an unknown column whose name is
nearly that of a contract column the row lacks (``label`` for ``labels``) is a slip and an error. ``extra="keep"``
switches that check off.
"""

from __future__ import annotations

import difflib
import functools
import itertools
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, get_args

import pydantic
from pydantic_core import PydanticCustomError

from stepkd.errors import DataError
from stepkd.steps.labels import label_kind

Row = dict[str, Any]
"""A row under the column names of its file or of its contract."""
ExtraRule = Literal["check", "keep"]
Role = Literal["system", "user", "assistant", "tool"]
MAX_LOGPROB = 1e-3
"""Log-probabilities may exceed 0 by this much: low-precision softmax rounds."""


# --- words for what is wrong ---------------------------------------------------------------------------------------


def shown(value: object) -> str:
    """Return a value's type and a short form of it, for messages."""
    try:
        form = repr(value)
    except (ValueError, RecursionError):  # integers of more than 4,300 digits, deep nesting
        form = "(too long to show)"
    return f"{type(value).__name__} {form if len(form) <= 60 else form[:57] + '...'}"


_WORDS = {
    "string_type": "must be text, found {}",
    "string_pattern_mismatch": "must not be empty",
    "bool_type": "must be true or false, found {}; nothing is cast",
    "int_type": "must be a whole number, found {}",
    "dict_type": "must be an object, found {}",
    "list_type": "must be a list of step texts, found {}",
    "too_short": "has zero steps; drop the row or segment the completion",
}


def _words(error: pydantic.ValidationError) -> str:
    """The first thing that pydantic found, as we say it."""
    found = error.errors()[0]
    kind, value = found["type"], found["input"]
    if kind == "string_unicode":
        start = next(index for index, each in enumerate(value, start=1) if "\ud800" <= each <= "\udfff")
        return f"half of a surrogate pair at character {start}; export the file again as valid UTF-8"
    if kind == "literal_error":
        allowed = found["ctx"]["expected"].replace("'", "").replace(" or ", ", ")
        return f"must be one of {allowed}, found {shown(value)}"
    return _WORDS[kind].format(shown(value)) if kind in _WORDS else found["msg"]


def _invalid(message: str, **context: Any) -> PydanticCustomError:
    return PydanticCustomError("row", "{message}", {"message": message, **context})


# --- values --------------------------------------------------------------------------------------------------------

Text = Annotated[str, pydantic.StringConstraints(strict=True, min_length=0)]
"""Any text that can be encoded as UTF-8 (pydantic looks at the characters only where there is a constraint)."""
Filled = Annotated[str, pydantic.StringConstraints(strict=True, pattern=r"\S")]
"""Text that is more than white space."""
_TEXT, _FILLED = pydantic.TypeAdapter[str](Text), pydantic.TypeAdapter[str](Filled)


def _invalid_text(value: object, kind: pydantic.TypeAdapter[str]) -> str | None:
    """What is wrong with a value that should be text; None: nothing."""
    try:
        kind.validate_python(value)
    except pydantic.ValidationError as error:
        return _words(error)
    return None


def chat_message(message: object) -> str | None:
    """What is wrong with a chat message, an object with a known ``role`` and a text as ``content``; None: nothing."""
    if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
        return f"must be an object with 'role' and 'content', found {shown(message)}"
    if message["role"] not in get_args(Role):
        return f"has role {message['role']!r}; known are {', '.join(get_args(Role))}"
    invalid = _invalid_text(message["content"], _TEXT)
    return None if invalid is None else f"has a content that is invalid: {invalid}"


def _prompt(value: object) -> object:
    if isinstance(value, str):
        if (invalid := _invalid_text(value, _FILLED)) is not None:
            raise _invalid(invalid)
        return value
    if not isinstance(value, list):
        raise _invalid(f"must be text or a list of chat messages, found {shown(value)}")
    if not value:
        raise _invalid("must not be an empty list of messages")
    for index, message in enumerate(value, start=1):
        if (invalid := chat_message(message)) is not None:
            raise _invalid(f"message {index} of {len(value)} {invalid}")
    if value[-1]["role"] == "assistant":
        raise _invalid(
            "ends with an assistant message; end a prompt with the user (a start of the answer is answer_prefix)"
        )
    return value


def _labels(value: object) -> object:
    if not isinstance(value, list):
        raise _invalid(f"must be a list with one label per step, found {shown(value)}")
    try:
        label_kind(value)
    except DataError as error:
        raise _invalid(str(error)) from error
    return value


def _numbers(what: str, least: float = -sys.float_info.max, most: float = sys.float_info.max) -> pydantic.WrapValidator:
    """A list of numbers within bounds (None passes where the type has it); the message says which item does not fit."""

    def check(value: Any, handler: Callable[[Any], Any]) -> Any:
        if not isinstance(value, list):
            raise _invalid(f"must be a list of {what}, found {shown(value)}")
        try:
            handler(value)
            index = next((i for i, each in enumerate(value) if each is not None and not least <= each <= most), None)
        except pydantic.ValidationError as error:
            index = int(error.errors()[0]["loc"][0])
        if index is not None:
            place = f"item {index + 1} of {len(value)}"
            raise _invalid(f"{place} does not fit a list of {what}: found {shown(value[index])}")
        return value

    return pydantic.WrapValidator(check)


def _rate(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise _invalid(f"must be a number in [0, 1], found {shown(value)}")
    return value


Prompt = Annotated[Any, pydantic.PlainValidator(_prompt)]
"""Text, or chat messages that do not end with the assistant."""
Labels = Annotated[list[Any], pydantic.PlainValidator(_labels)]
"""One label per step, of one kind (see :func:`stepkd.steps.labels.label_kind`), at least one of them not null."""
_Whole = Annotated[int, pydantic.Field(strict=True)]
_Number = pydantic.InstanceOf[float] | _Whole
TokenIds = Annotated[list[_Whole], _numbers("token ids (whole numbers from 0)", 0)]
Logprobs = Annotated[list[_Number], _numbers("log-probabilities (finite, at most 0)", most=MAX_LOGPROB)]
Values = Annotated[list[_Number | None], _numbers("numbers in [0, 1] or null", 0, 1)]
Rate = Annotated[Any, pydantic.PlainValidator(_rate)]


# --- the contracts -------------------------------------------------------------------------------------------------


class RowModel(pydantic.BaseModel):
    """A kind of row: a field per column, and the checks that need more than one column.

    A field with a default is a column that a row may lack, or have as null.
    """

    model_config = pydantic.ConfigDict(strict=True, extra="ignore")
    name: ClassVar[str]
    """Used in messages, and in the table of sources."""
    names: ClassVar[tuple[str, ...]]
    """All known column names."""
    required: ClassVar[tuple[str, ...]]
    """The names of the columns that a row must have."""

    prompt: Prompt
    id: Filled | None = None
    answer: Filled | None = None

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        cls.names = tuple(cls.model_fields)
        cls.required = tuple(name for name, field in cls.model_fields.items() if field.is_required())


Contract = type[RowModel]


class ProblemRow(RowModel):
    """A problem with its gold answer; `solution` is a worked solution."""

    name = "problem"
    answer: Filled
    solution: Filled | None = None


class DemonstrationRow(RowModel):
    """A prompt with a worked solution, and perhaps no gold answer: enough for SFT, not for evaluation."""

    name = "demonstration"
    solution: Filled


class StepwiseRow(RowModel):
    """Step texts with one label each (TRL's stepwise-supervision type); a null label marks an unrated step.

    `step_values` and `pass_rate`, the share of the problem's samples that are correct, are for relative progress.
    """

    name = "stepwise"
    completions: Annotated[list[Filled], pydantic.Field(min_length=1)]
    labels: Labels
    outcome: bool | None = None
    step_values: Values | None = None
    pass_rate: Rate | None = None

    @pydantic.model_validator(mode="after")
    def _as_many(self) -> StepwiseRow:
        _same_length(self, "completions", "labels", "step_values")
        return self


class UnpairedRow(RowModel):
    """A completion that is desirable or not (TRL's unpaired preference type, what KTO reads)."""

    name = "unpaired"
    completion: Filled
    label: bool


class PreferenceRow(RowModel):
    """Two completions of one prompt, the better one first.

    `chosen_ids` and `rejected_ids` are those that were sampled, the end token included where there is one,
    `..._visits` how often a tree search came by.
    """

    name = "preference"
    chosen: Filled
    rejected: Filled
    chosen_ids: TokenIds | None = None
    rejected_ids: TokenIds | None = None
    chosen_visits: int | None = None
    rejected_visits: int | None = None

    @pydantic.model_validator(mode="after")
    def _sides_differ(self) -> PreferenceRow:
        if self.chosen == self.rejected:
            raise _invalid("is the same text as 'chosen'; such a pair teaches nothing, drop the row", column="rejected")
        return self


class StepPreferenceRow(PreferenceRow):
    """Two next steps after a shared `prefix` of steps (empty at the start of the solution).

    Texts keep their separators, so that ``"".join(prefix) + chosen`` is what was written; `prefix_ids` are the sampled
    ids of the prefix.
    """

    name = "step_preference"
    prefix: list[Filled]
    prefix_ids: TokenIds | None = None


class CompletionRow(RowModel):
    """A sampled completion with its token ids; `step_ends` are exclusive token ends; `correct` is null until graded.

    `logprobs` are under the distribution that was sampled from; `raw_logprobs`, where they differ, at temperature 1.
    `step_values` are chances of a correct answer estimated by continuations, `step_scores` what a step scorer says,
    `pass_rate` is the share of the problem's samples that are correct.
    """

    name = "completion"
    problem_id: Filled
    completion: Text
    token_ids: TokenIds
    logprobs: Logprobs
    step_ends: Annotated[list[_Whole], _numbers("token positions (whole numbers)")]
    finish: Literal["stop", "length"]
    correct: bool | None
    model: Filled
    sampling: dict[Any, Any]
    seed: int
    raw_logprobs: Logprobs | None = None
    step_labels: Labels | None = None
    step_values: Values | None = None
    step_scores: Values | None = None
    pass_rate: Rate | None = None

    @pydantic.model_validator(mode="after")
    def _fits_together(self) -> CompletionRow:
        _same_length(self, "token_ids", "logprobs", "raw_logprobs")
        if (invalid := ends_partition(self.step_ends, len(self.token_ids))) is not None:
            raise _invalid(invalid, column="step_ends")
        _same_length(self, "step_ends", "step_labels", "step_values", "step_scores")
        return self


def _same_length(row: RowModel, first: str, *others: str) -> None:
    count = len(getattr(row, first))
    for name in others:
        if (value := getattr(row, name)) is not None and len(value) != count:
            raise _invalid(f"has {len(value)} entries for {count} {first}; there must be as many", column=name)


def ends_partition(ends: Sequence[int], length: int) -> str | None:
    """What keeps exclusive step ends from cutting ``length`` tokens into non-empty steps without a rest, or None."""
    if not ends:
        return "has zero steps; drop the row or segment its completion"
    if ends[0] < 1 or any(a >= b for a, b in itertools.pairwise(ends)):
        return f"must be positive and strictly increasing (no empty step), found {shown(ends)}"
    if ends[-1] != length:
        return f"must end at the number of token_ids, {length}, found {ends[-1]}"
    return None


PROBLEM, DEMONSTRATION, STEPWISE, UNPAIRED = ProblemRow, DemonstrationRow, StepwiseRow, UnpairedRow
PREFERENCE, STEP_PREFERENCE, COMPLETION = PreferenceRow, StepPreferenceRow, CompletionRow
_TELLING: dict[Contract, set[str]] = {
    COMPLETION: {"token_ids", "completion"},
    STEPWISE: {"completions", "labels"},
    STEP_PREFERENCE: {"chosen", "rejected", "prefix"},
    PREFERENCE: {"chosen", "rejected"},
    UNPAIRED: {"completion", "label"},
    PROBLEM: {"prompt", "answer"},
    DEMONSTRATION: {"prompt", "solution"},
}
"""Contracts with the columns that tell them, the most specific first."""
CONTRACTS: dict[str, Contract] = {contract.name: contract for contract in _TELLING}
"""All contracts by name."""

Needs = Mapping[tuple[str, ...], str]
"""Columns of which a row must have one -> who reads it, for the message."""


def problem_with(needs: Needs, choices: Mapping[str, Collection[str]] = MappingProxyType({})) -> Contract:
    """A problem of which only the prompt and what somebody reads is required.

    Args:
        needs: what is read beside the prompt.
        choices: columns that choose something -> the values that they may have.
    """

    class Needed(ProblemRow):
        answer: Filled | None = None  # type: ignore[assignment]

        @pydantic.model_validator(mode="wrap")
        @classmethod
        def _is_read(cls, row: Any, handler: Callable[[Any], Any]) -> Any:
            model = handler(row)
            for names, reason in needs.items():
                if all(row.get(name) is None for name in names):
                    raise _invalid(
                        f"missing column {' or '.join(map(repr, names))}: {reason}. The row has {_listed(row)}; if "
                        f"another column holds it, say so with columns: {{{names[0]}: <that column>}}",
                        column=names[0],
                    )
            for name, known in choices.items():
                if (value := row.get(name)) not in list(known):  # a list is in no mapping
                    raise _invalid(
                        f"must name one of {', '.join(sorted(known))} in every row, found "
                        f"{shown(value) if name in row else 'no such column'}. The row has {_listed(row)}",
                        column=name,
                    )
            return model

    return Needed


def passed_on(row: Mapping[str, Any], *names: str) -> Row:
    """The named columns that a row has and that are not null."""
    return {name: row[name] for name in names if row.get(name) is not None}


# --- validation ----------------------------------------------------------------------------------------------------


def validate(
    row: Row,
    contract: Contract,
    *,
    path: str | Path | None = None,
    line: int | None = None,
    extra: ExtraRule = "check",
) -> Row:
    """Check a row against a contract.

    Args:
        row: the row; it is not changed.
        contract: what the row should be.
        path: the file or ``source:split`` the row came from, for the message.
        line: 1-based line or row number, for the message.
        extra: what to do with unknown columns (see the module's text): "check" or "keep".

    Returns:
        The same row object.

    Raises:
        DataError: the first thing that is incorrect, with file, line and column.
    """
    found = _slip(tuple(row), contract) if extra != "keep" else None
    if found is None:
        try:
            contract.model_validate(row)
            return row
        except pydantic.ValidationError as error:
            found = _place_and_words(error, row, contract)
    raise DataError(found[1], path=path, line=line, column=found[0])


def _place_and_words(error: pydantic.ValidationError, row: Row, contract: Contract) -> tuple[str, str]:
    """The column concerned, and what is wrong with it."""
    found = error.errors()[0]
    place = found["loc"]
    if not place:  # a check of several columns
        return found["ctx"]["column"], found["msg"]
    column = str(place[0])
    if found["type"] == "missing":
        return column, (
            f"missing column {column!r} of a {contract.name} row; the row has {_listed(row)}. "
            f"If another column holds it, say so with columns: {{{column}: <that column>}}"
        )
    step = f"step {int(place[1]) + 1} of {len(row[column])} " if len(place) > 1 else ""
    return column, step + _words(error)


def _listed(row: Mapping[str, Any]) -> str:
    return ", ".join(repr(name) for name in row) if row else "no columns"


@functools.lru_cache(maxsize=256)  # the rows of a file have the same columns
def _slip(columns: tuple[Any, ...], contract: Contract) -> tuple[str, str] | None:
    """The first unknown column that is spelt nearly like one that is lacking, and what to do about it."""
    absent = [name for name in contract.names if name not in columns]
    long = [name for name in absent if len(name) > 3]  # short ones (``id``) count only in another case
    for name in (each for each in map(str, columns) if each not in contract.names):
        close = difflib.get_close_matches(name.lower(), long, n=1, cutoff=0.8)
        if meant := name.lower() if name.lower() in absent else close and close[0]:
            return name, (
                f"unknown column {name!r}; did you mean {meant!r}? Rename it with columns: {{{meant}: {name}}}, or "
                "keep it under its name with extra_columns: keep"
            )
    return None


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
    for contract, names in _TELLING.items():
        if names <= set(row):
            return contract
    nearest = max(_TELLING, key=lambda each: sum(name in row for name in each.required) / len(each.required))
    lacking = [name for name in nearest.required if name not in row]
    hints = [f"{name}: <column>" for name in lacking]
    raise DataError(
        f"no row contract fits the columns {_listed(row)}; nearest is {nearest.name!r}, which lacks "
        f"{', '.join(map(repr, lacking))}. Map the file's names with columns: {{{', '.join(hints)}}}, "
        "or name the source the file comes from (for example gsm8k)",
        path=path,
        line=line,
    )


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
