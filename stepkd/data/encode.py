"""Rows to token ids and training targets: the prompt as at inference, the completion once and as a whole.

The boundary rule. The prompt is tokenised exactly as the sampler will tokenise it and the completion on its own, so no
token straddles the two and training sees the ids that inference sees.

The end rule. A finished solution ends in the token that the chat template writes behind an answer (plain style: the
tokenizer's end token), which is a training target and belongs to the last step; it is never doubled. A completion given
as ``token_ids`` (a sampled one) is used as it is: sampled ids are never re-tokenised, and nothing is appended to one
that was cut off.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from stepkd.data.completion import Completion
from stepkd.data.rows import Contract, ends_partition
from stepkd.data.templates import PromptTemplate, end_ids
from stepkd.errors import ConfigError, DataError, check_bounds
from stepkd.steps.labels import ANY_SUCCESS, LabelKind, Neutral, Progress, check_threshold, label_kind, verdicts
from stepkd.steps.segment import Segmenter, Span, segment, spans_from_ends, step_ends
from stepkd.steps.text import TokenizedText, text_from_ids, tokenize_text

Target = tuple[float, ...]


@dataclass(frozen=True)
class LabelRule:
    """How step labels become targets."""

    kind: Literal["auto"] | LabelKind = "auto"
    """What the labels must be: correct/incorrect, -1/0/1, or chances in [0, 1]; ``auto`` takes what each row has."""
    after_error: Literal["keep", "truncate", "mask"] | None = None
    """Steps after the first incorrect one: keep their labels, cut the solution off there, or leave it whole without
    these labels; None: reward models truncate, KTO and Step-KTO keep. A soft label is an incorrect step below
    ``harden``, and without it only where it is 0. A causal model gives the same gradient for ``truncate`` and
    ``mask``."""
    neutral: Neutral = "correct"
    """What a rating of 0 means to a head of two classes."""
    harden: float | None = None
    """Threshold, in (0, 1), from which on a soft label becomes correct, and below it incorrect; None keeps labels soft.
    One below the smallest share of continuations, such as 0.001, means "any continuation succeeded"."""
    scope: Literal["steps", "outcome"] = "steps"
    """``steps``: a process reward model; ``outcome``: one label at the last step, whether the answer is correct (an
    outcome reward model)."""
    progress: Progress | None = None
    """How steps are called correct by their values relative to those before them, ``ValueRatio`` or
    ``EffectiveReward``: rows need Monte-Carlo values of every step (``step_values`` of ``order: all``, or soft labels)
    and a ``pass_rate``, both of which ``stepkd label`` writes of samples; None reads labels as they are."""

    def __post_init__(self) -> None:
        check_bounds("labels.", self)
        if self.harden is not None:
            check_threshold(self.harden, "labels.harden")
        needed = {"harden": (None,), "scope": ("steps",), "kind": ("auto", "soft")}
        for name, fine in needed.items() if self.progress is not None else ():
            if (value := getattr(self, name)) not in fine:
                others = " or ".join("null" if each is None else each for each in fine)
                raise ConfigError(f"labels.{name}={value}: labels.progress makes labels of values, set it to {others}")


def step_targets(row: Mapping[str, Any], num_steps: int, num_classes: int, rule: LabelRule) -> list[Target | None]:
    """Target of every step of a row.

    Args:
        row: has ``labels`` (step-labelled rows), or ``step_labels`` / ``step_values`` (completions), or, for
            ``scope="outcome"``, ``outcome`` / ``correct``.
        num_steps: how many steps the row has.
        num_classes: 2 or 3, worst to best.
        rule: see :class:`LabelRule`.

    Returns:
        One target per step; None: not trained on.

    Raises:
        DataError: no labels, another number than steps, another kind than declared, soft labels for three classes, or
            for ``progress`` no values or no pass rate.
    """
    if rule.scope == "outcome":
        outcome = row_outcome(row, ("outcome", "correct"))
        if outcome is None:
            raise refused(
                row,
                "outcome",
                "an outcome reward model needs whether the answer is correct: give rows with a boolean 'outcome' (or "
                "completions with 'correct')",
            )
        return [None] * (num_steps - 1) + [_one_hot(num_classes - 1 if outcome else 0, num_classes)]
    columns = ("labels", "step_labels", "step_values")
    if rule.kind == "soft":
        columns = ("labels", "step_values", "step_labels")
    if rule.progress is not None:
        columns = ("step_values", "labels", "step_labels")
    column = next((each for each in columns if row.get(each) is not None), "labels")
    labels = row.get(column)
    if labels is None:
        raise refused(row, column, "no step labels: label the row first (stepkd label)")
    if len(labels) != num_steps:
        raise refused(row, column, f"{len(labels)} labels for {num_steps} steps: give one a step, null for none")
    if all(label is None for label in labels):
        return [None] * num_steps
    try:
        kind = label_kind(labels)
    except DataError as error:
        raise refused(row, column, str(error)) from error
    if rule.progress is None and rule.kind not in ("auto", kind):
        said = (
            f"labels are of kind {kind!r} and labels.kind asks for {rule.kind!r}: nothing is cast silently. Set "
            f"labels.kind: {kind}, or auto where rows differ"
        )
        raise refused(row, column, said)
    if rule.progress is not None:
        labels, kind = _progress(row, column, labels, kind, rule.progress), "bool"
    if kind == "soft" and rule.harden is None and num_classes != 2:
        raise refused(row, column, f"soft labels for {num_classes} classes: they need two, or labels.harden")
    neutral = rule.neutral if num_classes == 2 else "correct"
    marks = verdicts(labels, neutral=neutral, threshold=ANY_SUCCESS if rule.harden is None else rule.harden)
    targets: list[Target | None] = []
    for label, mark in zip(labels, marks, strict=True):
        if mark is None:
            targets.append(None)
        elif kind == "soft" and rule.harden is None:
            targets.append((1.0 - float(label), float(label)))
        else:
            neutral_class = kind == "rating" and label == 0 and num_classes == 3
            targets.append(_one_hot(1 if neutral_class else (num_classes - 1) * mark, num_classes))
    if rule.after_error != "keep" and False in marks:
        incorrect = marks.index(False)
        targets[incorrect + 1 :] = [None] * (num_steps - incorrect - 1)
    return targets


def _progress(
    row: Mapping[str, Any], column: str, values: Sequence[Any], kind: LabelKind, progress: Progress
) -> list[bool | None]:
    if kind != "soft" and column != "step_values":  # 0 and 1 alone may be written as whole numbers
        said = "and labels.progress compares values in [0, 1]: label the rows with MonteCarlo, or leave progress out"
        raise refused(row, column, f"labels are of kind {kind!r}, {said}")
    if row.get("pass_rate") is None:
        raise refused(
            row,
            "pass_rate",
            "labels.progress compares the first step with the share of the problem's samples that are correct: give "
            "rows a 'pass_rate' in [0, 1] (stepkd label --solutions Sampled writes it)",
        )
    return progress.labels([None if value is None else float(value) for value in values], float(row["pass_rate"]))


def row_outcome(row: Mapping[str, Any], columns: Sequence[str] = ("correct", "outcome", "label")) -> bool | None:
    """Whether a row's answer is correct, or its completion desirable; None: it does not say.

    Args:
        row: a row of any contract.
        columns: the columns that may say so; the first that is not None counts.

    Raises:
        DataError: neither true nor false.
    """
    column = next((each for each in columns if row.get(each) is not None), None)
    if column is not None and not isinstance(row[column], bool):
        raise refused(row, column, f"must be true or false, found {row[column]!r}")
    return None if column is None else bool(row[column])


def refused(row: Mapping[str, Any], column: str, message: str) -> DataError:
    """The error for a row that an encoder cannot read; it names the row by its id."""
    return DataError(message, path=str(row.get("id", "?")), column=column)


def _one_hot(index: int, num_classes: int) -> Target:
    return tuple(float(c == index) for c in range(num_classes))


def with_completion(example: Completion, ids: Iterable[int], tokenizer: Any, segmenter: Segmenter) -> Completion:
    """A sampled completion of an example's prompt, cut into steps.

    Args:
        example: has the prompt, and the row that asked for it.
        ids: of the sampled tokens.
        tokenizer: tells their text.
        segmenter: cuts it; a completion without a boundary is one step.

    Returns:
        A completion with the example's prompt, id and row.
    """
    text = text_from_ids(tokenizer, ids)
    ends = step_ends(segment(segmenter, text)) or [len(text)]
    return replace(example, token_ids=np.asarray(text.token_ids), step_ends=np.asarray(ends))


def with_end(completion: TokenizedText, template: PromptTemplate, tokenizer: Any) -> TokenizedText:
    """A finished completion with its end token, unless it has one already."""
    ids, text = completion.token_ids, completion.text
    if not ids or ids[-1] in end_ids(tokenizer):
        return completion
    return TokenizedText((*ids, template.end_id(tokenizer)), text, (*completion.char_ends, len(text)))


def sampled_spans(row: Mapping[str, Any]) -> list[Span]:
    """The step spans of a completion. Labels and values are stored one per step, so that none is repaired.

    Raises:
        DataError: ``step_ends`` do not cut ``token_ids`` into steps.
    """
    if (incorrect := ends_partition(row["step_ends"], len(row["token_ids"]))) is not None:
        raise refused(row, "step_ends", incorrect)
    return spans_from_ends(row["step_ends"], len(row["token_ids"]))


class Encoder:
    """Turns contract rows into completions. A method that learns from other rows has an encoder of its own
    (``make_encoder`` of its module), which says what it reads.

    Args:
        tokenizer: a fast transformers tokenizer.
        template: how a row becomes a prompt.
        segmenter: how a completion is cut into steps.
        max_length: longest prompt + completion in tokens. Whole steps are dropped from the end of a completion that
            does not fit; a row that would lose all its steps is left out. Both are counted in ``counts``.
    """

    contracts: tuple[Contract, ...] | None = None
    """The row contracts that are read; empty: any; None: problems, with the columns that the method asks for."""
    labels: LabelRule | None = None
    """How step labels are read; None: they are not."""

    def __init__(
        self,
        tokenizer: Any,
        template: PromptTemplate,
        segmenter: Segmenter,
        *,
        max_length: int = 1024,
    ) -> None:
        if max_length < 2:
            raise ConfigError(f"max_length={max_length}: at least one prompt and one completion token")
        self.tokenizer = tokenizer
        self.template = template
        self.segmenter = segmenter
        self.max_length = max_length
        self.counts: Counter[str] = Counter()

    def prompt_ids(self, row: Mapping[str, Any]) -> tuple[int, ...]:
        """Prompt ids, exactly as the sampler gets them.

        Raises:
            DataError: the prompt is empty or does not leave room for one completion token.
        """
        text = self.template.render(row, self.tokenizer)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            what = f"character {error.start + 1} of the rendered prompt is half of a surrogate pair"
            raise refused(row, "prompt", f"{what}: export the data again as valid UTF-8") from error
        special = self.template.adds_special_tokens(self.tokenizer)
        ids = tuple(self.tokenizer(text, add_special_tokens=special)["input_ids"])
        if special and ids and ids[-1] == self.tokenizer.eos_token_id:
            own = tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
            if ids[len(ids) - len(own) :] != own:
                ids = ids[:-1]  # some tokenizers end every text by themselves; a prompt goes on
        if not ids:
            raise refused(row, "prompt", "the prompt has no tokens")
        if len(ids) >= self.max_length:
            what = f"the prompt has {len(ids)} tokens and max_length is {self.max_length}"
            raise refused(row, "prompt", f"{what}: raise max_length, use fewer few-shot examples, or drop the row")
        return ids

    def prompt_example(self, row: Mapping[str, Any]) -> Completion:
        """A prompt to be sampled from."""
        return self._completion(row, self.prompt_ids(row), (), ())

    def example(self, row: Mapping[str, Any]) -> Completion | None:
        """Prompt, completion and steps of a row; None when no whole step fits into ``max_length``.

        Raises:
            DataError: no completion, one without a single step, or sampled steps that do not partition it.
        """
        prompt = self.prompt_ids(row)
        completion, spans = self.steps(row)
        fitting = self._fitting(prompt, spans)
        return self._completion(row, prompt, completion.token_ids, spans[:fitting]) if fitting else None

    def steps(self, row: Mapping[str, Any]) -> tuple[TokenizedText, list[Span]]:
        """A row's completion and its steps: of its ``token_ids`` where it has them, else of its text.

        Raises:
            DataError: as for :meth:`example`.
        """
        if row.get("token_ids") is not None:
            column = "token_ids"
            completion = text_from_ids(self.tokenizer, row["token_ids"], row.get("raw_logprobs", row.get("logprobs")))
            cut = len(completion) and row.get("step_ends") is not None
            spans = sampled_spans(row) if cut else segment(self.segmenter, completion)
        else:
            column = "completion" if row.get("solution") is None else "solution"
            if not isinstance(row.get(column), str):
                what = "no text to train on: the row needs a 'solution' (or 'completion') text, or sampled 'token_ids'"
                raise refused(row, "solution", what)
            completion = tokenize_text(self.tokenizer, row[column])
            completion, spans = self._with_end(completion, segment(self.segmenter, completion))
        if not spans:
            raise refused(row, column, "the completion has no steps (it is empty): drop the row")
        return completion, spans

    def _with_end(self, completion: TokenizedText, spans: list[Span]) -> tuple[TokenizedText, list[Span]]:
        ended = with_end(completion, self.template, self.tokenizer)
        return ended, [*spans[:-1], *((start, len(ended)) for start, _ in spans[-1:])]

    def _fitting(self, prompt: Sequence[int], spans: Sequence[Span]) -> int:
        """How many steps fit behind a prompt; what does not is counted."""
        fitting = sum(len(prompt) + end <= self.max_length for _, end in spans)
        self.counts["steps_dropped"] += len(spans) - fitting
        self.counts["rows_truncated"] += fitting < len(spans)
        if not fitting:
            self.counts["rows_without_a_whole_step"] += 1
        return fitting

    def _completion(
        self, row: Mapping[str, Any], prompt: Sequence[int], ids: Sequence[int], spans: Sequence[Span], **more: Any
    ) -> Completion:
        """A completion that ends with the last of its steps."""
        prompt_ids, token_ids, ends = map(np.asarray, (prompt, ids, step_ends(spans)))
        name = str(row.get("id", "?"))
        return Completion(prompt_ids, token_ids[: max(ends, default=0)], ends, id=name, row=row, **more)

    def check(self, examples: Sequence[Completion], *, training: bool, allow_one_class: bool) -> dict[str, int]:
        """Counts to report of all examples of a split.

        Args:
            examples: what :meth:`examples` made.
            training: whether they are trained on.
            allow_one_class: accept labels that all agree, of which nothing can be learnt.

        Raises:
            DataError: training examples of which nothing can be learnt.
        """
        return {}

    def examples(self, rows: Iterable[Mapping[str, Any]]) -> list[Completion]:
        """Encode rows, leaving out (and counting) those that :meth:`example` makes nothing of.

        Raises:
            DataError: nothing is left.
        """
        kept = [example for row in rows if (example := self.example(row)) is not None]
        if not kept:
            raise DataError(self._nothing_left())
        return kept

    def _nothing_left(self) -> str:
        return f"no row fits into max_length={self.max_length} tokens with at least one whole step: raise max_length"
