"""Step-DPO pairs: a solution's first incorrect step against the first step of a continuation that ends correctly.

For every solution with an incorrect step, the correct steps before it are continued; continuations with the correct
answer give the better step. Both sides are single steps behind the same prefix, in the ids that were sampled.

Source: Step-DPO (Lai et al. 2024, arXiv 2406.18629), section 3.2.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, NamedTuple

from stepkd.data.completion import Completion
from stepkd.errors import ConfigError, DataError
from stepkd.labels.labellers import ScorerLabeller, check_task_row
from stepkd.labels.monte_carlo import continued, grade_continuations
from stepkd.labels.settings import StepPairConfig
from stepkd.labels.solutions import ExistingSolutions, cut
from stepkd.labels.step_labels import Solution
from stepkd.labels.workbench import PROBLEM_COLUMNS, Row, Workbench, open_workbench, pair_record
from stepkd.models.checkpoint import weights_fingerprint
from stepkd.models.policy import Policy
from stepkd.sampling.annotate import annotate
from stepkd.sampling.sampler import BranchRollouts
from stepkd.sampling.transformers_sampler import TransformersSampler
from stepkd.scorers.load import load_scorer
from stepkd.scorers.rules import Checker
from stepkd.steps.confidence import EntropySegmenter
from stepkd.steps.labels import verdicts
from stepkd.steps.segment import SEGMENTERS, Segmenter, get_segmenter, segment
from stepkd.steps.text import TokenizedText, text_from_ids

PURPOSE = "step_preference"
_LIGHT = 256  # rows per group where nothing is drawn


class Wrong(NamedTuple):
    """A solution and the number of its first incorrect step."""

    solution: Solution
    step: int

    @property
    def known(self) -> int:
        """Length of the correct prefix in tokens."""
        return self.solution.spans[self.step][0]


class Better(NamedTuple):
    """The first step of a continuation that ends correctly."""

    text: str
    """Its text, separators included."""
    token_ids: tuple[int, ...]
    """Its sampled ids; with the end token only where the solution ends with it."""
    sample: int
    """Which of the prefix's continuations it begins."""


def first_wrong_step(row: Row, config: StepPairConfig) -> int | str:
    """Number of the first incorrect step of a row, all steps before it being correct; or why there is no use for it.

    Reasons: ``no_labels``, ``ungraded``, ``right_answer``, ``no_wrong_step``, ``first_error_unknown`` (an unlabelled
    step before it), ``wrong_step_cut_off``.
    """
    labels = row.get("step_labels")
    if labels is None or all(label is None for label in labels):
        return "no_labels"
    if config.take == "wrong" and row["correct"] is not False:
        return "ungraded" if row["correct"] is None else "right_answer"
    marks = verdicts(labels, neutral=config.neutral, threshold=config.threshold)
    if False not in marks:
        return "no_wrong_step"
    step = marks.index(False)
    if None in marks[:step]:
        return "first_error_unknown"
    return "wrong_step_cut_off" if row["finish"] == "length" and step == len(marks) - 1 else step


def continuation_text(tokenizer: Any, prefix_ids: Sequence[int], token_ids: Sequence[int]) -> TokenizedText:
    """A continuation as it reads behind its prefix: some tokenizers decode the first token of a text differently."""
    whole = text_from_ids(tokenizer, (*prefix_ids, *token_ids))
    known = len(prefix_ids)
    start = whole.char_ends[known - 1] if known else 0
    return TokenizedText(whole.token_ids[known:], whole.text[start:], tuple(e - start for e in whole.char_ends[known:]))


def next_step(rollout: Completion, known: int, segmenter: Segmenter, policy: Policy) -> Better | None:
    """The step that a continuation begins with.

    Args:
        rollout: the continuation.
        known: how many of the ids before it are of its solution, not of the prompt.
        segmenter: what cuts it; ``adaptive_step`` reads the sampler's log-probabilities at temperature 1.
        policy: the sampler's model; reads the continuation once more where the segmenter needs its entropies.

    Returns:
        None when it has no text (an end token alone), or is cut off by the length limit.
    """
    before, ids = rollout.prompt_ids.tolist(), rollout.token_ids.tolist()
    text = continuation_text(policy.tokenizer, before[len(before) - known :], ids)
    if not text.text.strip():
        return None
    signals: dict[str, Any] = {"logprobs": tuple(rollout.raw_logprobs.tolist())}
    if isinstance(segmenter, EntropySegmenter):
        signals["entropies"] = annotate(policy, [before], [ids])[0].entropies
    start, end = segment(segmenter, replace(text, **signals))[0]
    if not text.span_text(start, end).strip() or (end == len(text) and rollout.finish == "length"):
        return None
    return Better(text.span_text(start, end), text.token_ids[start:end], rollout.sample)


