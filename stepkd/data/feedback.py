"""Rows with feedback to examples of KTO and Step-KTO (an outcome, and a label per step), and of DPO and Step-DPO.

A pair is two completions of one prompt: whole solutions, or single next steps after a shared prefix. The rule of its
ids. Where a row has the sampled ids of a side and they decode to its text, they are used as they are; next steps need
them on both sides, because the two must share every id before the step (a prefix without ids is tokenised by itself
then). Otherwise steps are tokenised together with the prefix they follow, and cut where the step begins; a token across
that boundary belongs to the step. No end token is appended to a step: only sampled ids can say that the solution ended
there.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Any, Literal

from stepkd.data.completion import Completion
from stepkd.data.encode import Encoder, LabelRule, Target, refused, row_outcome, step_targets, with_end
from stepkd.data.rows import COMPLETION, PREFERENCE, STEP_PREFERENCE, STEPWISE, UNPAIRED
from stepkd.data.templates import PromptTemplate
from stepkd.errors import ConfigError, DataError
from stepkd.steps.format import written_steps
from stepkd.steps.labels import tally
from stepkd.steps.segment import Segmenter, Span, segment, spans_from_ends
from stepkd.steps.text import TokenizedText, first_difference, text_from_ids, tokenize_text

CORRECT, INCORRECT, UNKNOWN = 1, 0, -1
INCORRECT_TARGET = (1.0, 0.0)
"""Target of an incorrect step."""
SIDES = ("chosen", "rejected")


class FeedbackEncoder(Encoder):
    """Turns labelled completions, stepwise rows and unpaired rows into completions with an outcome, and a label per
    step.

    Args:
        tokenizer, template, segmenter, max_length: as for :class:`~stepkd.data.encode.Encoder`.
        labels: how labels become correct or incorrect. ``after_error: truncate`` cuts the completion off after its
            first incorrect step, so that later tokens are in neither term; ``mask`` drops the later labels only; None:
            all labels are kept.
        learns: what the method learns from, ``outcomes``, or ``outcomes`` and ``steps``: see :meth:`check`.

    Raises:
        ConfigError: a rule for outcomes only.
    """

    contracts = (COMPLETION, STEPWISE, UNPAIRED)

    def __init__(
        self,
        tokenizer: Any,
        template: PromptTemplate,
        segmenter: Segmenter,
        *,
        max_length: int = 1024,
        labels: LabelRule | None = None,
        learns: Sequence[Literal["outcomes", "steps"]] = ("outcomes",),
    ) -> None:
        super().__init__(tokenizer, template, segmenter, max_length=max_length)
        labels = labels or LabelRule()
        self.labels: LabelRule = replace(labels, after_error=labels.after_error or "keep")
        self.learns = learns
        if self.labels.scope != "steps":
            raise ConfigError(
                "labels.scope: outcome is for outcome reward models; for feedback on whole completions alone use KTO"
            )

    def example(self, row: Mapping[str, Any]) -> Completion | None:
        """A row's completion, outcome and labels; None (and a count) when there is nothing to learn from it.

        The labels of steps that do not fit into ``max_length`` go with their steps.

        Raises:
            DataError: labels that do not fit the steps, or soft labels without ``labels.harden``.
        """
        known, prompt = row_outcome(row), self.prompt_ids(row)
        outcome = UNKNOWN if known is None else int(known)
        completion, spans = self.steps(row)
        if not (fitting := self._fitting(prompt, spans)):
            return None
        targets = self._targets(row, len(spans))[:fitting]
        if self.labels.after_error == "truncate" and INCORRECT_TARGET in targets[:-1]:
            targets = targets[: targets.index(INCORRECT_TARGET) + 1]
            self.counts["rows_cut_at_first_error"] += 1
        if outcome == UNKNOWN and all(target is None for target in targets):
            self.counts["rows_without_feedback"] += 1
            return None
        self.counts["rows_without_outcome"] += outcome == UNKNOWN
        return self._completion(
            row,
            prompt,
            completion.token_ids,
            spans[: len(targets)],
            outcome=outcome,
            targets=tuple(targets),
            read_at=tuple(end - 1 for _, end in spans[: len(targets)]),
        )

    def check(self, examples: Sequence[Completion], *, training: bool, allow_one_class: bool) -> dict[str, int]:
        """Counts of outcomes and steps by label; what is not labelled at all, or of one class only, is refused."""
        counts = feedback_counts(examples)
        for kind in self.learns:
            correct, incorrect = counts[f"correct_{kind}"], counts[f"incorrect_{kind}"]
            if training and correct + incorrect and not (correct and incorrect) and not allow_one_class:
                raise DataError(
                    f"all {correct + incorrect} labelled {kind} are {'correct' if correct else 'incorrect'}: nothing "
                    "contrasts with them. Take a stronger or weaker sampler, more samples per problem, or set "
                    "data.allow_one_class"
                )
            if training and kind == self.learns[-1] and not correct + incorrect:
                raise DataError(
                    f"no row has labelled {kind}, and the method learns from them: label the rows (stepkd label), or "
                    + ("use KTO, which needs none" if kind == "steps" else "use other data")
                )
        return counts

    def _nothing_left(self) -> str:
        return (
            f"no row has feedback (an outcome or a labelled step) and a step that fits into max_length="
            f"{self.max_length} tokens ({dict(self.counts)})"
        )

    def steps(self, row: Mapping[str, Any]) -> tuple[TokenizedText, list[Span]]:
        """Of step texts, too; a solution of them whose outcome is not known may be unfinished and gets no end."""
        if row.get("completions") is None:
            return super().steps(row)
        written = written_steps(row["completions"])
        text = tokenize_text(self.tokenizer, "".join(written))
        ends = [text.token_end(end) for end in accumulate(map(len, written))]
        if any(end <= before for before, end in pairwise([0, *ends])):
            raise refused(row, "completions", "two steps share a token: give steps that a line break keeps apart")
        spans = spans_from_ends(ends, len(text))
        return (text, spans) if row_outcome(row) is None else self._with_end(text, spans)

    def _targets(self, row: Mapping[str, Any], num_steps: int) -> list[Target | None]:
        if all(row.get(column) is None for column in ("labels", "step_labels", "step_values")):
            return [None] * num_steps
        targets = step_targets(row, num_steps, 2, self.labels)
        if soft := [target[1] for target in targets if target is not None and target[1] not in (0.0, 1.0)]:
            raise refused(
                row,
                "step_labels",
                f"a step label of {soft[0]:g} is neither correct nor incorrect, and feedback is binary: set "
                "labels.harden (0.001 is 'any continuation succeeded')",
            )
        return targets


def feedback_counts(examples: Iterable[Completion]) -> dict[str, int]:
    """Count what completions with outcomes and step labels give to learn from.

    Args:
        examples: encoded rows.

    Returns:
        ``correct_outcomes``, ``incorrect_outcomes``, ``correct_steps``, ``incorrect_steps``, and
        ``correct_with_incorrect_step`` (:class:`~stepkd.steps.labels.Tally`).
    """
    found = [completion for example in examples for completion in example.completions]
    outcomes = Counter(example.outcome for example in found)
    steps = Counter(label for example in found for label in example.step_labels)
    return {
        "correct_outcomes": outcomes[CORRECT],
        "incorrect_outcomes": outcomes[INCORRECT],
        "correct_steps": steps[CORRECT],
        "incorrect_steps": steps[INCORRECT],
        "correct_with_incorrect_step": tally(
            (example.outcome == CORRECT for example in found),
            ([None if label == UNKNOWN else label == CORRECT for label in example.step_labels] for example in found),
        ).correct_with_incorrect_step,
    }


Ids = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class PairExample(Completion):
    """The preferred completion of a pair, with the other one. Their prompt includes the prefix."""

    rejected: Completion = field(kw_only=True)
    """The other completion of the same prompt."""
    visits: tuple[int, int] | None = field(default=None, kw_only=True)
    """How often a tree search visited the better and the worse side."""

    @property
    def completions(self) -> tuple[Completion, Completion]:
        """The preferred completion, and the other."""
        return (self, self.rejected)


class PairEncoder(Encoder):
    """Turns preference rows into :class:`PairExample` objects.

    A side that does not fit into ``max_length`` with the prompt takes its pair out, as does a pair whose sides have the
    same ids: both are counted. Nothing is cut off, because the shorter text would be another preference.
    """

    contracts = (PREFERENCE, STEP_PREFERENCE)

    def check(self, examples: Sequence[Completion], *, training: bool, allow_one_class: bool) -> dict[str, int]:
        """How many pairs have a prefix, and how many have visit counts."""
        counts = {
            "with_prefix": sum(bool(pair.row.get("prefix")) for pair in examples),
            "with_visits": sum(getattr(pair, "visits", None) is not None for pair in examples),
        }
        return {key: count for key, count in counts.items() if count}

    def example(self, row: Mapping[str, Any]) -> PairExample | None:
        """A row's pair; None (and a count in ``counts``) when it cannot be used.

        Raises:
            DataError: a side without tokens.
        """
        prompt = self.prompt_ids(row)
        prefix, sides = self._sides(row)
        for side, ids in zip(SIDES, sides, strict=True):
            if not ids:
                raise refused(row, side, "has no tokens")
        if sides[0] == sides[1]:
            self.counts["pairs_with_equal_sides"] += 1
            return None
        if len(prompt) + len(prefix) + max(map(len, sides)) > self.max_length:
            self.counts["pairs_too_long"] += 1
            return None
        chosen, rejected = (self._completion(row, (*prompt, *prefix), ids, self._spans(row, ids)) for ids in sides)
        better, worse = (row.get(f"{side}_visits") for side in SIDES)
        visits = None if better is None or worse is None else (better, worse)
        return PairExample(**vars(chosen), rejected=rejected, visits=visits)

    def _nothing_left(self) -> str:
        return f"no pair is left ({dict(self.counts)}): raise max_length={self.max_length}, or look at the builder"

    def _sides(self, row: Mapping[str, Any]) -> tuple[Ids, list[Ids]]:
        """Shared prefix, and the two next steps; without a prefix two whole solutions."""
        sampled = [self._sampled_side(row, side, row[side]) for side in SIDES]
        if row.get("prefix") is None:
            texts = [tokenize_text(self.tokenizer, row[side]) for side in SIDES]
            ended = [with_end(text, self.template, self.tokenizer).token_ids for text in texts]
            return (), [own if ids is None else ids for ids, own in zip(sampled, ended, strict=True)]
        text = "".join(row["prefix"])
        prefix = self._sampled_side(row, "prefix", text) if text else ()
        chosen, rejected = sampled
        if chosen is not None and rejected is not None:
            return tokenize_text(self.tokenizer, text).token_ids if prefix is None else prefix, [chosen, rejected]
        # Both sides must share every id before the step, so one with ids goes back to its text with the other.
        if (chosen is None) != (rejected is None):
            self.counts["pairs_with_ids_of_one_side"] += 1
        whole = [tokenize_text(self.tokenizer, text + row[side]) for side in SIDES]
        cut = min(_step_start(each, len(text)) for each in whole)
        cut = min(cut, first_difference(whole[0].token_ids, whole[1].token_ids))
        return whole[0].token_ids[:cut], [each.token_ids[cut:] for each in whole]

    def _sampled_side(self, row: Mapping[str, Any], column: str, text: str) -> Ids | None:
        """A side's sampled ids, unless they are another tokenizer's."""
        ids = row.get(f"{column}_ids")
        if ids is None:
            return None
        if all(i < len(self.tokenizer) for i in ids):
            decoded = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            if decoded.strip() == text.strip():  # a piece that begins a text may lose its space in decoding
                return tuple(ids)
        self.counts["sides_of_another_tokenizer"] += 1
        return None

    def _spans(self, row: Mapping[str, Any], ids: Ids) -> list[Span]:
        """Steps of a whole solution; a next step is one."""
        whole = row.get("prefix") is None
        return (whole and segment(self.segmenter, text_from_ids(self.tokenizer, ids))) or [(0, len(ids))]


def _step_start(text: TokenizedText, characters: int) -> int:
    """Number of leading tokens that the first ``characters`` are written with; one that goes beyond them is not."""
    if not characters:
        return 0
    last = bisect_left(text.char_ends, characters)
    return last + (text.char_ends[last] == characters)
