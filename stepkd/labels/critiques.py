"""Rows that teach a model to judge steps: requests for critiques with the verdict that labels ask for, critiques graded
by it, and solutions whose steps carry a tag.

Sources: critiques that agree with the labels as demonstrations (ThinkPRM, arXiv 2504.16828), as the better side of
pairs (R-PRM, arXiv 2503.21295), the verdict as reward (StepWiser, arXiv 2508.19229); tags by which one model reasons
and says what it thinks of each step (KG-TRACES, arXiv 2506.00783).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stepkd.data.rows import check_unique_ids, passed_on
from stepkd.errors import ConfigError, DataError
from stepkd.labels.convert import Converted, ConverterConfig, balance_by_prefix_length
from stepkd.labels.labellers import Row
from stepkd.labels.quality import label_column, row_labels
from stepkd.scorers.critiques import FORMS, CritiqueForm, get_form
from stepkd.scorers.scorer import row_steps
from stepkd.steps.format import written_steps
from stepkd.steps.labels import verdicts


@dataclass(frozen=True, kw_only=True)
class Critiques(ConverterConfig):
    """Requests for critiques of labelled solutions, with the verdict that the labels ask for as answer: problems for
    GRPO, evaluation or sampling. Of rows that a Critic has scored, its critiques; their outcome is whether the verdict
    is that: rows for Demonstrations (SFT) and Preference (DPO)."""

    form: str = "step"
    """What is asked, as for the Critic: step, processbench, task, or a YAML file."""
    balance_seed: int | None = None
    """Seed by which requests in surplus are drawn and dropped, so that at every step number as many steps are correct
    as incorrect (of a form with a verdict per step); the default keeps all. Balanced, before this converter, would drop
    labels that say where the first incorrect step is."""

    def __post_init__(self) -> None:
        if get_form(self.form).words is None and self.balance_seed is not None:
            raise ConfigError(
                f"balance_seed={self.balance_seed}: form {self.form!r} has one verdict per solution, not one per step; "
                "drop it, or take a form with a verdict per step"
            )

    def convert(self, rows: Sequence[Row]) -> Converted:
        """See :class:`~stepkd.labels.convert.ConverterConfig`; critiques without a verdict count as such, and as ones
        that disagree. Rows must have ids of their own, by which critiques of one request are told."""
        form = get_form(self.form)
        if any(row.get("id") is None for row in rows):
            raise DataError("a row has no id, by which its critiques are told from others': give each one", column="id")
        check_unique_ids(rows, path="the labelled rows")
        counts: Counter[str] = Counter()
        done: list[dict[str, Any]] = []
        marked = [_marked(row) for row in rows]
        asked = [list(form.questions(row, steps)) for row, (steps, _) in zip(rows, marked, strict=True)]
        golds = [[form.gold(marks, step) for step, _ in each] for each, (_, marks) in zip(asked, marked, strict=True)]
        critiques = [_written(row, form) for row in rows]
        if None in critiques and (scored := len(critiques) - critiques.count(None)):
            raise DataError(
                f"{scored} of {len(rows)} rows have a Critic's critiques: score all of them, or none, as problems and "
                "graded critiques are rows of two kinds",
                column="score_facts",
            )
        left: Sequence[Sequence[Any]] = golds
        if self.balance_seed is not None:
            left = balance_by_prefix_length([list(map(form.meaning, each)) for each in golds], self.balance_seed)
        for row, written, questions, gold_S, left_S in zip(rows, critiques, asked, golds, left, strict=True):
            name = row["id"]
            for (step, prompt), gold, kept in zip(questions, gold_S, left_S, strict=True):
                if gold is None or kept is None:
                    counts["without_a_label" if gold is None else "in_surplus"] += 1
                    continue
                key = f"{name}/critique" if step is None else f"{name}/critique-{step}"
                problem = {"id": key, "prompt": prompt, "answer": gold}
                if written is None:
                    done.append(problem)
                    continue
                mine = [one for one in written if one["step"] == step]
                if not mine:  # the request left no room for one
                    counts["without_a_critique"] += 1
                for j, each in enumerate(mine):
                    meaning = form.meaning(form.read(each["text"]))
                    agrees = meaning is not None and meaning == form.meaning(gold)
                    counts["without_a_verdict" if meaning is None else "agree" if agrees else "disagree"] += 1
                    if each["text"].strip():
                        graded = {"completions": [each["text"]], "labels": [agrees], "outcome": agrees}
                        done.append(
                            problem | {"id": f"{key}/{j}", "problem_id": key, "finish": each["finish"]} | graded
                        )
        return Converted(done, {"rows": len(done)} | dict(sorted(counts.items())))


@dataclass(frozen=True, kw_only=True)
class Tagged(ConverterConfig):
    """Solutions whose labelled steps end in a tag that says what the label does, to fine-tune a model that judges its
    own steps as it writes them."""

    correct: str
    """Token behind a correct step: a special token of the model, so that texts do not show it (policy.special_tokens
    makes one of any)."""
    incorrect: str
    """Token behind an incorrect step."""

    def __post_init__(self) -> None:
        if not self.correct or not self.incorrect or self.correct == self.incorrect:
            raise ConfigError(f"tags {self.correct!r} and {self.incorrect!r}: two different tokens")

    def convert(self, rows: Sequence[Row]) -> Converted:
        """See :class:`~stepkd.labels.convert.ConverterConfig`; the tag stands before the separator."""
        counts: Counter[str] = Counter()
        done = []
        for row in rows:
            text, (steps, marks) = "", _marked(row)
            for step, correct in zip(written_steps(steps), marks, strict=True):
                if self.correct in step or self.incorrect in step:
                    raise DataError(
                        f"a step holds the tag already: {step.strip()[:60]!r}; choose other tokens",
                        path=str(row.get("id", "?")),
                    )
                body = step.rstrip()
                tag = "" if correct is None else self.correct if correct else self.incorrect
                text += body + tag + step[len(body) :]
                counts["unlabelled" if correct is None else "correct" if correct else "incorrect"] += 1
            kept = passed_on(row, "id", "answer", "problem_id", "task", "meta", "labelling")
            done.append({"prompt": row["prompt"], "solution": text} | kept)
        return Converted(done, {"rows": len(done)} | dict(sorted(counts.items())))


def _written(row: Row, form: CritiqueForm) -> list[dict[str, Any]] | None:
    """The critiques of a row that a Critic has scored, else None.

    Raises:
        DataError: they were asked for in another form.
    """
    facts = row.get("score_facts") or {}
    critiques: list[dict[str, Any]] | None = facts.get("critiques")
    if critiques is not None and facts.get("form") != form.id:
        asked = next((name for name, each in FORMS.items() if each.id == facts.get("form")), None)
        why = f"were asked for in form {asked}" if asked else "name another form than --to.form, or none"
        raise DataError(
            f"its critiques {why}: give --to.form the Critic's, or score the rows again",
            path=str(row.get("id", "?")),
            column="score_facts",
        )
    return critiques


def _marked(row: Row) -> tuple[list[str], list[bool | None]]:
    """Steps of a row, and what the label of each says."""
    steps, marks = row_steps(row), verdicts(row_labels(row))
    if len(steps) != len(marks):
        raise DataError(
            f"{len(steps)} steps and {len(marks)} labels: give one label for each step",
            path=str(row.get("id", "?")),
            column=label_column(row),
        )
    return steps, marks
