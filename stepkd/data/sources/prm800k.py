"""PRM800K: human step ratings of solutions to MATH problems (Lightman et al. 2023, arXiv 2305.20050).

The files are Git LFS objects of github ``openai/prm800k`` (``phase1_train.jsonl``, ``phase1_test.jsonl``, and the same
for phase 2); give their ``path``. TRL's processed form on the hub, ``trl-lib/prm800k``, has TRL's columns already: read
it with source ``rows``. Both layouts in :mod:`stepkd.data.sources.prm800k_layouts` are read here.

Each record gives several step-labelled rows. The chosen path holds right (and in phase 2 neutral) steps only; **wrong
steps are among the alternatives**: an alternative at position i gives the trajectory ``path[:i] + [alternative]``. Its
prefix stands in the chosen path too. With its ratings kept, the first steps of a record would be counted once per
alternative, all of them positive, so they are null there as long as the chosen path is a row of its own.

Skipped: alternatives without a rating, flagged, or empty; one that repeats the chosen step; repeats of one text at one
position (the first stays), and such texts altogether when their ratings differ. A trajectory without a rated step is
no row.

The test problems are MATH-500 problems: files named ``..._test`` and the split ``test`` are for evaluation only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stepkd.data.rows import STEPWISE
from stepkd.data.sources.prm800k_layouts import RatedStep, Record, read_record
from stepkd.data.sources.registry import Option, Options, RawRow, Row, Source, register
from stepkd.errors import ConfigError, check_choice
from stepkd.randomness import generator


@dataclass(frozen=True)
class _Alternative:
    position: int
    number: int
    step: RatedStep


def _map(raw: RawRow, options: Options) -> list[Row]:
    _check(options)
    record = read_record(raw, keep_unfinished=options["keep_unfinished"])
    if record is None:
        return []
    rows = [_chosen_row(record, options)] if options["chosen"] else []
    masked = options["prefix_labels"] == "mask" or (options["prefix_labels"] == "auto" and options["chosen"])
    for found in _picked(_alternatives(record, options), record, options):
        prefix = record.path[: found.position]
        labels = [None if masked else step.rating for step in prefix]
        row = _row(record, (*prefix, found.step), [*labels, found.step.rating], options)
        rows.append(row | {"id": f"{record.name}/{found.position}-{found.number}", "kind": "alternative"})
    return [row for row in rows if any(label is not None for label in row["labels"])]


def _check(options: Options) -> None:
    for name, value in options.items():
        if value is None:
            raise ConfigError(f"option {name} of source 'prm800k' is null; leave it out for its default")
    check_choice("option alternatives of source 'prm800k'", options["alternatives"], ("all", "negative", "none"))
    check_choice("option prefix_labels of source 'prm800k'", options["prefix_labels"], ("auto", "keep", "mask"))
    if options["per_record"] < 0:
        raise ConfigError(f"option per_record={options['per_record']} of source 'prm800k': must be 0 (all) or more")
    if not options["chosen"] and options["alternatives"] == "none":
        raise ConfigError("source 'prm800k' with chosen=false and alternatives=none gives no rows; keep one of them")


def _chosen_row(record: Record, options: Options) -> Row:
    row = _row(record, record.path, [step.rating for step in record.path], options)
    outcome = {} if record.solved is None else {"outcome": record.solved}
    return row | outcome | {"id": f"{record.name}/chosen", "kind": "chosen"}


def _row(record: Record, steps: Sequence[RatedStep], labels: list[int | None], options: Options) -> Row:
    row: Row = {
        "prompt": record.problem,
        "completions": [step.written(tail=options["answer_tail"]) for step in steps],
        "labels": labels,
    }
    if record.answer is not None:
        row["answer"] = record.answer
    if steps and steps[-1].final_answer is not None:
        row["final_answer"] = steps[-1].final_answer
    return row


def _alternatives(record: Record, options: Options) -> list[_Alternative]:
    """The alternatives that may become rows, in the record's order."""
    found = []
    kinds = {"all": (-1, 0, 1), "negative": (-1,), "none": ()}[options["alternatives"]]
    for position, steps in enumerate(record.alternatives):
        ratings: dict[str, set[int]] = {}
        for step in steps:
            if step.rating is not None:
                ratings.setdefault(step.text, set()).add(step.rating)
        seen = {record.path[position].text} if position < len(record.path) else set()
        for number, step in enumerate(steps):
            if step.rating is None or step.text in seen or len(ratings[step.text]) > 1:
                continue
            seen.add(step.text)
            if step.rating in kinds:
                found.append(_Alternative(position, number, step))
    return found


def _picked(found: list[_Alternative], record: Record, options: Options) -> list[_Alternative]:
    """At most ``per_record`` of them, half of them wrong (the odd one too) as far as there are that many."""
    most = options["per_record"]
    if most == 0 or len(found) <= most:
        return found
    order = generator(options["seed"], "prm800k alternatives", record.name).permutation(len(found)).tolist()
    wrong = [index for index in order if found[index].step.rating == -1]
    other = [index for index in order if found[index].step.rating != -1]
    num_wrong = max(min(len(wrong), (most + 1) // 2), most - len(other))
    return [found[index] for index in sorted(wrong[:num_wrong] + other[: most - num_wrong])]


PRM800K = register(
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
        optional=frozenset({"prompt", "completions", "labels", "alternatives", "final_answer", "id"}),
        keeps=(
            "question", "label", "is_quality_control_question", "is_initial_screening_question", "labeler", "timestamp",
        ),
        splits={
            name: name
            for name in ("train", "test", "phase1_train", "phase1_test", "phase2_train", "phase2_test")
        },
        evaluation_only=frozenset({"test", "phase1_test", "phase2_test"}),
        options={
            "alternatives": Option("all", "trajectories that end in a step not chosen: all, negative (wrong) or none"),
            "chosen": Option(True, "a row for the chosen path"),
            "per_record": Option(0, "at most so many alternatives per record, half of them wrong; 0: all"),
            "seed": Option(0, "seed of the choice that per_record makes"),
            "prefix_labels": Option("auto", "an alternative's prefix labels: keep, mask, or auto (mask with chosen)"),
            "keep_unfinished": Option(False, "keep records marked bad_problem or give_up"),
            "answer_tail": Option(False, "write the '# Answer' tail where a step ends the solution"),
        },
    )
)  # fmt: skip
"""The PRM800K source."""
