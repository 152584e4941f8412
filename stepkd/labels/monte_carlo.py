"""Monte-Carlo step labels: how often continuations of a step's prefix reach the right answer.

What is estimated is the chance of success from there on (a value), not whether the step itself is right: a wrong step
from which the model recovers counts as good.

Source: Math-Shepherd (Wang et al. 2023, arXiv 2312.08935); GLoRe (arXiv 2402.10963); AdaptiveStep (arXiv 2502.13943)
draws 8 continuations per step in the same way.

Also here: the step that a continuation begins with, cut as the solution it continues was cut (for Step-DPO).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from stepkd.data.completion import Completion
from stepkd.errors import ConfigError, DataError
from stepkd.grading.extract import extract_answer
from stepkd.grading.pool import Grader
from stepkd.labels.labellers import Reduce, Solution, StepLabels, check_reduction, reduce_values
from stepkd.models.checkpoint import weights_fingerprint
from stepkd.models.policy import Policy
from stepkd.sampling.annotate import annotate
from stepkd.sampling.sampler import Branch, BranchRollouts, BranchSampler, Drawn, SamplingConfig
from stepkd.steps.confidence import AdaptiveStepSegmenter, EntropySegmenter
from stepkd.steps.segment import SEGMENTERS, RegexSegmenter, Segmenter, check_partition, get_segmenter, segment
from stepkd.steps.text import TokenizedText, text_from_ids


@dataclass(frozen=True)
class NextStep:
    """The first step of a continuation."""

    text: str
    """Its text, separators included."""
    token_ids: tuple[int, ...]
    """Its sampled ids; with the end token only where the solution ends with it."""
    ends: bool
    """Whether the continuation ends with it."""


def text_until_stop(tokenizer: Any, ids: Sequence[int], stop: Sequence[str], *, known: int = 0) -> str:
    """Text of all ids, decoded together, up to a stop string that comes after the first ``known`` ids."""

    text = _decoded(tokenizer, ids)
    if not stop:
        return text
    start = len(_decoded(tokenizer, ids[:known]))
    cuts = [found for word in stop if (found := text.find(word, start)) >= 0]
    return text[: min(cuts, default=len(text))]


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def continuation_text(tokenizer: Any, prefix_ids: Sequence[int], token_ids: Iterable[int]) -> TokenizedText:
    """A continuation as it reads behind its prefix: some tokenizers decode the first token of a text differently."""
    whole = text_from_ids(tokenizer, (*prefix_ids, *token_ids))
    known = len(prefix_ids)
    start = whole.char_ends[known - 1] if known else 0
    return TokenizedText(whole.token_ids[known:], whole.text[start:], tuple(e - start for e in whole.char_ends[known:]))


def next_step(
    rollout: Completion,
    prefix_ids: Sequence[int],
    segmenter: Segmenter,
    *,
    policy: Policy,
    prompt_ids: Sequence[int],
) -> NextStep | None:
    """The step that a continuation begins with.

    Args:
        rollout: the continuation.
        prefix_ids: ids of the solution before it.
        segmenter: what cuts it; ``adaptive_step`` reads the sampler's log-probabilities at temperature 1.
        policy: the sampler's model; reads the continuation once more where the segmenter needs its entropies.
        prompt_ids: the prompt, for the same.

    Returns:
        None when it has no text (an end token alone), or is cut off by the length limit.
    """
    text = continuation_text(policy.tokenizer, prefix_ids, rollout.token_ids)
    if not text.text.strip():
        return None
    signals: dict[str, Any] = {"logprobs": tuple(rollout.raw_logprobs)}
    if isinstance(segmenter, EntropySegmenter):
        (found,) = annotate(policy, [[*prompt_ids, *prefix_ids]], [rollout.token_ids.tolist()])
        signals["entropies"] = found.entropies
    start, end = segment(segmenter, TokenizedText(text.token_ids, text.text, text.char_ends, **signals))[0]
    ends = end == len(text)
    if not text.span_text(start, end).strip() or (ends and rollout.finish == "length"):
        return None
    return NextStep(text.span_text(start, end), text.token_ids[start:end], ends)


def segmenter_of(row: Mapping[str, Any]) -> Segmenter:
    """What cut a labelled row into steps, by its ``labelling``; ``newline`` where that does not say.

    Raises:
        ConfigError: a segmenter that cannot cut a continuation.
        DataError: settings that no segmenter has.
    """
    facts = dict((row.get("labelling") or {}).get("segmenter") or {})
    kind = facts.pop("name", None)
    if kind == "reject":
        raise ConfigError(
            f"row {row.get('id', '?')!r} was cut by the segmenter 'reject', which needs a teacher's signals that "
            "continuations do not have: give --segmenter"
        )
    makers = {"regex": RegexSegmenter, "adaptive_step": AdaptiveStepSegmenter, "entropy": EntropySegmenter}
    makers["regex_before"] = RegexSegmenter
    if kind not in makers:
        return get_segmenter(kind if kind in SEGMENTERS else "newline")
    try:
        return makers[kind](**facts)
    except TypeError as error:
        raise DataError(
            f"the segmenter {kind!r} has other settings: {error}", path=str(row.get("id", "?")), column="labelling"
        ) from error


_MARKS = ("hash", "boxed")
"""Extractors of answers that are marked as final; a last number is in nearly every prefix."""


class MonteCarloLabeller:
    """Label steps by continuing every prefix.

    Args:
        sampler: draws the continuations.
        policy: the sampler's model, whose tokenizer turns ids into text.
        grader: compares the final answers with the row's ``answer``.
        spec: how to draw; ``n`` is J, the continuations per step. Its ``seed`` and the solution's ``index`` key the
            noise.
        reduce: from values to labels; see :func:`~stepkd.labels.labellers.reduce_values`.
        early_stop: draw 1, 1, 2, 4, ... continuations and stop at the first wave with a success. Labels are those of
            all J; values are estimated from the continuations made, and biased upwards.
        propagate_positive: a positive step makes all before it positive.

    Raises:
        ConfigError: ``early_stop`` or ``propagate_positive`` with soft labels, or several greedy continuations.
    """

    def __init__(
        self,
        sampler: BranchSampler,
        policy: Policy,
        grader: Grader,
        spec: SamplingConfig,
        *,
        reduce: Reduce = "any",
        early_stop: bool = False,
        propagate_positive: bool = False,
    ) -> None:
        check_reduction(reduce, propagate_positive=propagate_positive)
        if early_stop and reduce == "mean":
            raise ConfigError("early_stop makes shares of successes too high: reduce 'any' or 'first_error'")
        if spec.temperature == 0 and spec.n > 1:
            raise ConfigError(f"{spec.n} continuations at temperature 0 are all the same: set a temperature, or n=1")
        self.sampler = sampler
        self.policy = policy
        self.grader = grader
        self.spec = spec
        self.reduce: Reduce = reduce
        self.early_stop = early_stop
        self.propagate_positive = propagate_positive

    def label(self, solutions: Sequence[Solution]) -> list[StepLabels]:
        """See :class:`~stepkd.labels.labellers.Labeller`.

        No continuations are drawn where the solution is over: at its end (unless it was cut off), once it holds an end
        token or, marked as such, the answer it ends with, and where the context is full. The value there is 1 or 0 by
        the solution's own answer. ``facts`` has ``successes`` and ``trials`` of every step (0 trials where the solution
        is over), and the ``generated_tokens`` and ``prefill_tokens`` spent on it.

        Raises:
            DataError: a solution without steps, prompt or answer, or with spans that do not fit its tokens.
        """
        for solution in solutions:
            _check(solution)
        open_steps = [self._open_steps(solution) for solution in solutions]
        over = [s for s, steps in zip(solutions, open_steps, strict=True) if len(steps) < len(s.spans)]
        correct = dict(zip([id(s) for s in over], self._outcomes(over), strict=True))
        branches = [
            Branch(
                (*solution.prompt_ids, *solution.completion_ids),
                [len(solution.prompt_ids) + solution.spans[step][1] for step in steps],
                solution.index,
            )
            for solution, steps in zip(solutions, open_steps, strict=True)
        ]
        successes = [[0] * len(steps) for steps in open_steps]

        def grade(drawn: Sequence[Drawn]) -> list[bool]:
            verdicts = self._grade(solutions, open_steps, drawn)
            for each, right in zip(drawn, verdicts, strict=True):
                successes[each.branch][each.cut_number] += right
            return [self.early_stop and right > 0 for right in verdicts]

        results = self.sampler.sample_branches(
            branches, self.spec, purpose="monte-carlo", waves=self._waves(), settled=grade
        )
        return [
            self._labels(len(solution.spans), steps, right, result, correct.get(id(solution)))
            for solution, steps, right, result in zip(solutions, open_steps, successes, results, strict=True)
        ]

    def provenance(self) -> dict[str, Any]:
        """What the labels came from."""
        spec = self.policy.spec
        sampling = asdict(self.spec)
        return {
            "labeller": "monte_carlo",
            "model": type(self.policy.causal_lm).__name__ if spec is None else spec.path,
            "revision": None if spec is None else spec.revision,
            "weights": weights_fingerprint(self.policy),
            "J": sampling.pop("n"),
            **sampling,
            "stop": list(self.spec.stop),
            "reduce": self.reduce,
            "early_stop": self.early_stop,
            "propagate_positive": self.propagate_positive,
        }

    def _waves(self) -> list[int]:
        waves = [1] if self.early_stop else [self.spec.n]
        while (done := sum(waves)) < self.spec.n:
            waves.append(min(done, self.spec.n - done))
        return waves

    def _open_steps(self, solution: Solution) -> list[int]:
        """Numbers of the steps whose prefix can be continued."""
        ids, ended = solution.completion_ids, self.policy.eos_ids
        ends = [i + 1 for i, token in enumerate(ids) if token in ended]
        ends.append(len(ids) + (solution.finish == "length"))
        if self.policy.max_length is not None:
            ends.append(self.policy.max_length - len(solution.prompt_ids))
        answer, answered = self._marked_answer(ids), len(ids)
        for _, cut in reversed(solution.spans[:-1]):
            if answer is None or self._marked_answer(ids[:cut]) != answer:
                break
            answered = cut
        # The end of a cut-off solution stays open: its answer may be cut off too.
        return [
            step for step, (_, cut) in enumerate(solution.spans) if cut < min(ends) and not answered <= cut < len(ids)
        ]

    def _marked_answer(self, ids: Sequence[int]) -> str | None:
        marks = [name for name in self.grader.extractors if name in _MARKS]
        return extract_answer(_decoded(self.policy.tokenizer, ids), marks) if marks else None

    def _outcomes(self, solutions: Sequence[Solution]) -> list[bool]:
        """Whether each solution's own answer is right; graded where that is not known."""
        ungraded = [s for s in solutions if s.correct is None]
        grades = self.grader.grade(
            [self._until_stop(s.completion_ids) for s in ungraded],
            [str(s.row["answer"]) for s in ungraded],
            cut_off=[s.finish == "length" for s in ungraded],
        )
        remaining = iter(grades)
        return [next(remaining).verdict == "correct" if s.correct is None else s.correct for s in solutions]

    def _grade(
        self, solutions: Sequence[Solution], open_steps: Sequence[Sequence[int]], drawn: Sequence[Drawn]
    ) -> list[int]:
        """Number of successes among the new continuations of each prefix."""
        texts, answers, cut_off = [], [], []
        for each in drawn:
            solution = solutions[each.branch]
            prefix = solution.completion_ids[: solution.spans[open_steps[each.branch][each.cut_number]][1]]
            for rollout in each.rollouts:
                texts.append(self._until_stop((*prefix, *rollout.token_ids), known=len(prefix)))
                answers.append(str(solution.row["answer"]))
                cut_off.append(rollout.finish == "length")
        grades = iter(self.grader.grade(texts, answers, cut_off=cut_off))
        return [sum(next(grades).verdict == "correct" for _ in each.rollouts) for each in drawn]

    def _until_stop(self, ids: Sequence[int], *, known: int = 0) -> str:
        return text_until_stop(self.policy.tokenizer, ids, self.spec.stop, known=known)

    def _labels(
        self, num_steps: int, steps: Sequence[int], right: Sequence[int], result: BranchRollouts, correct: bool | None
    ) -> StepLabels:
        """Put the drawn and the known steps of one solution together."""
        successes, trials = [0] * num_steps, [0] * num_steps
        values = [float(bool(correct))] * num_steps
        for step, count, rollouts in zip(steps, right, result.rollouts, strict=True):
            successes[step], trials[step] = count, len(rollouts)
            values[step] = count / len(rollouts)
        return StepLabels(
            reduce_values(values, self.reduce, propagate_positive=self.propagate_positive),
            values=tuple(values),
            facts={
                "successes": successes,
                "trials": trials,
                "generated_tokens": sum(len(r.token_ids) for rollouts in result.rollouts for r in rollouts),
                "prefill_tokens": result.prefill_tokens,
            },
        )


def _check(solution: Solution) -> None:
    if not solution.prompt_ids:
        raise DataError("the solution has no prompt tokens to start from", path=solution.id)
    if not solution.spans:
        raise DataError("the solution has no steps to label: drop it", path=solution.id)
    if len(solution.spans) != len(solution.steps):
        raise DataError(f"{len(solution.spans)} step spans but {len(solution.steps)} step texts", path=solution.id)
    try:
        check_partition(solution.spans, len(solution.completion_ids))
    except ValueError as error:
        raise DataError(str(error), path=solution.id) from error
    if solution.row.get("answer") in (None, ""):
        raise DataError("the problem has no answer to grade continuations by", path=solution.id, column="answer")
