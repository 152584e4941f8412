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
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal

from stepkd.data.completion import Completion
from stepkd.data.encode import Encoder, Example, Item, as_completion, with_end
from stepkd.data.rows import PREFERENCE, ROLLOUT, STEP_PREFERENCE, STEPWISE, UNPAIRED
from stepkd.data.step_labels import LabelRule, Target, step_targets
from stepkd.data.templates import PromptTemplate
from stepkd.errors import ConfigError, DataError
from stepkd.steps.format import written_steps
from stepkd.steps.labels import tally
from stepkd.steps.segment import Segmenter, Span, segment, spans_from_ends
from stepkd.steps.text import TokenizedText, first_difference, text_from_ids, tokenize_text

RIGHT, WRONG, UNKNOWN = 1, 0, -1


class FeedbackEncoder(Encoder):
    """Turns labelled rollouts, stepwise rows and unpaired rows into completions with an outcome, and a label per step.

    Args:
        tokenizer, template, segmenter, max_length: as for :class:`~stepkd.data.encode.Encoder`.
        labels: how labels become right or wrong. ``after_error: truncate`` cuts the completion off after its first
            wrong step, so that later tokens are in neither term; ``mask`` drops the later labels only; None: all labels
            are kept.
        learns: what the method learns from, ``outcomes``, or ``outcomes`` and ``steps``: see :meth:`check`.

    Raises:
        ConfigError: a rule for outcomes only.
    """

    contracts = (ROLLOUT, STEPWISE, UNPAIRED)

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
        self.labels: LabelRule = labels or LabelRule(after_error="keep")
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
        name = str(row.get("id", "?"))
        outcome = _outcome(row, name)
        before = self.counts["steps_dropped"]
        example = self._stepwise(row, name, outcome) if row.get("completions") is not None else super().example(row)
        if example is None:
            return None
        cut_off = self.counts["steps_dropped"] - before
        labels = self._labels(row, name, len(example.spans) + cut_off)
        spans, ids = example.spans, example.token_ids
        if self.labels.after_error == "truncate" and WRONG in labels[: len(spans) - 1]:
            spans = spans[: labels.index(WRONG) + 1]
            ids = ids[: spans[-1][1]]
            self.counts["rows_cut_at_first_error"] += 1
        labels = labels[: len(spans)]
        if outcome == UNKNOWN and all(label == UNKNOWN for label in labels):
            self.counts["rows_without_feedback"] += 1
            return None
        self.counts["rows_without_outcome"] += outcome == UNKNOWN
        return as_completion(
            example.prompt_ids,
            ids,
            spans,
            id=name,
            row=row,
            outcome=outcome,
            targets=tuple(None if label == UNKNOWN else (1.0 - label, float(label)) for label in labels),
            read_at=tuple(end - 1 for _, end in spans),
        )

    def check(self, examples: Sequence[Item], *, training: bool, allow_one_class: bool) -> dict[str, int]:
        """Counts of outcomes and steps by label; what is not labelled at all, or of one class only, is refused."""
        counts = feedback_counts(examples)
        for kind in self.learns:
            right, wrong = counts[f"right_{kind}"], counts[f"wrong_{kind}"]
            if training and right + wrong and not (right and wrong) and not allow_one_class:
                raise DataError(
                    f"all {right + wrong} labelled {kind} are {'right' if right else 'wrong'}: nothing contrasts with "
                    "them. Take a stronger or weaker sampler, more samples per problem, or set data.allow_one_class"
                )
            if training and kind == self.learns[-1] and not right + wrong:
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

    def _stepwise(self, row: Mapping[str, Any], name: str, outcome: int) -> Example | None:
        """A solution that comes as step texts; one whose outcome is not known may be unfinished and gets no end."""
        prompt = self.prompt_ids(row)
        written = written_steps(row["completions"])
        text = tokenize_text(self.tokenizer, "".join(written))
        ends = [text.token_end(end) for end in accumulate(map(len, written))]
        if any(end <= before for before, end in zip([0, *ends], ends, strict=False)):
            raise DataError(
                "two steps share a token: give steps that a line break keeps apart", path=name, column="completions"
            )
        spans: list[Span] = spans_from_ends(ends, len(text))
        if outcome != UNKNOWN:
            text, spans = self._with_end(text, spans)
        return self._cut(name, prompt, text, spans, row)

    def _labels(self, row: Mapping[str, Any], name: str, num_steps: int) -> tuple[int, ...]:
        if all(row.get(column) is None for column in ("labels", "step_labels", "step_values")):
            return (UNKNOWN,) * num_steps
        return tuple(_hard(target, name) for target in step_targets(row, num_steps, 2, self.labels))


def _hard(target: Target | None, name: str) -> int:
    if target is None:
        return UNKNOWN
    if target[1] not in (0.0, 1.0):
        raise DataError(
            f"a step label of {target[1]:g} is neither right nor wrong, and feedback is binary: set "
            "labels.harden (0.001 is 'any continuation succeeded'), or convert the rows with --to binary",
            path=name,
            column="step_labels",
        )
    return int(target[1])


def _outcome(row: Mapping[str, Any], name: str) -> int:
    column = next((c for c in ("correct", "outcome", "label") if row.get(c) is not None), None)
    if column is None:
        return UNKNOWN
    if not isinstance(row[column], bool):
        raise DataError(f"must be true or false, found {row[column]!r}", path=name, column=column)
    return int(row[column])


