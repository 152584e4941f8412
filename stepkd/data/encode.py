"""Rows to token ids: the prompt as at inference, the completion once and as a whole.

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
from dataclasses import replace
from typing import Any

import numpy as np

from stepkd.data.completion import Completion
from stepkd.data.rows import Contract, ends_partition
from stepkd.data.step_labels import LabelRule
from stepkd.data.templates import PromptTemplate, end_ids
from stepkd.errors import ConfigError, DataError
from stepkd.steps.segment import Segmenter, Span, segment, spans_from_ends, step_ends
from stepkd.steps.text import TokenizedText, text_from_ids, tokenize_text


def with_completion(example: Completion, ids: Iterable[int], tokenizer: Any, segmenter: Segmenter) -> Completion:
    """A sampled completion of an example's prompt; one without a boundary is one step."""
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
        raise DataError(incorrect, path=str(row.get("id", "?")), column="step_ends")
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
        name = str(row.get("id", "?"))
        if row.get("token_ids") is not None:
            column = "token_ids"
            completion = text_from_ids(self.tokenizer, row["token_ids"], row.get("raw_logprobs", row.get("logprobs")))
            cut = len(completion) and row.get("step_ends") is not None
            spans = sampled_spans(row) if cut else segment(self.segmenter, completion)
        else:
            column = "completion" if row.get("solution") is None else "solution"
            if not isinstance(row.get(column), str):
                raise DataError(
                    "no text to train on: the row needs a 'solution' (or 'completion') text, or sampled 'token_ids'",
                    path=name,
                    column="solution",
                )
            completion = tokenize_text(self.tokenizer, row[column])
            completion, spans = self._with_end(completion, segment(self.segmenter, completion))
        if not spans:
            raise DataError("the completion has no steps (it is empty): drop the row", path=name, column=column)
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
