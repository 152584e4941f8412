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
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from stepkd.data.rows import Row, passed_on, shown
from stepkd.data.sources.source import Options, RawRow
from stepkd.errors import ConfigError
from stepkd.randomness import generator

_TAIL = re.compile(r"\s*# Answer\s*\n\s*(?P<answer>.*?)\s*", re.DOTALL)


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


_Rating = Annotated[int, Field(ge=-1, le=1)] | None  # a Literal would take true and 1.0 for 1


class _Step(_Part):
    text: str
    rating: _Rating = None
    """1 good, 0 neutral, -1 bad; None: not rated."""
    flagged: Any = None
    """Whether the labeller marked it as unclear."""
    answer: Any = None
    """The answer it states where it ends the solution."""

    def read(self) -> _Step | None:
        """Without its tail and, where it was flagged, its rating; None for an empty text: nothing can follow it."""
        head, mark, _ = self.text.rpartition("# Answer")
        tail = _TAIL.fullmatch(self.text, len(head.rstrip())) if mark else None
        split = tail is not None and tail["answer"] and head.strip()
        text, answer = (head.rstrip(), tail["answer"]) if tail is not None and split else (self.text, self.answer)
        rating = None if self.flagged else self.rating
        return _Step(text=text, rating=rating, answer=_stated(answer)) if text.strip() else None


class _Position(_Part):
    completions: list[_Step] | None = None
    chosen_completion: Any = None
    human_completion: Annotated[
        _Step | None, BeforeValidator(lambda value: {"text": value} if isinstance(value, str) else value)
    ] = None


class _Label(_Part):
    steps: list[_Position]


class _Released(_Part):
    question: dict[str, Any]
    label: _Label


class _Trajectory(_Part):
    steps: list[str]
    labels: list[_Rating]
    alternatives: list[list[_Step]] | None = None


_Layout = TypeVar("_Layout", bound=_Part)


def _read(layout: type[_Layout], values: Mapping[str, Any], raw: RawRow) -> _Layout:
    try:
        return layout.model_validate(dict(values))
    except ValidationError as error:
        found = error.errors()[0]
    name = "".join(f"[{each}]" if isinstance(each, int) else f".{each}" for each in found["loc"])[1:]
    raise raw.error(f"{name}: {found['msg']}, found {shown(found['input'])}", column=str(found["loc"][0]))


def _stated(answer: object) -> str | None:
    return answer if isinstance(answer, str) and answer.strip() else None


def rated_rows(raw: RawRow, options: Options) -> list[Row]:
    """Rows of a record of either layout, told apart by its columns: its chosen path, and its alternatives.

    None of quality-control and screening questions, and of records that ended in ``bad_problem`` or ``give_up``. (A
    file of trajectories no longer says which these were.)

    Raises:
        DataError: neither layout, or a value that does not fit its layout.
    """
    if options["per_record"] < 0:
        raise ConfigError(f"option per_record={options['per_record']} of source 'prm800k': must be 0 (all) or more")
    if "question" in raw and "label" in raw:
        finish = raw["label"].get("finish_reason") if isinstance(raw["label"], Mapping) else None
        checks = ("is_quality_control_question", "is_initial_screening_question")
        if any(raw.get(name) for name in checks) or finish in ("bad_problem", "give_up"):
            return []
        read = _read(_Released, raw, raw)
        positions, problem = read.label.steps, read.question.get("problem")
        identity = f"{raw['labeler']}/{raw['timestamp']}" if raw.get("labeler") and raw.get("timestamp") else None
        known: Row = {"answer": _stated(read.question.get("ground_truth_answer"))}
        solved: Row = {"outcome": True} if finish == "solution" else {}
    elif "prompt" in raw and "completions" in raw and "labels" in raw:
        positions, problem, identity, known, solved = _trajectory(raw), raw["prompt"], raw.get("id"), {}, {}
    else:
        raise raw.error(
            "fits neither layout of PRM800K: released lines have 'question' and 'label', trajectories have 'problem', "
            f"'steps' and 'labels'; this row has {', '.join(map(repr, raw)) or 'none of them'}. "
            "TRL's form (trl-lib/prm800k) is read by source 'rows'"
        )
    record = f"{Path(raw.path).stem}/{raw.line}" if identity is None else str(identity)

    def row(name: str, steps: Sequence[_Step], labels: list[int | None]) -> Row:
        stated = {"final_answer": steps[-1].answer if steps else None} | known
        kind = "chosen" if name == "chosen" else "alternative"
        texts = {"prompt": problem, "completions": [step.text for step in steps], "labels": labels}
        return texts | passed_on(stated, *stated) | {"id": f"{record}/{name}", "kind": kind}

    path: list[_Step] = []
    found: list[Row] = []  # of every alternative that may become one
    for number, position in enumerate(positions):
        steps = [step.read() for step in position.completions or ()]
        index, human = position.chosen_completion, position.human_completion
        if index is not None and (type(index) is not int or not 0 <= index < len(steps)):
            raise raw.error(
                f"label.steps[{number}].chosen_completion is {shown(index)}, with {len(steps)} completions; must be "
                "null or an index",
                column="label",
            )
        chosen = steps[index] if index is not None else human and human.read()
        beside = [step for i, step in enumerate(steps) if step is not None and i != index]
        for i, step in _distinct(beside, chosen):
            found.append(row(f"{number}-{i}", [*path, step], [*[None] * number, step.rating]))
        if chosen is None:  # nothing was chosen: the trajectory ends here
            break
        path.append(chosen)
    rows = [row("chosen", path, [step.rating for step in path]) | solved]
    rows += _picked(found, record, options)
    return [each for each in rows if any(label is not None for label in each["labels"])]


