"""Rows to token ids: the prompt as at inference, the completion once and as a whole.

The boundary rule. The prompt is tokenised exactly as the sampler will tokenise it and the completion on its own, so no
token straddles the two and training sees the ids that inference sees.

The end rule. A finished solution ends in the token that the chat template writes behind an answer (plain style: the
tokenizer's end token), which is a training target and belongs to the last step; it is never doubled. A completion given
as ``token_ids`` (a rollout) is used as it is: sampled ids are never re-tokenised, and nothing is appended to one that
was cut off.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from stepkd.data.completion import Completion
from stepkd.data.rows import Contract, ends_partition
from stepkd.data.step_labels import LabelRule
from stepkd.data.templates import PromptTemplate, end_ids
from stepkd.errors import ConfigError, DataError
from stepkd.steps.segment import Segmenter, Span, segment, spans_from_ends, step_ends
from stepkd.steps.text import TokenizedText, text_from_ids, tokenize_text


@dataclass(frozen=True)
class Example:
    """One row as token ids."""

    id: str
    """The row's id; errors and results name it."""
    prompt_ids: tuple[int, ...]
    """Prompt ids, special tokens included."""
    token_ids: tuple[int, ...]
    """Completion ids, the end token included; empty for a prompt to be sampled from."""
    spans: tuple[Span, ...]
    """Step spans: a partition of ``range(len(token_ids))``."""
    row: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """The row it was made from."""

    @property
    def length(self) -> int:
        """Prompt plus completion, in tokens."""
        return len(self.prompt_ids) + len(self.token_ids)

    @cached_property
    def completion(self) -> Completion:
        """Its completion, as arrays."""
        return as_completion(self.prompt_ids, self.token_ids, self.spans, id=self.id, row=self.row)

    @cached_property
    def completions(self) -> tuple[Completion, ...]:
        """Its completions, all of one prompt: its only one, or the two sides of a pair."""
        return (self.completion,)


Item = Any
"""What a batch is made of: a completion (its own example), or an :class:`Example`, whose ids are tuples. One reads
``id``, ``row``, ``length`` and ``completions`` of both, and how many ``prompt_ids`` and ``token_ids`` there are."""


def as_completion(prompt: Sequence[int], ids: Sequence[int], spans: Sequence[Span], **more: Any) -> Completion:
    """Ids and step spans as arrays."""
    return Completion(np.asarray(prompt), np.asarray(ids), np.asarray(step_ends(spans)), **more)


def with_completion(example: Example, ids: Iterable[int], tokenizer: Any, segmenter: Segmenter) -> Example:
    """The example with a sampled completion in place of its own; one that cannot be cut is one step."""
    text = text_from_ids(tokenizer, ids)
    spans = segment(segmenter, text) or [(0, len(text))]
    return replace(example, token_ids=text.token_ids, spans=tuple(spans))


def with_end(completion: TokenizedText, template: PromptTemplate, tokenizer: Any) -> TokenizedText:
    """A finished completion with its end token, unless it has one already."""
    ids, text = completion.token_ids, completion.text
    if not ids or ids[-1] in end_ids(tokenizer):
        return completion
    return TokenizedText((*ids, template.end_id(tokenizer)), text, (*completion.char_ends, len(text)))


def sampled_spans(row: Mapping[str, Any]) -> list[Span]:
    """The step spans of a rollout. Labels and values are stored one per step, so that none is repaired.

    Raises:
        DataError: ``step_ends`` do not cut ``token_ids`` into steps.
    """
    if (wrong := ends_partition(row["step_ends"], len(row["token_ids"]))) is not None:
        raise DataError(wrong, path=str(row.get("id", "?")), column="step_ends")
    return spans_from_ends(row["step_ends"], len(row["token_ids"]))


