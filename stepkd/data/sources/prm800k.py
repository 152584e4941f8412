"""PRM800K: human step ratings of solutions to MATH problems (Lightman et al. 2023, arXiv 2305.20050).

The files are Git LFS objects of github ``openai/prm800k`` (``phase1_train.jsonl``, ``phase1_test.jsonl``, and the same
for phase 2); give their ``path``. TRL's processed form on the hub, ``trl-lib/prm800k``, has TRL's columns already: read
it with source ``rows``. Two layouts are read:

*Released lines* (github ``openai/prm800k``, whose README describes them): ``question`` (``problem``,
``ground_truth_answer``, ...), ``label`` (``steps``, ``finish_reason``), ``is_quality_control_question``, ... A chosen
step is ``completions[chosen_completion]``, or ``human_completion`` where a labeller wrote it. A text that ends the
solution carries a tail ``# Answer`` with the stated answer.

*One record per trajectory*: ``problem``, ``steps``, ``labels``, ``alternatives`` (per position the completions that
were not chosen, as objects with ``text`` and ``rating``), ``final_answer``; the tail is split off already.

Each record gives several step-labelled rows. The chosen path holds correct (and in phase 2 neutral) steps only;
**incorrect steps are among the alternatives**: an alternative at position i gives the trajectory
``path[:i] + [alternative]``. Its prefix stands in the chosen path too. With its ratings kept, the first steps of a
record would be counted once per alternative, all of them positive, so they are null there.

Skipped: alternatives without a rating, flagged, or empty; one that repeats the chosen step; repeats of one text at one
position (the first stays), and such texts altogether when their ratings differ. A trajectory without a rated step is
no row.

The test problems are MATH-500 problems: files named ``..._test`` and the split ``test`` are for evaluation only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from stepkd.data.rows import STEPWISE, Row, shown
from stepkd.data.sources.registry import Options, RawRow, Source, SourceOption, register
from stepkd.errors import ConfigError
from stepkd.randomness import generator

_TAIL = re.compile(r"\s*# Answer\s*\n\s*(?P<answer>.*?)\s*", re.DOTALL)


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


_Rating = Annotated[int, Field(ge=-1, le=1)] | None  # a Literal would take true and 1.0 for 1


class RatedStep(_Part):
    """One step text with what a labeller said of it."""

    text: str
    """The step."""
    rating: _Rating = None
    """1 good, 0 neutral, -1 bad; None: not rated."""
    flagged: Any = None
    """Whether the labeller marked it as unclear."""
    answer: Any = None
    """The answer it states where it ends the solution."""

    def read(self) -> RatedStep | None:
        """Without its tail and, where it was flagged, its rating; None for an empty text: nothing can follow it."""
        text, answer = _split_tail(self.text)
        if not text.strip():
            return None
        return RatedStep(text=text, rating=None if self.flagged else self.rating, answer=answer or _stated(self.answer))


class _Position(_Part):
    completions: list[RatedStep] | None = None
    chosen_completion: Any = None
    human_completion: Annotated[
        RatedStep | None, BeforeValidator(lambda value: {"text": value} if isinstance(value, str) else value)
    ] = None


class _Label(_Part):
    steps: list[_Position]


class _Released(_Part):
    question: dict[str, Any]
    label: _Label


class _Trajectory(_Part):
    steps: list[str]
    labels: list[_Rating]
    alternatives: list[list[RatedStep]] | None = None


@dataclass(frozen=True)
class Record:
    """One labelled trajectory."""

    name: str
    """Unique in its file."""
    problem: object
    """The problem's text, for the contract to judge."""
    path: tuple[RatedStep, ...]
    """The chosen steps."""
    alternatives: tuple[tuple[RatedStep, ...], ...]
    """Per position the steps that were not chosen; at most one position more than ``path``."""
    answer: str | None = None
    """Gold answer, where the layout has it."""
    solved: bool | None = None
    """Whether the path ends in the correct answer; None: the layout does not say."""


