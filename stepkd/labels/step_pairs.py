"""Step-DPO pairs: a solution's first wrong step against the first step of a continuation that ends right.

For every solution with a wrong step, the correct steps before it are continued; continuations with the right answer
give the better step. Both sides are single steps behind the same prefix, in the ids that were sampled.

Source: Step-DPO (Lai et al. 2024, arXiv 2406.18629), section 3.2.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, cast

from stepkd.data.completion import Completion
from stepkd.errors import ConfigError, DataError
from stepkd.labels.labellers import Solution, StepCheck
from stepkd.labels.monte_carlo import NextStep, next_step, segmenter_of, text_until_stop
from stepkd.labels.settings import StepPairConfig
from stepkd.labels.solutions import PROBLEM_COLUMNS, Row, cut
from stepkd.labels.sources import GivenSolutions
from stepkd.labels.workbench import Workbench, load_judge, open_workbench, pair_record
from stepkd.models.checkpoint import weights_fingerprint
from stepkd.models.policy import Policy
from stepkd.sampling.sampler import Branch, BranchRollouts, BranchSampler
from stepkd.sampling.transformers_sampler import TransformersSampler
from stepkd.steps.labels import verdicts
from stepkd.steps.segment import Segmenter, get_segmenter
from stepkd.tasks.rows import is_task_row

PURPOSE = "step_preference"
_LIGHT = 256  # rows per group where nothing is drawn


@dataclass(frozen=True)
class _Wrong:
    """A solution and its first wrong step."""

    index: int
    row: Row
    solution: Solution
    step: int

    @property
    def cut(self) -> int:
        """Length of the correct prefix in tokens."""
        return self.solution.spans[self.step][0]

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        return self.solution.completion_ids[: self.cut]


def first_wrong_step(row: Row, spec: StepPairConfig) -> int | str:
    """Number of the first wrong step of a row, all steps before it being right; or why there is no use for it.

    Reasons: ``no_labels``, ``ungraded``, ``right_answer``, ``no_wrong_step``, ``first_error_unknown`` (an unlabelled
    step before it), ``wrong_step_cut_off``.
    """
    labels = row.get("step_labels")
    if labels is None or all(label is None for label in labels):
        return "no_labels"
    if spec.take == "wrong" and row["correct"] is not False:
        return "ungraded" if row["correct"] is None else "right_answer"
    marks = verdicts(labels, neutral=spec.neutral, threshold=spec.threshold)
    if False not in marks:
        return "no_wrong_step"
    step = marks.index(False)
    if None in marks[:step]:
        return "first_error_unknown"
    return "wrong_step_cut_off" if row["finish"] == "length" and step == len(marks) - 1 else step


class StepPairBuilder:
    """Makes Step-DPO pairs; an item is a labelled rollout row.

    Args:
        spec: the job's settings.
        bench: rows with step labels and answers, policy, template and grader.
        sampler: draws the continuations; its model is ``bench.policy``.
        check: says whether better steps are correct; None: not asked.
    """

    def __init__(
        self, spec: StepPairConfig, bench: Workbench, sampler: BranchSampler, check: StepCheck | None = None
    ) -> None:
        self.spec, self.bench, self.sampler, self.check = spec, bench, sampler, check
        self.rows = bench.rows
        self.policy = bench.policy
        self.sampling = spec.drawing(spec.continuations, bench.max_new_tokens)
        self._source = GivenSolutions(bench.rows, bench.template, bench.grader, policy=bench.policy, keep_steps=True)
        self._found = [first_wrong_step(row, spec) for row in bench.rows]
        self.pairing = self._provenance()

    def groups(self) -> list[list[int]]:
        """See :class:`~stepkd.labels.workbench.PairBuilder`: solutions with a wrong step first, then all others."""
        groups: list[list[int]] = []
        for drawn, size in ((True, max(1, self.spec.max_rows // self.spec.continuations)), (False, _LIGHT)):
            items = [item for item, found in enumerate(self._found) if isinstance(found, int) is drawn]
            groups += [items[start : start + size] for start in range(0, len(items), size)]
        return groups

    def work(self, items: Sequence[int]) -> list[dict[str, Any]]:
        """See :class:`~stepkd.labels.workbench.PairBuilder`."""
        plans = {item: self._plan(item) for item in items}
        wrongs = [plan for plan in plans.values() if isinstance(plan, _Wrong)]
        records = {plan.index: record for plan, record in zip(wrongs, self._pair(wrongs), strict=True)}
        return [
            records[item] if isinstance(plan, _Wrong) else pair_record(self._id(item), item, dropped={plan: 1})
            for item, plan in plans.items()
        ]

    def summary(self, records: Sequence[Row]) -> dict[str, Any]:
        """See :class:`~stepkd.labels.workbench.PairBuilder`; none."""
        return {}

    def _provenance(self) -> dict[str, Any]:
        sampling = asdict(self.sampling)
        return {
            "builder": "step_dpo",
            "model": self.bench.model,
            "weights": weights_fingerprint(self.policy),
            "continuations": sampling.pop("n"),
            **sampling,
            "stop": list(self.sampling.stop),
            "from": self.spec.take,
            "max_pairs": self.spec.max_pairs,
            "neutral": self.spec.neutral,
            "threshold": self.spec.threshold,
            "segmenter": self.spec.segmenter or "of the row",
            "check": None if self.check is None else self.check.provenance(),
            "prompt": self.bench.prompt_id,
        }

    def _id(self, item: int) -> str:
        return str(self.rows[item]["id"])

    def _plan(self, item: int) -> _Wrong | str:
        """The wrong step of an item, or why it is left out."""
        found, row = self._found[item], self.rows[item]
        if isinstance(found, str):
            return found
        record = {"index": item, "correct": row["correct"], "too_long": False}
        (candidate,) = self._source.candidates(record)
        tokenizer, newline = self.policy.tokenizer, get_segmenter("newline")
        if not candidate.completion(tokenizer).text.startswith(candidate.text):
            raise DataError(
                f"its token ids are not those of its text in {self.bench.model}'s tokenizer: give the model that "
                "sampled it, --model",
                path=self._id(item),
                column="token_ids",
            )
        solution = cut(candidate, tokenizer, None, newline)
        if isinstance(solution, str):
            return solution
        if any(not text.strip() for text in solution.steps[: found + 1]):
            return "step_without_text"
        wrong = _Wrong(item, row, solution, found)
        context = self.policy.max_length
        return "too_long" if context is not None and len(solution.prompt_ids) + wrong.cut >= context else wrong

    def _pair(self, wrongs: Sequence[_Wrong]) -> list[dict[str, Any]]:
        if not wrongs:
            return []
        branches = [
            Branch((*w.solution.prompt_ids, *w.prefix_ids), [len(w.solution.prompt_ids) + w.cut], w.index)
            for w in wrongs
        ]
        drawn = self.sampler.sample_branches(branches, self.sampling, purpose=PURPOSE)
        verdicts = iter(self._grade(wrongs, drawn))
        found = []
        for wrong, result in zip(wrongs, drawn, strict=True):
            right = [rollout for rollout in result.rollouts[0] if next(verdicts)]
            found.append((right, *self._better_steps(wrong, right)))
        passed = self._passed(wrongs, [list(steps) for _, steps, _ in found])
        return [
            self._record(wrong, result, len(right), steps, kept, counts)
            for wrong, result, (right, steps, counts), kept in zip(wrongs, drawn, found, passed, strict=True)
        ]

    def _grade(self, wrongs: Sequence[_Wrong], drawn: Sequence[BranchRollouts]) -> list[bool]:
        texts, answers, cut_off = [], [], []
        for wrong, result in zip(wrongs, drawn, strict=True):
            for rollout in result.rollouts[0]:
                ids = (*wrong.prefix_ids, *rollout.token_ids)
                texts.append(text_until_stop(self.policy.tokenizer, ids, self.sampling.stop, known=wrong.cut))
                answers.append(str(wrong.row["answer"]))
                cut_off.append(rollout.finish == "length")
        return [grade.verdict == "correct" for grade in self.bench.grader.grade(texts, answers, cut_off=cut_off)]

    def _better_steps(self, wrong: _Wrong, right: Sequence[Completion]) -> tuple[dict[NextStep, int], Counter[str]]:
        """Distinct first steps of right continuations with the number of their first sample, and what was left out."""
        steps: dict[str, tuple[NextStep, int]] = {}
        counts: Counter[str] = Counter()
        for rollout in right:
            step = next_step(
                rollout,
                wrong.prefix_ids,
                self._segmenter(wrong.row),
                policy=self.policy,
                prompt_ids=wrong.solution.prompt_ids,
            )
            # Steps that differ in the white space around them say the same.
            if step is None:
                counts["unusable_steps"] += 1
            elif step.text.strip() == wrong.solution.steps[wrong.step].strip():
                counts["steps_like_the_wrong_one"] += 1
            elif step.text.strip() in steps:
                counts["repeated_steps"] += 1
            else:
                steps[step.text.strip()] = (step, rollout.sample)
        return dict(steps.values()), counts

    def _segmenter(self, row: Row) -> Segmenter:
        return segmenter_of(row) if self.spec.segmenter is None else get_segmenter(self.spec.segmenter)

    def _passed(self, wrongs: Sequence[_Wrong], steps: Sequence[list[NextStep]]) -> list[list[NextStep]]:
        if self.check is None:
            return [list(each) for each in steps]
        asked = [
            (wrong.solution.row, wrong.solution.steps[: wrong.step], [step.text for step in each])
            for wrong, each in zip(wrongs, steps, strict=True)
        ]
        return [
            [step for step, passes in zip(each, verdicts, strict=True) if passes]
            for each, verdicts in zip(steps, self.check.passes(asked), strict=True)
        ]

    def _record(
        self,
        wrong: _Wrong,
        result: BranchRollouts,
        num_right: int,
        steps: Mapping[NextStep, int],
        passed: Sequence[NextStep],
        counts: Mapping[str, int],
    ) -> dict[str, Any]:
        kept = passed[: self.spec.max_pairs]
        facts = {
            "continuations": len(result.rollouts[0]),
            "right_continuations": num_right,
            "steps_beyond_max_pairs": len(passed) - len(kept),
            "steps_that_failed_the_check": len(steps) - len(passed),
            "tokens_generated": sum(len(rollout.token_ids) for rollout in result.rollouts[0]),
            "tokens_prefilled": result.prefill_tokens,
            **{name: counts.get(name, 0) for name in ("repeated_steps", "steps_like_the_wrong_one", "unusable_steps")},
        }
        reason = None
        if not num_right:
            reason = "no_right_continuation"
        elif not steps:
            reason = "only_the_wrong_step" if facts["steps_like_the_wrong_one"] else "no_usable_step"
        elif not passed:
            reason = "failed_the_check"
        rows = [self._row(wrong, number, step, steps[step], facts) for number, step in enumerate(kept)]
        return pair_record(
            self._id(wrong.index), wrong.index, rows, dropped={} if reason is None else {reason: 1}, facts=facts
        )

    def _row(self, wrong: _Wrong, number: int, step: NextStep, sample: int, facts: Mapping[str, int]) -> dict[str, Any]:
        row, solution = wrong.row, wrong.solution
        out = {
            "id": f"{solution.id}/{number}",
            "problem_id": str(row["problem_id"]),
            "prompt": row["prompt"],
            "prefix": list(solution.steps[: wrong.step]),
            "prefix_ids": list(wrong.prefix_ids),
            "chosen": step.text,
            "chosen_ids": list(step.token_ids),
            "rejected": solution.steps[wrong.step],
            "rejected_ids": list(solution.completion_ids[slice(*solution.spans[wrong.step])]),
        }
        out |= {name: row[name] for name in PROBLEM_COLUMNS if row.get(name) is not None}
        if row.get("labelling") is not None:
            out["labelling"] = row["labelling"]
        out["pairing"] = self.pairing
        out["pair_facts"] = {
            "rollout": solution.id,
            "answer_was_right": row["correct"],
            "sample": sample,
            "continuations": facts["continuations"],
            "right_continuations": facts["right_continuations"],
        }
        return out


def step_pair_builder(
    spec: StepPairConfig, *, policy: Policy | None = None, sampler: BranchSampler | None = None
) -> StepPairBuilder:
    """Load what a Step-DPO pair job needs, checking everything that can be checked before the work begins.

    Args:
        spec: the job's settings.
        policy, sampler: already made ones to use in place of those that ``spec`` describes.

    Raises:
        ConfigError, DataError, ModelError: settings, data or models that cannot be used.
    """
    bench = open_workbench(spec, spec.rollouts, partial(_check_row, spec), problems=False, policy=policy)
    bench.check_prompt()
    bench.policy.to(bench.device)
    check = make_step_check(spec) if spec.check_step else None
    sampler = sampler or cast(BranchSampler, TransformersSampler(bench.policy, max_rows=spec.max_rows))
    return StepPairBuilder(spec, bench, sampler, check)


def _check_row(spec: StepPairConfig, row: Row, place: str) -> None:
    name = str(row["id"])
    if "token_ids" not in row:
        raise DataError(
            f"row {name!r} is no rollout: the wrong step of a pair is kept in the ids that were sampled; sample "
            "solutions with `stepkd label --problems`",
            path=place,
            column="token_ids",
        )
    if row.get("answer") is None:
        raise DataError(f"row {name!r} has no 'answer' to grade continuations by", path=place, column="answer")
    if spec.segmenter is None and isinstance(first_wrong_step(row, spec), int):
        segmenter_of(row)
    if spec.check_step and spec.judge is None and not is_task_row(row):
        raise ConfigError(
            f"--check-step has no exact checker for row {name!r}, which is not of the tiny world (source 'task'): "
            "give a model that scores steps, --judge"
        )


def make_step_check(spec: StepPairConfig) -> StepCheck:
    """The check that a pair job's settings name: ``judge``, else the exact checker.

    Raises:
        ConfigError, ModelError: a scorer that cannot be loaded.
    """
    return StepCheck(load_judge(spec, spec.judge or "checker", reference=spec.reference), spec.threshold)
