"""Monte-Carlo step labels: how often continuations of a step's prefix reach the correct answer.

What is estimated is the chance of success from there on (a value), not whether the step itself is correct: an incorrect
step from which the model recovers counts as good.

The first error can be searched for in place of labelling every prefix (:func:`next_steps`). A prefix gets the same
continuations in whatever order it is asked about: their noise is keyed by solution, prefix and number.

Source: Math-Shepherd (Wang et al. 2023, arXiv 2312.08935); GLoRe (arXiv 2402.10963); AdaptiveStep (arXiv 2502.13943)
draws 8 continuations per step in the same way; the binary search is that of OmegaPRM (Luo et al. 2024, arXiv
2406.06592) on single solutions, without its tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from stepkd.data.completion import Completion
from stepkd.errors import ConfigError, DataError, check_bounds
from stepkd.grading.extract import extract_answer, numbers_in
from stepkd.grading.normalise import canonical_answer
from stepkd.grading.pool import Grader
from stepkd.labels.labellers import Labeller, LabellerConfig, Solution, StepLabels
from stepkd.randomness import stream_key
from stepkd.sampling.engine import Branch, SamplingConfig, decode_text
from stepkd.steps.labels import Label, Reduce, passes, reduce_values

Order = Literal["all", "forward", "binary"]
"""Which prefixes of a solution are continued: see :func:`next_steps`."""
_MARKS = ("hash", "boxed")
"""Extractors of answers that are marked as final; a last number is in nearly every prefix."""


@dataclass(frozen=True, kw_only=True)
class MonteCarlo(LabellerConfig):
    """How often continuations of a step's prefix reach the correct answer (Math-Shepherd, arXiv 2312.08935)."""

    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(n=8))
    """How every step's prefix is continued, 8 times by default."""
    reduce: Reduce = "any"
    """From shares of successes to labels: correct where any succeeds (the default, Math-Shepherd's hard estimate), the
    mean itself (its soft estimate), correct up to the first_error and nothing behind it (Qwen2.5-Math-PRM, arXiv
    2501.07301), or propagate, correct where any of this step or of a later one succeeds (GLoRe, arXiv 2402.10963)."""
    order: Order = "all"
    """Which prefixes are continued: all of them (the default); one after the other up to the first that fails (forward,
    the same labels for less); or by binary search for the first that fails (OmegaPRM, arXiv 2406.06592), about the
    logarithm of the number of steps, and none where the answer is correct. The last two need reduce first_error."""
    share: bool = False
    """Whether solutions with one prompt and answer share the continuations of a prefix that they have in common, as
    OmegaPRM's tree does: drawn once in a batch (neighbouring rows of a problem are in one), with noise keyed by the
    prefix, where it is keyed by the solution by default; every prefix is then read for itself."""
    consistent: bool = False
    """Whether a step that is labelled correct loses its label where no continuation that succeeds takes up the number
    that the step ends with: it may have been solved past it (GLoRe, arXiv 2402.10963)."""
    keep_continuations: bool = False
    """Whether the first continuation of every step that succeeds is kept in the row's label_facts, from which stepkd
    convert makes local refinements; off, because every step adds a text about as long as the solution to its row."""
    continues = True
    needs = (
        (
            ("answer",),
            "has no 'answer', and Monte-Carlo labels compare continuations with it: add it, or use another labeller",
        ),
    )

    def __post_init__(self) -> None:
        check_bounds("", self)
        self.sampling.check_noise("continuations of a step")
        if self.order != "all" and self.reduce != "first_error":
            raise ConfigError(
                f"order={self.order} looks for the first error and says nothing of the steps behind it, and "
                f"reduce={self.reduce} labels every step: set reduce to first_error, or order to all"
            )

    def build(self, bench: Any, engine: Any) -> Labeller:
        """A :class:`MonteCarloLabeller`."""
        return MonteCarloLabeller(
            engine,
            bench.policy,
            bench.grader,
            bench.limited(self.sampling),
            reduce=self.reduce,
            order=self.order,
            share=self.share,
            consistent=self.consistent,
            keep_continuations=self.keep_continuations,
        )


