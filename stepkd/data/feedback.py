"""Rows with right/wrong feedback to examples of KTO and Step-KTO: an outcome, and a label per step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from stepkd.data.encode import Encoder, Example
from stepkd.data.step_labels import LabelRule, Target, step_targets
from stepkd.data.templates import PromptTemplate
from stepkd.errors import ConfigError, DataError
from stepkd.steps import Segmenter, Span, spans_from_ends, tokenize_text, written_steps

RIGHT, WRONG, UNKNOWN = 1, 0, -1


@dataclass(frozen=True)
class FeedbackExample(Example):
    """A completion with its outcome and its steps' labels."""

    outcome: int = UNKNOWN
    """1: the answer is right (the completion is desirable), 0: it is not, -1: not known."""
    step_labels: tuple[int, ...] = ()
    """For each step 1, 0 or -1."""


class FeedbackEncoder(Encoder):
    """Turns labelled rollouts, stepwise rows and unpaired rows into :class:`FeedbackExample` objects.

    Args:
        tokenizer, template, segmenter, max_length: as for :class:`~stepkd.data.encode.Encoder`.
        labels: how labels become right or wrong. ``after_error: truncate`` cuts the completion off after its first
            wrong step, so that later tokens are in neither term; ``mask`` drops the later labels only.

    Raises:
        ConfigError: a rule for outcomes only.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: PromptTemplate,
        segmenter: Segmenter,
        *,
        max_length: int = 1024,
        labels: LabelRule | None = None,
    ) -> None:
        super().__init__(tokenizer, template, segmenter, max_length=max_length)
        self.labels = labels or LabelRule(after_error="keep")
        if self.labels.scope != "steps":
            raise ConfigError(
                "labels.scope: outcome is for outcome reward models; for feedback on whole completions alone use KTO"
            )

    def example(self, row: Mapping[str, Any]) -> FeedbackExample | None:
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
        wrong = next((i for i, label in enumerate(labels) if label == WRONG), None)
        spans, ids = example.spans, example.completion_ids
        if self.labels.after_error == "truncate" and wrong is not None and wrong + 1 < len(spans):
            spans = spans[: wrong + 1]
            ids = ids[: spans[-1][1]]
            self.counts["rows_cut_at_first_error"] += 1
        labels = labels[: len(spans)]
        if outcome == UNKNOWN and all(label == UNKNOWN for label in labels):
            self.counts["rows_without_feedback"] += 1
            return None
        self.counts["rows_without_outcome"] += outcome == UNKNOWN
        return FeedbackExample(name, example.prompt_ids, ids, spans, row, outcome=outcome, step_labels=labels)

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
