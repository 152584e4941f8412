"""What a refiner is trained on, from labelled solutions alone: drafts with incorrect answers, and what corrects them.

Source: GLoRe (arXiv 2402.10963), which makes it of the data that its stepwise reward model was trained on: of the
samples of a problem, and of the continuations of every step's prefix, which ``MonteCarlo`` labels keep with
``keep_continuations``. How a row is written: :func:`~stepkd.search.revise.refine_prompt`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from stepkd.data.rows import passed_on
from stepkd.labels.convert import Converted, Preference, drop_repeated, holds_incorrect_step, solution_text
from stepkd.labels.labellers import Row, outcome_of
from stepkd.labels.quality import label_column, row_labels
from stepkd.randomness import generator
from stepkd.scorers.scorer import by_problem, problem_key, row_steps
from stepkd.search.revise import refine_prompt
from stepkd.steps.format import written_steps
from stepkd.steps.labels import first_incorrect

Target = tuple[str, str]
"""What corrects a draft from a step on, and the id of the solution that it comes from."""


@dataclass(frozen=True, kw_only=True)
class Refinements(Preference):
    """Drafts with incorrect answers as prompts, and what corrects them as solutions, to fine-tune a refiner on (GLoRe,
    arXiv 2402.10963): global rows as pairs are made; local ones mark the first incorrect step of a draft, and are
    answered by what follows its place in a correct solution with the same steps before it, or in a continuation that
    was kept."""

    kinds: Literal["both", "global", "local"] = "both"
    """Which rows are made; max_pairs is the most of each kind."""

    def convert(self, rows: Sequence[Row]) -> Converted:
        """See :class:`~stepkd.labels.convert.ConverterConfig`."""
        counts: Counter[str] = Counter()
        done: list[dict[str, Any]] = []
        for numbers in by_problem(rows):
            solutions = [rows[i] for i in numbers]
            if self.kinds != "local":
                pairs = self._pairs(problem_key(solutions[0]), solutions, counts)
                done += [self._global(draft, correct) for correct, draft in pairs]
                counts["global"] += len(pairs)
            if self.kinds != "global":
                found = self._locals(solutions, counts)
                done += found
                counts["local"] += len(found)
        return Converted(done, {"rows": len(done)} | dict(counts))

    def _global(self, draft: Row, correct: Row) -> dict[str, Any]:
        return self._refinement(draft, None, (solution_text(correct), str(correct.get("id", "?"))))

    def _locals(self, solutions: Sequence[Row], counts: Counter[str]) -> list[dict[str, Any]]:
        """The local rows of one problem; counts the drafts that give none."""
        distinct = drop_repeated([row for row in solutions if solution_text(row).strip()])
        correct = [
            row for row in distinct if outcome_of(row) and row.get("finish") != "length" and not self._unclean(row)
        ]
        drafts = [row for row in distinct if outcome_of(row) is False]
        found: list[dict[str, Any]] = []
        for number in generator(self.seed, "refinements", problem_key(solutions[0])).permutation(len(drafts)):
            draft = drafts[number]
            step = first_incorrect(row_labels(draft)) if draft.get(label_column(draft)) else None
            targets = [] if step is None or step < 0 else self._targets(draft, step, correct)
            if step is None:
                counts["drafts_without_a_known_first_error"] += 1
            elif step < 0:
                counts["drafts_without_an_incorrect_step"] += 1
            elif not targets:
                counts["drafts_without_a_correct_continuation"] += 1
            elif len(found) < self.max_pairs:
                draw = generator(self.seed, "refinement", str(draft.get("id", "?")))
                found.append(self._refinement(draft, step, targets[int(draw.integers(len(targets)))]))
            else:
                counts["drafts_beyond_max_pairs"] += 1
        return found

    def _unclean(self, row: Row) -> bool:
        return self.chosen_steps == "clean" and holds_incorrect_step(row)

    def _targets(self, draft: Row, step: int, correct: Sequence[Row]) -> list[Target]:
        """What ends correctly from the start of a draft's step, each text once."""
        steps = _steps(draft)
        found: dict[str, str] = {}
        kept = (draft.get("label_facts") or {}).get("continuations")
        if step and kept and kept[step - 1]:
            found[kept[step - 1]] = str(draft.get("id", "?"))
        for row in correct:
            if (other := _steps(row))[:step] == steps[:step]:
                found.setdefault("".join(other[step:]), str(row.get("id", "?")))
        return [(text, name) for text, name in found.items() if text.strip()]

    def _refinement(self, draft: Row, step: int | None, target: Target) -> dict[str, Any]:
        name, kind = str(draft.get("id", "?")), "global" if step is None else "local"
        text, source = target
        row = {"id": f"{name}/{kind}/{source}" if step is None else f"{name}/{kind}"}
        steps = (solution_text(draft),) if step is None else _steps(draft)
        row |= {"prompt": refine_prompt(draft["prompt"], steps, step), "solution": text}
        facts = {"kind": kind, "step": step, "draft": name, "target": source, "seed": self.seed}
        return row | passed_on(draft, "problem_id", "answer", "labelling") | {"refinement": facts}


def _steps(row: Row) -> tuple[str, ...]:
    """The texts of a row's steps, which joined are its solution."""
    return tuple(row["steps"]) if row.get("steps") else written_steps(row_steps(row))
