"""Step-DPO pairs: a solution's first incorrect step against the first step of a continuation that ends correctly.

For every solution with an incorrect step, the correct steps before it are continued; continuations with the correct
answer give the better step. Both sides are single steps behind the same prefix, in the ids that were sampled.

Source: Step-DPO (Lai et al. 2024, arXiv 2406.18629), section 3.2.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import repeat
from typing import Any, NamedTuple

from stepkd.data.completion import Completion
from stepkd.data.rows import passed_on
from stepkd.errors import ConfigError, DataError
from stepkd.labels.labellers import A_TASK, PROBLEM_COLUMNS, Need, Row, ScorerLabeller, Solution
from stepkd.labels.monte_carlo import continued, grade_continuations
from stepkd.labels.settings import StepPairConfig
from stepkd.labels.solutions import ExistingSolutions, cut
from stepkd.labels.workbench import Workbench, pair_record
from stepkd.models.checkpoint import weights_fingerprint
from stepkd.models.policy import Policy
from stepkd.runs.job import Job
from stepkd.sampling.annotate import annotate
from stepkd.sampling.engine import Engine
from stepkd.scorers.load import load_scorer
from stepkd.scorers.rules import Checker
from stepkd.steps.confidence import EntropySegmenter
from stepkd.steps.labels import first_incorrect
from stepkd.steps.segment import SEGMENTERS, Segmenter, get_segmenter, segment
from stepkd.steps.text import TokenizedText, text_from_ids

PURPOSE = "step_preference"
NEEDS: tuple[Need, ...] = (
    (
        ("token_ids",),
        "is no completion, and a pair keeps sampled ids: sample solutions of problems with `stepkd label`",
    ),
    (("answer",), "has no 'answer' to grade continuations by"),
)
"""What a labelled row must have."""
_LIGHT = 256  # rows per group where nothing is drawn


class _Flawed(NamedTuple):
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


def first_incorrect_step(row: Row, config: StepPairConfig) -> int | str:
    """Number of the first incorrect step of a row, all steps before it being correct; or why there is no use for it.

    Reasons: ``no_labels``, ``ungraded``, ``correct_answer``, ``no_incorrect_step``, ``first_error_unknown`` (an
    unlabelled step stands before it, or no step is incorrect and some are unlabelled), ``incorrect_step_cut_off``.
    """
    if (labels := row.get("step_labels")) is None:
        return "no_labels"
    if config.take == "incorrect" and row["correct"] is not False:
        return "ungraded" if row["correct"] is None else "correct_answer"
    step = first_incorrect(labels, neutral=config.neutral, threshold=config.threshold)
    if step is None or step < 0:
        return "first_error_unknown" if step is None else "no_incorrect_step"
    return "incorrect_step_cut_off" if row["finish"] == "length" and step == len(labels) - 1 else step


def next_step(continuation: Completion, known: int, segmenter: Segmenter, policy: Policy) -> Better | None:
    """The step that a continuation begins with.

    Args:
        continuation: the continuation.
        known: how many of the ids before it are of its solution, not of the prompt.
        segmenter: what cuts it; ``adaptive_step`` reads the engine's log-probabilities at temperature 1.
        policy: the engine's model; reads the continuation once more where the segmenter needs its entropies.

    Returns:
        None when it has no text (an end token alone), or is cut off by the length limit.
    """
    before, ids = continuation.prompt_ids.tolist(), continuation.token_ids.tolist()
    # As it reads behind its prefix: some tokenizers decode the first token of a text differently.
    whole = text_from_ids(policy.tokenizer, (*before[len(before) - known :], *ids))
    start = whole.char_ends[known - 1] if known else 0
    if not whole.text[start:].strip():
        return None
    text = TokenizedText(
        tuple(ids),
        whole.text[start:],
        tuple(end - start for end in whole.char_ends[known:]),
        logprobs=None if continuation.raw_logprobs is None else tuple(continuation.raw_logprobs.tolist()),
        entropies=annotate(policy, [before], [ids])[0].entropies if isinstance(segmenter, EntropySegmenter) else None,
    )
    _, end = segment(segmenter, text)[0]
    if not text.span_text(0, end).strip() or (end == len(text) and continuation.finish == "length"):
        return None
    return Better(text.span_text(0, end), text.token_ids[:end], continuation.sample)


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
            "continuations do not have: label its solutions again with other steps"
        )
    if kind in ("regex", "regex_before", "adaptive_step", "entropy"):
        return get_segmenter(f"{kind}:{facts.get('pattern', facts.get('threshold'))}")
    return get_segmenter(kind if kind in SEGMENTERS else "newline")


class StepPairBuilder:
    """Makes Step-DPO pairs; an item is a labelled completion row. Everything that can be checked before the work begins
    is checked when it is made.

    Args:
        config: the job's settings.
        job: keeps what is measured.
        policy, engine: already made ones to use in place of those that ``config`` describes.

    Raises:
        ConfigError, DataError, ModelError: settings, data or models that cannot be used.
    """

    def __init__(
        self,
        config: StepPairConfig,
        job: Job,
        *,
        policy: Policy | None = None,
        engine: Engine | None = None,
    ) -> None:
        needs = (*NEEDS, A_TASK) if config.check in ("checker", Checker()) else NEEDS
        self.config = config
        self.bench = bench = Workbench(
            config, config.completions, config.model, needs, problems=False, job=job, policy=policy
        )
        self._found = [first_incorrect_step(row, config) for row in bench.rows]
        for row, found in zip(bench.rows, self._found, strict=True):
            if isinstance(found, int):
                segmenter_of(row)
        bench.check_prompt()
        self.engine, self.policy = engine or bench.engine(), bench.policy
        self.check = None
        if config.check is not None:
            scorer = load_scorer(config.check, device=config.device, max_rows=config.engine.at_once)
            self.check = ScorerLabeller(scorer, threshold=config.threshold)
        self.sampling = bench.limited(config.sampling)
        self._source = ExistingSolutions(bench, keep_steps=True)
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
            "segmenter": "of the row",
            "check": None if self.check is None else self.check.provenance(),
            "prompt": bench.prompt_id,
        }

    def groups(self) -> list[list[int]]:
        """Item numbers of every group: those with an incorrect step first, then all others; depends on nothing but the
        data and the settings."""
        groups: list[list[int]] = []
        for drawn, size in ((True, max(1, self.config.engine.at_once // self.sampling.n)), (False, _LIGHT)):
            items = [item for item, found in enumerate(self._found) if isinstance(found, int) is drawn]
            groups += [items[start : start + size] for start in range(0, len(items), size)]
        return groups

    def work(self, items: Sequence[int]) -> list[dict[str, Any]]:
        """One record per item (:func:`~stepkd.labels.workbench.pair_record`), which does not depend on the others."""
        plans = {item: self._plan(item) for item in items}
        made = {each["index"]: each for each in self._pair([p for p in plans.values() if isinstance(p, _Flawed)])}
        for item, plan in plans.items():
            if isinstance(plan, str):
                made[item] = pair_record(str(self.bench.rows[item]["id"]), item, dropped={plan: 1})
        return [made[item] for item in items]

    def _plan(self, item: int) -> _Flawed | str:
        """The incorrect step of an item, or why it is left out."""
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
        flawed, context = _Flawed(whole, found), self.policy.max_length
        return "too_long" if context is not None and len(whole.prompt_ids) + flawed.known >= context else flawed

    def _pair(self, flawed_ones: Sequence[_Flawed]) -> list[dict[str, Any]]:
        if not flawed_ones:
            return []
        branches = [continued(flawed.solution, [flawed.known]) for flawed in flawed_ones]
        drawn = self.engine.continue_branches(branches, self.sampling, purpose=PURPOSE)
        to_grade = [
            (each.solution, each.known, result.continuations[0])
            for each, result in zip(flawed_ones, drawn, strict=True)
        ]
        verdicts = grade_continuations(to_grade, self.policy, self.bench.grader, self.sampling)
        found = []
        for flawed, result, marks in zip(flawed_ones, drawn, verdicts, strict=True):
            (continuations,) = result.continuations
            facts = Counter(
                continuations=len(continuations),
                correct_continuations=sum(marks),
                tokens_generated=sum(len(each.token_ids) for each in continuations),
                tokens_prefilled=result.prefill_tokens,
            )
            correct = [each for each, good in zip(continuations, marks, strict=True) if good]
            found.append((flawed, self._better_steps(flawed, correct, facts), facts))
        to_check = [
            replace(flawed.solution, steps=(*flawed.solution.steps[: flawed.step], step.text))
            for flawed, steps, _ in found
            for step in steps
        ]
        good: Iterator[bool] = repeat(True)
        if self.check is not None and to_check:
            good = iter([each.labels[-1] is True for each in self.check.label(to_check)])
        return [self._record(*each, passed=[step for step in each[1] if next(good)]) for each in found]

    def _better_steps(self, flawed: _Flawed, correct: Sequence[Completion], facts: Counter[str]) -> list[Better]:
        """Distinct first steps of continuations that end correctly; counts in the facts what is left out."""
        steps: dict[str, Better] = {}
        segmenter = segmenter_of(flawed.solution.columns)
        for continuation in correct:
            step = next_step(continuation, flawed.known, segmenter, self.policy)
            # Steps that differ in the white space around them say the same.
            if step is None:
                facts["unusable_steps"] += 1
            elif step.text.strip() == flawed.solution.steps[flawed.step].strip():
                facts["steps_like_the_incorrect_one"] += 1
            elif step.text.strip() in steps:
                facts["repeated_steps"] += 1
            else:
                steps[step.text.strip()] = step
        return list(steps.values())

    def _record(
        self, flawed: _Flawed, steps: Sequence[Better], facts: Counter[str], *, passed: Sequence[Better]
    ) -> dict[str, Any]:
        kept = passed[: self.config.max_pairs]
        facts.update(
            steps_beyond_max_pairs=len(passed) - len(kept), steps_that_failed_the_check=len(steps) - len(passed)
        )
        reasons = {
            "no_correct_continuation": not facts["correct_continuations"],
            "only_the_incorrect_step": not steps and facts["steps_like_the_incorrect_one"],
            "no_usable_step": not steps,
            "failed_the_check": not passed,
        }
        dropped = next(({reason: 1} for reason, holds in reasons.items() if holds), {})
        rows = [self._row(flawed, number, step, facts) for number, step in enumerate(kept)]
        return pair_record(flawed.solution.id, flawed.solution.index, rows, dropped=dropped, facts=facts)

    def _row(self, flawed: _Flawed, number: int, step: Better, facts: Mapping[str, int]) -> dict[str, Any]:
        solution, row = flawed.solution, flawed.solution.columns
        ids = solution.token_ids.tolist()
        out = {
            "id": f"{solution.id}/{number}",
            "problem_id": str(row["problem_id"]),
            "prompt": row["prompt"],
            "prefix": list(solution.steps[: flawed.step]),
            "prefix_ids": ids[: flawed.known],
            "chosen": step.text,
            "chosen_ids": list(step.token_ids),
            "rejected": solution.steps[flawed.step],
            "rejected_ids": ids[slice(*solution.spans[flawed.step])],
        }
        out |= passed_on(row, *PROBLEM_COLUMNS, "labelling")
        out["pairing"] = self.pairing
        out["pair_facts"] = {
            "solution_id": solution.id,
            "answer_was_correct": row["correct"],
            "sample": step.sample,
            "continuations": facts["continuations"],
            "correct_continuations": facts["correct_continuations"],
        }
        return out