def feedback_counts(examples: Iterable[Item]) -> dict[str, int]:
    """Correct and incorrect outcomes and steps, and conflicts (:func:`~stepkd.steps.labels.tally`)."""
    found = [completion for example in examples for completion in example.completions]
    outcomes = Counter(example.outcome for example in found)
    steps = Counter(label for example in found for label in example.step_labels)
    return {
        "right_outcomes": outcomes[RIGHT],
        "wrong_outcomes": outcomes[WRONG],
        "right_steps": steps[RIGHT],
        "wrong_steps": steps[WRONG],
        "conflicts": tally(
            (example.outcome == RIGHT for example in found),
            ([None if label == UNKNOWN else label == RIGHT for label in example.step_labels] for example in found),
        ).flawed,
    }


Ids = tuple[int, ...]


@dataclass(frozen=True)
class PairExample(Example):
    """A pair; ``prompt_ids`` include the prefix, ``token_ids`` and ``spans`` are those of the preferred side."""

    rejected_ids: Ids = ()
    """Ids of the other side."""
    rejected_spans: tuple[Span, ...] = ()
    """Its steps."""
    visits: tuple[int, int] | None = None
    """How often a tree search visited the better and the worse side."""

    @property
    def length(self) -> int:
        """Prompt and both sides, in tokens."""
        return len(self.prompt_ids) + len(self.token_ids) + len(self.rejected_ids)

    @cached_property
    def completions(self) -> tuple[Completion, Completion]:
        """The preferred completion, and the other."""
        return (
            self.completion,
            as_completion(self.prompt_ids, self.rejected_ids, self.rejected_spans),
        )


class PairEncoder(Encoder):
    """Turns preference rows into :class:`PairExample` objects.

    A side that does not fit into ``max_length`` with the prompt takes its pair out, as does a pair whose sides have the
    same ids: both are counted. Nothing is cut off, because the shorter text would be another preference.
    """

    contracts = (PREFERENCE, STEP_PREFERENCE)

    def check(self, examples: Sequence[Item], *, training: bool, allow_one_class: bool) -> dict[str, int]:
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
        name = str(row.get("id", "?"))
        prompt = self.prompt_ids(row)
        if row.get("prefix") is None:
            sides = [self._whole(row, side) for side in ("chosen", "rejected")]
            prefix: Ids = ()
        else:
            prefix, sides = self._steps(row)
        for side, ids in zip(("chosen", "rejected"), sides, strict=True):
            if not ids:
                raise DataError("has no tokens", path=name, column=side)
        if sides[0] == sides[1]:
            self.counts["pairs_with_equal_sides"] += 1
            return None
        if len(prompt) + len(prefix) + max(map(len, sides)) > self.max_length:
            self.counts["pairs_too_long"] += 1
            return None
        visits = (row.get("chosen_visits"), row.get("rejected_visits"))
        return PairExample(
            name,
            (*prompt, *prefix),
            sides[0],
            self._spans(row, sides[0]),
            row,
            rejected_ids=sides[1],
            rejected_spans=self._spans(row, sides[1]),
            visits=None if visits[0] is None or visits[1] is None else (int(visits[0]), int(visits[1])),
        )

    def _nothing_left(self) -> str:
        return f"no pair is left ({dict(self.counts)}): raise max_length={self.max_length}, or look at the builder"

    def _whole(self, row: Mapping[str, Any], side: str) -> Ids:
        if (ids := self._sampled_side(row, side, str(row[side]))) is not None:
            return ids
        text = tokenize_text(self.tokenizer, row[side])
        return with_end(text, self.template, self.tokenizer).token_ids

    def _steps(self, row: Mapping[str, Any]) -> tuple[Ids, list[Ids]]:
        """Shared prefix and the two next steps."""
        text = "".join(row["prefix"])
        prefix = self._sampled_side(row, "prefix", text) if text else ()
        sampled = [self._sampled_side(row, side, row[side]) for side in ("chosen", "rejected")]
        chosen, rejected = sampled
        if chosen is not None and rejected is not None:
            return tokenize_text(self.tokenizer, text).token_ids if prefix is None else prefix, [chosen, rejected]
        # Both sides must share every id before the step, so one with ids goes back to its text with the other.
        if (chosen is None) != (rejected is None):
            self.counts["pairs_with_ids_of_one_side"] += 1
        whole = [tokenize_text(self.tokenizer, text + row[side]) for side in ("chosen", "rejected")]
        cut = min(_step_start(each, len(text)) for each in whole)
        cut = min(cut, first_difference(whole[0].token_ids, whole[1].token_ids))
        return whole[0].token_ids[:cut], [each.token_ids[cut:] for each in whole]

    def _sampled_side(self, row: Mapping[str, Any], column: str, text: str) -> Ids | None:
        """A side's sampled ids, unless they are another tokenizer's."""
        ids = row.get(f"{column}_ids")
        if ids is None:
            return None
        if any(i >= len(self.tokenizer) for i in ids):
            decoded = None
        else:
            decoded = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        # A piece that begins a text may lose its space in decoding.
        if decoded is None or decoded.strip() != text.strip():
            self.counts["sides_of_another_tokenizer"] += 1
            return None
        return tuple(ids)

    def _spans(self, row: Mapping[str, Any], ids: Ids) -> tuple[Span, ...]:
        """Steps of a whole solution; a next step is one."""
        if row.get("prefix") is not None:
            return ((0, len(ids)),)
        spans = segment(self.segmenter, text_from_ids(self.tokenizer, ids))
        return tuple(spans) or ((0, len(ids)),)


def _step_start(text: TokenizedText, characters: int) -> int:
    """Number of leading tokens that the first ``characters`` are written with; one that goes beyond them is not."""
    if not characters:
        return 0
    last = bisect_left(text.char_ends, characters)
    return last + (text.char_ends[last] == characters)