def read_record(raw: RawRow) -> Record | None:
    """Read a row of either layout, told apart by its columns.

    Args:
        raw: the row.

    Returns:
        The record; None for quality-control and screening questions, and for records that ended in ``bad_problem`` or
        ``give_up``. (A file of trajectories no longer says which these were.)

    Raises:
        DataError: neither layout, or a value that does not fit its layout.
    """
    if "question" in raw and "label" in raw:
        return _released(raw)
    if "prompt" in raw and "completions" in raw and "labels" in raw:
        return _trajectory(raw)
    raise raw.error(
        "fits neither layout of PRM800K: released lines have 'question' and 'label', trajectories have 'problem', "
        f"'steps' and 'labels'; this row has {', '.join(map(repr, raw)) or 'none of them'}. "
        "TRL's form (trl-lib/prm800k) is read by source 'rows'"
    )


_Layout = TypeVar("_Layout", bound=_Part)


def _read(layout: type[_Layout], values: Mapping[str, Any], raw: RawRow) -> _Layout:
    try:
        return layout.model_validate(dict(values))
    except ValidationError as error:
        found = error.errors()[0]
    name = "".join(f"[{each}]" if isinstance(each, int) else f".{each}" for each in found["loc"])[1:]
    raise raw.error(f"{name}: {found['msg']}, found {shown(found['input'])}", column=str(found["loc"][0]))


def _released(raw: RawRow) -> Record | None:
    finish = raw["label"].get("finish_reason") if isinstance(raw["label"], Mapping) else None
    checks = ("is_quality_control_question", "is_initial_screening_question")
    if any(raw.get(name) for name in checks) or finish in ("bad_problem", "give_up"):
        return None
    read = _read(_Released, raw, raw)
    path: list[RatedStep] = []
    beside: list[tuple[RatedStep, ...]] = []
    for number, position in enumerate(read.label.steps):
        steps = [step.read() for step in position.completions or ()]
        index = position.chosen_completion
        chosen = None if position.human_completion is None else position.human_completion.read()
        if index is not None:
            if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(steps):
                raise raw.error(
                    f"label.steps[{number}].chosen_completion is {shown(index)}, with {len(steps)} completions; must "
                    "be null or an index",
                    column="label",
                )
            chosen = steps[index]
        beside.append(tuple(step for i, step in enumerate(steps) if step is not None and i != index))
        if chosen is None:  # nothing was chosen: the trajectory ends here
            break
        path.append(chosen)
    labeler, time = raw.get("labeler"), raw.get("timestamp")
    return Record(
        name=f"{labeler}/{time}" if labeler and time else f"{Path(raw.path).stem}/{raw.line}",
        problem=read.question.get("problem"),
        path=tuple(path),
        alternatives=tuple(beside),
        answer=_stated(read.question.get("ground_truth_answer")),
        solved=True if finish == "solution" else None,
    )


def _stated(answer: object) -> str | None:
    return answer if isinstance(answer, str) and answer.strip() else None


def _trajectory(raw: RawRow) -> Record:
    columns = {"steps": raw["completions"], "labels": raw["labels"], "alternatives": raw.get("alternatives")}
    read = _read(_Trajectory, columns, raw)
    count, positions = len(read.steps), read.alternatives or []
    if count != len(read.labels):
        raise raw.error(f"has {len(read.labels)} entries for {count} steps; there must be as many", column="labels")
    if len(positions) > count + 1:
        raise raw.error(
            f"has {len(positions)} positions for {count} steps; there can be one more than steps at most",
            column="alternatives",
        )
    finals = [*[None] * (count - 1), _stated(raw.get("final_answer"))]
    parts = zip(read.steps, read.labels, finals, strict=False)  # a path may be empty
    identity = raw.get("id")
    return Record(
        name=f"{Path(raw.path).stem}/{raw.line}" if identity is None else str(identity),
        problem=raw["prompt"],
        path=tuple(RatedStep(text=text, rating=rating, answer=answer) for text, rating, answer in parts),
        alternatives=tuple(tuple(step for each in beside if (step := each.read()) is not None) for beside in positions),
    )