class Encoder:
    """Turns contract rows into :class:`Example` objects. A method that learns from other rows has an encoder of its own
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
        place: dict[str, Any] = {"path": str(row.get("id", "?")), "column": "prompt"}
        text = self.template.render(row, self.tokenizer)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"character {error.start + 1} of the rendered prompt is half of a surrogate pair, which no tokenizer "
                "can encode: export the data again as valid UTF-8",
                **place,
            ) from error
        special = self.template.adds_special_tokens(self.tokenizer)
        ids = tuple(self.tokenizer(text, add_special_tokens=special)["input_ids"])
        if special and ids and ids[-1] == self.tokenizer.eos_token_id:
            own = tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
            if ids[len(ids) - len(own) :] != own:
                ids = ids[:-1]  # some tokenizers end every text by themselves; a prompt goes on
        if not ids:
            raise DataError("the prompt has no tokens", **place)
        if len(ids) >= self.max_length:
            raise DataError(
                f"the prompt has {len(ids)} tokens and max_length is {self.max_length}: raise max_length, use fewer "
                "few-shot examples, or drop the row",
                **place,
            )
        return ids

    def prompt_example(self, row: Mapping[str, Any]) -> Example:
        """A prompt to be sampled from."""
        return Example(str(row.get("id", "?")), self.prompt_ids(row), (), (), row)

    def example(self, row: Mapping[str, Any]) -> Item | None:
        """Prompt, completion and step spans of a row; None when no whole step fits into ``max_length``.

        The completion is the row's ``token_ids`` when it has them, else its ``solution`` or ``completion`` text.

        Raises:
            DataError: no completion, one without a single step, or sampled steps that do not partition it.
        """
        name = str(row.get("id", "?"))
        prompt = self.prompt_ids(row)
        column = "solution" if row.get("solution") is not None else "completion"
        if row.get("token_ids") is not None:
            column = "token_ids"
            completion, spans = self._sampled(row)
        else:
            completion = self._written(row, name)
            spans = segment(self.segmenter, completion)
            completion, spans = self._with_end(completion, spans)
        if not spans:
            raise DataError("the completion has no steps (it is empty): drop the row", path=name, column=column)
        return self._cut(name, prompt, completion, spans, row)

    def _cut(
        self, name: str, prompt: tuple[int, ...], completion: TokenizedText, spans: list[Span], row: Mapping[str, Any]
    ) -> Example | None:
        """The example with the steps that fit; None where not one does. What is dropped is counted."""
        kept = [span for span in spans if len(prompt) + span[1] <= self.max_length]
        self.counts["steps_dropped"] += len(spans) - len(kept)
        self.counts["rows_truncated"] += len(kept) < len(spans)
        if not kept:
            self.counts["rows_without_a_whole_step"] += 1
            return None
        return Example(name, prompt, completion.token_ids[: kept[-1][1]], tuple(kept), row)

    def _sampled(self, row: Mapping[str, Any]) -> tuple[TokenizedText, list[Span]]:
        completion = text_from_ids(self.tokenizer, row["token_ids"], row.get("raw_logprobs", row.get("logprobs")))
        if not len(completion.token_ids) or row.get("step_ends") is None:
            return completion, segment(self.segmenter, completion)
        return completion, sampled_spans(row)

    def _written(self, row: Mapping[str, Any], name: str) -> TokenizedText:
        text = row.get("solution") if row.get("solution") is not None else row.get("completion")
        if not isinstance(text, str):
            raise DataError(
                "no text to train on: the row needs a 'solution' (or 'completion') text, or sampled 'token_ids'",
                path=name,
                column="solution",
            )
        return tokenize_text(self.tokenizer, text)

    def _with_end(self, completion: TokenizedText, spans: list[Span]) -> tuple[TokenizedText, list[Span]]:
        if not spans:
            return completion, spans
        ended = with_end(completion, self.template, self.tokenizer)
        return ended, [*spans[:-1], (spans[-1][0], len(ended))]

    def check(self, examples: Sequence[Item], *, training: bool, allow_one_class: bool) -> dict[str, int]:
        """Counts to report of all examples of a split.

        Args:
            examples: what :meth:`examples` made.
            training: whether they are trained on.
            allow_one_class: accept labels that all agree, of which nothing can be learnt.

        Raises:
            DataError: training examples of which nothing can be learnt.
        """
        return {}

    def examples(self, rows: Iterable[Mapping[str, Any]]) -> list[Item]:
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