@dataclass
class _Search:
    """What is known so far of a solution."""

    solution: Solution
    values: list[float | None]
    """Of every step; None: not known."""
    generated: int = 0
    prefill: int = 0
    reused: int = 0

    def __post_init__(self) -> None:
        steps = range(len(self.values))
        self.successes, self.trials = [0 for _ in steps], [0 for _ in steps]
        self.texts: list[list[str]] = [[] for _ in steps]

    def prefix(self, step: int) -> tuple[int, ...]:
        """The tokens up to a step's end, with the prompt's."""
        return (*self.solution.prompt_ids.tolist(), *self.solution.token_ids[: self.solution.spans[step][1]].tolist())

    def take(self, step: int, other: _Search, place: int) -> None:
        """Take over what another search found of the same prefix, the end of its step ``place``."""
        for own, found in zip(self._found(), other._found(), strict=True):
            own[step] = found[place]
        self.reused += self.trials[step]

    def _found(self) -> tuple[list[Any], ...]:
        return self.values, self.successes, self.trials, self.texts


class MonteCarloLabeller:
    """Label steps by continuing prefixes.

    Args:
        engine: draws the continuations (an :class:`~stepkd.sampling.engine.Engine`).
        policy: the engine's model (:class:`~stepkd.models.policy.Policy`), whose tokenizer turns ids into text.
        grader: compares the final answers with the row's ``answer``.
        sampling: how to draw; ``n`` is J, the continuations per step. Its ``seed`` and the solution's ``index`` key the
            noise.
        reduce: from values to labels; see :func:`~stepkd.steps.labels.reduce_values`.
        order, share, consistent, keep_continuations: see :class:`MonteCarlo`.
    """

    def __init__(
        self,
        engine: Any,
        policy: Any,
        grader: Grader,
        sampling: SamplingConfig,
        *,
        reduce: Reduce = "any",
        order: Order = "all",
        share: bool = False,
        consistent: bool = False,
        keep_continuations: bool = False,
    ) -> None:
        self.engine, self.policy, self.grader, self.sampling, self.reduce = engine, policy, grader, sampling, reduce
        self.order, self.share = order, share
        self.consistent, self.keep_continuations = consistent, keep_continuations

    def label(self, solutions: Sequence[Solution]) -> list[StepLabels]:
        """See :class:`~stepkd.labels.labellers.Labeller`.

        No continuations are drawn where the solution is over: at its end (unless it was cut off), once it holds an end
        token or, marked as such, the answer it ends with, and where the context is full. The value there is 1 or 0 by
        ``solution.correct``. ``facts`` has ``successes`` and ``trials`` of every step (0 trials where the solution
        is over, or the order passes it over: its value is None), and the ``generated_tokens`` and ``prefill_tokens``
        spent on it; with the options ``reused``, those of the trials that another solution paid for, ``suspicious``,
        the number of labels that were dropped, and ``continuations``, a text or None for every step. A search goes in
        rounds: a prefix of every solution that is left, all together.

        Args:
            solutions: cut into steps, each with a prompt and with the ``answer`` in its row.

        Raises:
            DataError: one without an answer, or one that is over and was not graded.
        """
        searches = []
        for each in solutions:
            steps = self._open_steps(each)
            if each.row.get("answer") in (None, "") or (each.correct is None and len(steps) < len(each.steps)):
                what = "needs an 'answer' to grade continuations by, and 'correct' where the solution is over"
                raise DataError(what, path=each.id)
            known = float(each.correct is True)
            searches.append(_Search(each, [None if i in steps else known for i in range(len(each.steps))]))
        owners: dict[Any, tuple[_Search, int]] = {}
        while asked := [(each, steps) for each in searches if (steps := next_steps(each.values, self.order))]:
            self._continue(self._unshared(asked, owners) if self.share else asked)
        return [self._labels(each) for each in searches]

    def _unshared(
        self, asked: Sequence[tuple[_Search, list[int]]], owners: dict[Any, tuple[_Search, int]]
    ) -> list[tuple[_Search, list[int]]]:
        """The prefixes that are left to draw, one by one. One that another solution drew, graded by the same answer, is
        taken over; one that another draws in this round, in the next."""
        left = []
        for each, step in ((each, step) for each, steps in asked for step in steps):
            owner, place = owners.setdefault((each.prefix(step), str(each.solution.row["answer"])), (each, step))
            if owner is each:
                left.append((each, [step]))
            elif owner.values[place] is not None:
                each.take(step, owner, place)
        return left

    def _continue(self, asked: Sequence[tuple[_Search, list[int]]]) -> None:
        """Continue these prefixes, and keep what comes of it."""
        cuts = [[each.solution.spans[step][1] for step in steps] for each, steps in asked]
        branches = [continued(each.solution, ends) for (each, _), ends in zip(asked, cuts, strict=True)]
        if self.share:
            keys = [stream_key(0, "prefix", *each.prefix(step)) >> 65 for each, (step,) in asked]
            branches = [replace(branch, index=key) for branch, key in zip(branches, keys, strict=True)]
        results = self.engine.continue_branches(branches, self.sampling, purpose="monte-carlo")
        drawn = [
            (each.solution, end, continuations)
            for (each, _), ends, result in zip(asked, cuts, results, strict=True)
            for end, continuations in zip(ends, result.continuations, strict=True)
        ]
        verdicts = grade_continuations(drawn, self.policy, self.grader, self.sampling)
        succeeding = iter(self._succeeding(drawn, verdicts))
        marks = iter(verdicts)
        for (each, steps), result in zip(asked, results, strict=True):
            for step in steps:
                found, each.texts[step] = next(marks), next(succeeding)
                each.successes[step], each.trials[step] = sum(found), len(found)
                each.values[step] = sum(found) / len(found)
            each.generated += sum(len(one.token_ids) for group in result.continuations for one in group)
            each.prefill += result.prefill_tokens

    def _labels(self, search: _Search) -> StepLabels:
        """What a search that is over says of its solution."""
        values, texts = search.values, search.texts
        facts: dict[str, Any] = {
            "successes": search.successes,
            "trials": search.trials,
            "generated_tokens": search.generated,
            "prefill_tokens": search.prefill,
            **({"reused": search.reused} if self.share else {}),
        }
        first = bracket(values, self.order)[1]  # what the search passed over follows from it
        known = [float(i < first) if self.order != "all" else value or 0.0 for i, value in enumerate(values)]
        reduced = reduce_values(known, self.reduce)
        if self.consistent:
            kept, texts = consistent_labels(search.solution.steps, reduced, texts)
            facts["suspicious"] = sum(after is not before for after, before in zip(kept, reduced, strict=True))
            reduced = kept
        if self.keep_continuations:
            facts["continuations"] = [each[0] if each else None for each in texts]
        return StepLabels(reduced, values=tuple(values), facts=facts)

    def _succeeding(
        self, drawn: Sequence[tuple[Solution, int, Sequence[Completion]]], verdicts: Sequence[Sequence[bool]]
    ) -> list[list[str]]:
        """The texts of the continuations that reach the answer and their end; none where nobody reads them."""
        if not (self.consistent or self.keep_continuations):
            return [[] for _ in drawn]
        texts = []
        for (solution, end, continuations), marks in zip(drawn, verdicts, strict=True):
            before = solution.token_ids[:end].tolist()
            start, marked = len(decode_text(self.policy.tokenizer, before)), zip(continuations, marks, strict=True)
            ids = [[*before, *each.token_ids.tolist()] for each, good in marked if good and each.finish == "stop"]
            texts.append([_until_stop(each, end, self.policy, self.sampling)[start:] for each in ids])
        return texts

    def provenance(self) -> dict[str, Any]:
        """What the labels came from."""
        from stepkd.models.checkpoint import sampled_by

        facts: dict[str, Any] = {"labeller": "monte_carlo", **sampled_by(self.policy, self.sampling)}
        facts |= {"J": self.sampling.n, "reduce": self.reduce}
        facts |= {"order": self.order} if self.order != "all" else {}
        return facts | {name: True for name in ("share", "consistent") if getattr(self, name)}

    def _open_steps(self, solution: Solution) -> list[int]:
        """Numbers of the steps whose prefix can be continued."""
        ids, ended = solution.token_ids.tolist(), self.policy.eos_ids
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
        return extract_answer(decode_text(self.policy.tokenizer, ids), marks) if marks else None