def _split_tail(text: str) -> tuple[str, str | None]:
    head, mark, _ = text.rpartition("# Answer")
    tail = _TAIL.fullmatch(text, len(head.rstrip())) if mark else None
    if tail is None or not tail["answer"] or not head.strip():
        return text, None
    return head.rstrip(), tail["answer"]


# --- rows ------------------------------------------------------------------------------------------------------------


_Alternative = tuple[int, int, RatedStep]
"""Position, number there, and the step."""


def _map(raw: RawRow, options: Options) -> list[Row]:
    if options["per_record"] < 0:
        raise ConfigError(f"option per_record={options['per_record']} of source 'prm800k': must be 0 (all) or more")
    record = read_record(raw)
    if record is None:
        return []
    chosen = _row(record, "chosen", record.path, [step.rating for step in record.path])
    rows = [chosen | ({} if record.solved is None else {"outcome": record.solved})]
    for position, number, step in _picked(_alternatives(record), record, options):
        labels = [*[None] * position, step.rating]
        rows.append(_row(record, f"{position}-{number}", (*record.path[:position], step), labels))
    return [row for row in rows if any(label is not None for label in row["labels"])]


def _row(record: Record, name: str, steps: tuple[RatedStep, ...], labels: list[int | None]) -> Row:
    row: Row = {"prompt": record.problem, "completions": [step.text for step in steps], "labels": labels}
    if record.answer is not None:
        row["answer"] = record.answer
    if steps and steps[-1].answer is not None:
        row["final_answer"] = steps[-1].answer
    return row | {"id": f"{record.name}/{name}", "kind": "chosen" if name == "chosen" else "alternative"}


def _alternatives(record: Record) -> list[_Alternative]:
    """The alternatives that may become rows, in the record's order."""
    found = []
    for position, steps in enumerate(record.alternatives):
        ratings: dict[str, set[int]] = {}
        for step in steps:
            if step.rating is not None:
                ratings.setdefault(step.text, set()).add(step.rating)
        seen = {record.path[position].text} if position < len(record.path) else set()
        for number, step in enumerate(steps):
            if step.rating is not None and step.text not in seen and len(ratings[step.text]) == 1:
                seen.add(step.text)
                found.append((position, number, step))
    return found


def _picked(found: list[_Alternative], record: Record, options: Options) -> list[_Alternative]:
    """At most ``per_record`` of them, half of them incorrect (the odd one too) as far as there are that many."""
    most = options["per_record"]
    if most == 0 or len(found) <= most:
        return found
    order = generator(options["seed"], "prm800k alternatives", record.name).permutation(len(found)).tolist()
    bad = [index for index in order if found[index][2].rating == -1]
    other = [index for index in order if found[index][2].rating != -1]
    num_bad = max(min(len(bad), (most + 1) // 2), most - len(other))
    return [found[index] for index in sorted(bad[:num_bad] + other[: most - num_bad])]


register(
    Source(
        name="prm800k",
        help="PRM800K: human ratings of solution steps, MATH problems",
        contract=STEPWISE,
        map_row=_map,
        reads={
            "prompt": ("problem",),
            "completions": ("steps",),
            "labels": ("labels",),
            "alternatives": ("alternatives",),
            "final_answer": ("final_answer",),
            "id": ("id",),
        },
        requires=frozenset(),
        keeps=(
            *("question", "label", "is_quality_control_question", "is_initial_screening_question"),
            *("labeler", "timestamp"),
        ),
        splits={name: name for name in ("train", "test", "phase1_train", "phase1_test", "phase2_train", "phase2_test")},
        evaluation_only=frozenset({"test", "phase1_test", "phase2_test"}),
        options={
            "per_record": SourceOption(0, "at most so many alternatives per record, half of them incorrect; 0: all"),
            "seed": SourceOption(0, "seed of the choice that per_record makes"),
        },
    )
)