def _trajectory(raw: RawRow) -> list[_Position]:
    """The positions of a trajectory: its steps, as if labellers had written them, and the alternatives of each."""
    columns = {"steps": raw["completions"], "labels": raw["labels"], "alternatives": raw.get("alternatives")}
    read = _read(_Trajectory, columns, raw)
    count, beside = len(read.steps), read.alternatives or []
    if count != len(read.labels):
        raise raw.error(f"has {len(read.labels)} entries for {count} steps; there must be as many", column="labels")
    if blank := [number for number, text in enumerate(read.steps) if not text.strip()]:
        raise raw.error(f"steps[{blank[0]}] is empty: what follows would have no prefix", column="steps")
    if len(beside) > count + 1:
        raise raw.error(
            f"has {len(beside)} positions for {count} steps; there can be one more than steps at most",
            column="alternatives",
        )
    path = [_Step(text=text, rating=rating) for text, rating in zip(read.steps, read.labels, strict=True)]
    path[-1:] = [step.model_copy(update={"answer": raw.get("final_answer")}) for step in path[-1:]]
    return [_Position(completions=steps, human_completion=step) for step, steps in zip_longest(path, beside)]


def _distinct(steps: Sequence[_Step], chosen: _Step | None) -> list[tuple[int, _Step]]:
    """Numbers and steps of a position's rated alternatives; of repeats the first, and none whose ratings differ."""
    ratings: dict[str, set[int]] = {}
    firsts: dict[str, tuple[int, _Step]] = {}
    for i, step in enumerate(steps):
        if step.rating is not None:
            ratings.setdefault(step.text, set()).add(step.rating)
            firsts.setdefault(step.text, (i, step))
    known = "" if chosen is None else chosen.text
    return [each for text, each in firsts.items() if text != known and len(ratings[text]) == 1]


def _picked(found: list[Row], record: str, options: Options) -> list[Row]:
    """At most ``per_record`` of them, half of them incorrect (the odd one too) as far as there are that many."""
    most = options["per_record"]
    if most == 0 or len(found) <= most:
        return found
    order = generator(options["seed"], "prm800k alternatives", record).permutation(len(found)).tolist()
    bad = [index for index in order if found[index]["labels"][-1] == -1]
    other = [index for index in order if found[index]["labels"][-1] != -1]
    num_bad = max(min(len(bad), (most + 1) // 2), most - len(other))
    return [found[index] for index in sorted(bad[:num_bad] + other[: most - num_bad])]