def segmenter_of(row: Row) -> Segmenter:
    """What cut a labelled row into steps, by its ``labelling``; ``newline`` where that does not say.

    Raises:
        ConfigError: a segmenter that cannot cut a continuation, or settings that it does not have.
    """
    facts = (row.get("labelling") or {}).get("segmenter") or {}
    kind = facts.get("name")
    if kind == "reject":
        raise ConfigError(
            f"row {row.get('id', '?')!r} was cut by the segmenter 'reject', which needs a teacher's signals that "
            "continuations do not have: give a segmenter"
        )
    if kind in ("regex", "regex_before", "adaptive_step", "entropy"):
        return get_segmenter(f"{kind}:{facts.get('pattern', facts.get('threshold'))}")
    return get_segmenter(kind if kind in SEGMENTERS else "newline")


class StepPairBuilder:
    """Makes Step-DPO pairs; an item is a labelled rollout row.

    Args:
        config: the job's settings.
        bench: rows with step labels and answers, policy, template and grader.
        sampler: draws the continuations; its model is ``bench.policy``.
        check: says whether better steps are correct; None: not asked.
    """

    def __init__(
        self,
        config: StepPairConfig,
        bench: Workbench,
        sampler: TransformersSampler,
        check: ScorerLabeller | None = None,
    ) -> None:
        self.config, self.bench, self.sampler, self.check = config, bench, sampler, check
        self.policy = bench.policy
        self.sampling = bench.limited(config.sampling)
        self._source = ExistingSolutions(bench, keep_steps=True)
        self._found = [first_wrong_step(row, config) for row in bench.rows]
        sampling = asdict(self.sampling)
        self.pairing = {
            "builder": "step_dpo",
            "model": bench.model,
            "weights": weights_fingerprint(self.policy),
            "continuations": sampling.pop("n"),
            **sampling,
            "stop": list(self.sampling.stop),
            "from": config.take,
            "max_pairs": config.max_pairs,
            "neutral": config.neutral,
            "threshold": config.threshold,
            "segmenter": config.segmenter or "of the row",
            "check": None if check is None else check.provenance(),
            "prompt": bench.prompt_id,
        }

    def groups(self) -> list[list[int]]:
        """See :class:`~stepkd.labels.workbench.PairBuilder`: solutions with a wrong step first, then all others."""
        groups: list[list[int]] = []
        for drawn, size in ((True, max(1, self.config.max_rows // self.sampling.n)), (False, _LIGHT)):
            items = [item for item, found in enumerate(self._found) if isinstance(found, int) is drawn]
            groups += [items[start : start + size] for start in range(0, len(items), size)]
        return groups

    def work(self, items: Sequence[int]) -> list[dict[str, Any]]:
        """See :class:`~stepkd.labels.workbench.PairBuilder`."""
        plans = {item: self._plan(item) for item in items}
        wrongs = [plan for plan in plans.values() if isinstance(plan, Wrong)]
        records = {plan.solution.index: record for plan, record in zip(wrongs, self._pair(wrongs), strict=True)}
        return [
            pair_record(str(self.bench.rows[item]["id"]), item, dropped={plan: 1})
            if isinstance(plan, str)
            else records[item]
            for item, plan in plans.items()
        ]

    def summary(self, records: Sequence[Row]) -> dict[str, Any]:
        """See :class:`~stepkd.labels.workbench.PairBuilder`; none."""
        return {}

    def _plan(self, item: int) -> Wrong | str:
        """The wrong step of an item, or why it is left out."""
        found, row = self._found[item], self.bench.rows[item]
        if isinstance(found, str):
            return found
        (solution,) = self._source.solutions({"index": item, "correct": row["correct"], "too_long": False})
        tokenizer = self.policy.tokenizer
        if not text_from_ids(tokenizer, tuple(row["token_ids"])).text.startswith(solution.text):
            raise DataError(
                f"its token ids are not those of its text in {self.bench.model}'s tokenizer: give the model that "
                "sampled it",
                path=solution.id,
                column="token_ids",
            )
        whole = cut(solution, tokenizer, get_segmenter("newline"))
        if isinstance(whole, str):
            return whole
        if any(not text.strip() for text in whole.steps[: found + 1]):
            return "step_without_text"
        wrong, context = Wrong(whole, found), self.policy.max_length
        return "too_long" if context is not None and len(whole.prompt_ids) + wrong.known >= context else wrong

    def _pair(self, wrongs: Sequence[Wrong]) -> list[dict[str, Any]]:
        if not wrongs:
            return []
        branches = [continued(wrong.solution, [wrong.known]) for wrong in wrongs]
        drawn = self.sampler.sample_branches(branches, self.sampling, purpose=PURPOSE)
        rollouts = [(w.solution, w.known, result.rollouts[0]) for w, result in zip(wrongs, drawn, strict=True)]
        verdicts = grade_continuations(rollouts, self.policy, self.bench.grader, self.sampling)
        found = [
            self._better_steps(wrong, [each for each, good in zip(all_of_it, marks, strict=True) if good])
            for wrong, (_, _, all_of_it), marks in zip(wrongs, rollouts, verdicts, strict=True)
        ]
        passing = [[True] * len(steps) for steps, _ in found]
        if self.check is not None:
            asked = [
                (wrong.solution.row, wrong.solution.steps[: wrong.step], [step.text for step in steps])
                for wrong, (steps, _) in zip(wrongs, found, strict=True)
            ]
            passing = self.check.passing(asked)
        return [
            self._record(wrong, result, sum(marks), *steps, goods)
            for wrong, result, marks, steps, goods in zip(wrongs, drawn, verdicts, found, passing, strict=True)
        ]

    def _better_steps(self, wrong: Wrong, right: Sequence[Completion]) -> tuple[list[Better], Counter[str]]:
        """Distinct first steps of continuations that end correctly, and what was left out."""
        steps: dict[str, Better] = {}
        counts: Counter[str] = Counter()
        name = self.config.segmenter
        segmenter = segmenter_of(wrong.solution.columns) if name is None else get_segmenter(name)
        for rollout in right:
            step = next_step(rollout, wrong.known, segmenter, self.policy)
            # Steps that differ in the white space around them say the same.
            if step is None:
                counts["unusable_steps"] += 1
            elif step.text.strip() == wrong.solution.steps[wrong.step].strip():
                counts["steps_like_the_wrong_one"] += 1
            elif step.text.strip() in steps:
                counts["repeated_steps"] += 1
            else:
                steps[step.text.strip()] = step
        return list(steps.values()), counts

    def _record(
        self,
        wrong: Wrong,
        result: BranchRollouts,
        num_right: int,
        steps: Sequence[Better],
        counts: Mapping[str, int],
        passing: Sequence[bool],
    ) -> dict[str, Any]:
        solution, passed = wrong.solution, [step for step, passes in zip(steps, passing, strict=True) if passes]
        kept = passed[: self.config.max_pairs]
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
        rows = [self._row(wrong, number, step, facts) for number, step in enumerate(kept)]
        dropped = {} if reason is None else {reason: 1}
        return pair_record(solution.id, solution.index, rows, dropped=dropped, facts=facts)

    def _row(self, wrong: Wrong, number: int, step: Better, facts: Mapping[str, int]) -> dict[str, Any]:
        solution, row = wrong.solution, wrong.solution.columns
        ids = solution.token_ids.tolist()
        out = {
            "id": f"{solution.id}/{number}",
            "problem_id": str(row["problem_id"]),
            "prompt": row["prompt"],
            "prefix": list(solution.steps[: wrong.step]),
            "prefix_ids": ids[: wrong.known],
            "chosen": step.text,
            "chosen_ids": list(step.token_ids),
            "rejected": solution.steps[wrong.step],
            "rejected_ids": ids[slice(*solution.spans[wrong.step])],
        }
        out |= {name: row[name] for name in (*PROBLEM_COLUMNS, "labelling") if row.get(name) is not None}
        out["pairing"] = self.pairing
        out["pair_facts"] = {
            "rollout": solution.id,
            "answer_was_right": row["correct"],
            "sample": step.sample,
            "continuations": facts["continuations"],
            "right_continuations": facts["right_continuations"],
        }
        return out


def step_pair_builder(
    config: StepPairConfig, *, policy: Policy | None = None, sampler: TransformersSampler | None = None
) -> StepPairBuilder:
    """Load what a Step-DPO pair job needs, checking everything that can be checked before the work begins.

    Args:
        config: the job's settings.
        policy, sampler: already made ones to use in place of those that ``config`` describes.

    Raises:
        ConfigError, DataError, ModelError: settings, data or models that cannot be used.
    """
    bench = open_workbench(
        config,
        config.rollouts,
        config.model,
        lambda row, place: _check_row(config, row, place),
        problems=False,
        policy=policy,
    )
    bench.check_prompt()
    bench.policy.to(bench.device)
    check = None
    if config.check is not None:
        scorer = load_scorer(config.check, device=config.device, max_rows=config.max_rows)
        check = ScorerLabeller(scorer, threshold=config.threshold)
    sampler = sampler or TransformersSampler(bench.policy, max_rows=config.max_rows)
    return StepPairBuilder(config, bench, sampler, check)


def _check_row(config: StepPairConfig, row: Row, place: str) -> None:
    name = str(row["id"])
    if "token_ids" not in row:
        raise DataError(
            f"row {name!r} is no rollout: the wrong step of a pair is kept in the ids that were sampled; sample "
            "solutions of problems with `stepkd label`",
            path=place,
            column="token_ids",
        )
    if row.get("answer") is None:
        raise DataError(f"row {name!r} has no 'answer' to grade continuations by", path=place, column="answer")
    if config.segmenter is None and isinstance(first_wrong_step(row, config), int):
        segmenter_of(row)
    if config.check in ("checker", Checker()):
        check_task_row(row, place, "give another scorer as check")