def bracket(values: Sequence[float | None], order: Order) -> tuple[int, int]:
    """Where the first error of a solution must be.

    Args:
        values: of its steps; None: not known.
        order: ``binary`` takes for granted that a prefix of one that succeeds would succeed; the others go by the steps
            from the first one on whose values are known.

    Returns:
        The last step that is taken to be correct (-1: none), and the first one behind it whose prefix is known to fail
        (the number of steps: none): the first error, where the two are neighbours.
    """
    if order == "binary":
        low = max((i for i, value in enumerate(values) if value), default=-1)
    else:
        low = [*map(bool, values), False].index(False) - 1
    return low, next((i for i in range(low + 1, len(values)) if values[i] == 0), len(values))


def next_steps(values: Sequence[float | None], order: Order) -> list[int]:
    """The steps whose prefixes are to be continued next.

    Args:
        values: shares of success of the steps' prefixes; None: not known yet.
        order: ``all`` asks about every prefix at once. ``forward`` asks about one after the other until one fails.
            ``binary`` asks about the middle one of those left: ceil(log2(S)) prefixes of the S of a solution with an
            incorrect answer (which is known to fail at its end), and none where the answer is correct. It finds the
            first error that labelling every prefix finds where values are monotone (no prefix behind one that fails
            succeeds); else it finds a step that fails behind one that succeeds.

    Returns:
        Their numbers, in order; none when the solution is settled.
    """
    if order == "all":
        return [i for i, value in enumerate(values) if value is None]
    low, high = bracket(values, order)
    if high - low == 1:
        return []
    return [low + 1 if order == "forward" else (low + high) // 2]


def consistent_labels(
    steps: Sequence[str], labels: Sequence[Label], texts: Sequence[list[str]]
) -> tuple[tuple[Label, ...], list[list[str]]]:
    """Labels without those of steps that are called correct although no continuation takes up their result: the number
    that a step ends with must be found in what follows it.

    Args:
        steps: texts of the steps; one without a number has no result, and keeps its label.
        labels: of the steps.
        texts: of every step the continuations that succeed; where there are none, the label stays.

    Returns:
        The labels, None in place of those; and the continuations that take up their step's result.

    Source: GLoRe (arXiv 2402.10963), after descriptions of it: there the results of all steps before count. That the
    last number is a step's result is ours.
    """
    used = []
    for step, each in zip(steps, texts, strict=True):
        result = set(map(canonical_answer, numbers_in(step)[-1:]))
        used.append([text for text in each if result <= set(map(canonical_answer, numbers_in(text)))])
    kept = [
        None if passes(label) and each and not own else label
        for label, each, own in zip(labels, texts, used, strict=True)
    ]
    return tuple(kept), used


def continued(solution: Solution, ends: Sequence[int]) -> Branch:
    """A solution whose prefixes of these lengths, in tokens of its own, are to be continued."""
    prompt = len(solution.prompt_ids)
    whole = (*solution.prompt_ids.tolist(), *solution.token_ids.tolist())
    return Branch(whole, [prompt + end for end in ends], solution.index)


def grade_continuations(
    drawn: Sequence[tuple[Solution, int, Sequence[Completion]]],
    policy: Any,
    grader: Grader,
    sampling: SamplingConfig,
) -> list[list[bool]]:
    """Whether each continuation reaches its problem's answer.

    Args:
        drawn: a solution, the length of its prefix in tokens, and what continues that.
        policy: its tokenizer decodes a prefix and its continuation together.
        grader: compares answers.
        sampling: how the continuations were drawn; a stop string ends a text.
    """
    flat = [
        (solution, [*solution.token_ids[:end].tolist(), *each.token_ids.tolist()], end, each)
        for solution, end, continuations in drawn
        for each in continuations
    ]
    grades = iter(
        grader.grade(
            [_until_stop(ids, end, policy, sampling) for _, ids, end, _ in flat],
            [str(solution.row["answer"]) for solution, _, _, _ in flat],
            cut_off=[each.finish == "length" for _, _, _, each in flat],
            rows=[solution.row for solution, _, _, _ in flat],
        )
    )
    return [[next(grades).verdict == "correct" for _ in continuations] for _, _, continuations in drawn]


def _until_stop(ids: Sequence[int], known: int, policy: Any, sampling: SamplingConfig) -> str:
    """Text of all ids, decoded together, up to a stop string that comes after the first ``known`` ids."""
    text = decode_text(policy.tokenizer, ids)
    if not sampling.stop:
        return text
    start = len(decode_text(policy.tokenizer, ids[:known]))
    cuts = [found for word in sampling.stop if (found := text.find(word, start)) >= 0]
    return text[: min(cuts, default=len(text))]
