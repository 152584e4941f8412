"""Solutions with step boundaries to token ids with step markers: the input of a model that scores steps.

One layout serves training, scoring and evaluation. Markers go in as ids; the position at which a step is scored is an
index, never something found again in decoded text.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

from stepkd.data.completion import Completion
from stepkd.data.encode import Encoder, LabelRule, refused, sampled_spans, step_targets
from stepkd.data.templates import PromptTemplate, end_ids
from stepkd.errors import ConfigError, DataError, UnreadableSolution
from stepkd.steps.format import StepFormat, check_steps, written_steps
from stepkd.steps.segment import Segmenter, Span, get_segmenter, segment
from stepkd.steps.text import TokenizedText, text_from_ids, tokenize_text, tokenize_texts

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Layout:
    """A solution's tokens with markers."""

    ids: tuple[int, ...]
    """Token ids."""
    spans: tuple[Span, ...]
    """Step spans, markers included."""
    read_at: tuple[int, ...]
    """Where each step is scored."""


class StepEncoder(Encoder):
    """Turns rows with steps into completions with targets; their steps include the markers.

    Args:
        tokenizer, template, max_length: as for :class:`~stepkd.data.encode.Encoder`.
        format: separators and markers.
        marker_id: the marker's id; None when the format has no marker.
        num_classes: classes of the targets, 2 or 3.
        labels: how labels become targets; None: rows are only scored.
        segmenter: cuts solutions that come as one text.
    """

    contracts = ()  # a source knows its contract, a file's columns tell it
    takes_blank_steps = False
    """Whether a step may be white space."""

    def __init__(
        self,
        tokenizer: Any,
        template: PromptTemplate,
        *,
        format: StepFormat,
        marker_id: int | None,
        max_length: int = 1024,
        num_classes: int = 2,
        labels: LabelRule | None = None,
        segmenter: str | Segmenter = "newline",
    ) -> None:
        cuts = get_segmenter(segmenter) if isinstance(segmenter, str) else segmenter
        super().__init__(tokenizer, template, cuts, max_length=max_length)
        if (marker_id is None) != (format.marker is None):
            raise ConfigError(f"marker_id={marker_id} does not go with format.marker={format.marker!r}")
        self.format = format
        self.marker_id = marker_id
        self.num_classes = num_classes
        self.labels = labels
        # Models stop at tokens of their generation settings too, which a tokenizer does not list: all special ones.
        special = {token for token, each in tokenizer.added_tokens_decoder.items() if each.special}
        self._ends = (special | end_ids(tokenizer)) - {marker_id, tokenizer.unk_token_id}

    def layout(self, steps: Sequence[str], name: str = "?") -> Layout:
        """Token ids with markers of a solution given as step texts.

        Raises:
            DataError: no steps, an empty one, one without a token, or the marker inside a step.
        """
        check_steps(steps, name, blank=self.takes_blank_steps)
        if self.format.marker_place == "prompt_end":
            return self._asked_before(len(steps))
        pieces: list[str] = []
        counts: list[int] = []
        for step in written_steps(steps, self.format.separator, close_last=self._closes_last):
            text = step.rstrip() if self.format.marker_place == "before_separator" else step
            pieces += [text, step[len(text) :]] if text != step else [text]
            counts.append(len(pieces))
        parts = self._tokenized(pieces)
        ends = [sum(map(len, parts[:count])) for count in counts]
        if 0 in ends or len(set(ends)) < len(ends):
            raise DataError("a step has no token in this tokenizer: drop it", path=name, column="completions")
        return self._marked(_joined(parts), ends, name)

    def _asked_before(self, steps: int) -> Layout:
        """The marker alone, at which all steps are scored: nothing of them is read."""
        assert self.marker_id is not None
        return Layout((self.marker_id,), ((0, 1),) * steps, (0,) * steps)

    def _tokenized(self, pieces: Sequence[str]) -> list[TokenizedText]:
        """Pieces of one solution, each tokenised without the next: no token reaches over the end of a step, and none
        depends on what follows it. All but the first are read as behind a line break, unless every step is to begin a
        text (``per_step``)."""
        alone = tokenize_texts(self.tokenizer, pieces)
        if self.format.tokenize == "per_step" or not self._begins_texts:
            return alone
        return alone[:1] + behind_line_break(self.tokenizer, alone[1:])

    @cached_property
    def _begins_texts(self) -> bool:
        """Whether the tokenizer begins a text with a piece of its own (SentencePiece)."""
        alone = tokenize_texts(self.tokenizer, ["1"])
        return behind_line_break(self.tokenizer, alone) != alone

    def layout_from_ids(self, completion: TokenizedText, spans: Sequence[Span], name: str = "?") -> Layout:
        """Token ids with markers of a sampled solution; its own ids are kept, without the end token.

        Steps get the separator's ids as in :meth:`layout`, where that gives the last step one.
        """
        length = len(completion)
        while length and completion.token_ids[length - 1] in self._ends:
            length -= 1
        if not length:
            raise UnreadableSolution("the solution has no tokens before its end token: drop the row", path=name)
        kept = TokenizedText(completion.token_ids[:length], completion.text, completion.char_ends[:length])
        ends = [min(end, length) for start, end in spans if start < length]
        if self._closes_last:
            kept, ends = self._closed(kept, ends)
        return self._marked(kept, ends, name)

    @property
    def _closes_last(self) -> bool:
        """Whether the last step gets a separator too.

        It does where a step is read behind its separator. Otherwise a marker without one before it would tell a model
        that the solution, or the labelled part of it, ends here: in data whose incorrect step is the last one, as in
        PRM800K's alternatives, that gives the label away.
        """
        return bool(self.format.separator) and self.format.marker_place == "step_end"

    def _closed(self, completion: TokenizedText, ends: Sequence[int]) -> tuple[TokenizedText, list[int]]:
        """The solution with the separator's ids behind every step that :func:`written_steps` separates.

        Not behind the last one alone: where a segmenter cuts without a line end (sentences), that would tell it apart.
        """
        separator = self._tokenized(["1", self.format.separator])[1]
        steps: list[TokenizedText] = []
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            before = completion.char_ends[start - 1] if start else 0
            char_ends = tuple(char_end - before for char_end in completion.char_ends[start:end])
            step = TokenizedText(completion.token_ids[start:end], completion.span_text(start, end), char_ends)
            (written,) = written_steps([step.text], separator.text, close_last=True)
            steps.append(step if written == step.text else _joined([step, separator]))
        return _joined(steps), list(accumulate(map(len, steps)))

    def _marked(self, whole: TokenizedText, ends: Sequence[int], name: str) -> Layout:
        starts = [0, *ends[:-1]]
        if self.marker_id is None:
            return Layout(whole.token_ids, tuple(zip(starts, ends, strict=True)), tuple(end - 1 for end in ends))
        if self.marker_id in whole.token_ids:
            raise UnreadableSolution(
                f"the step marker {self.tokenizer.convert_ids_to_tokens(self.marker_id)!r} (id {self.marker_id}) is "
                "in the solution itself, so its positions would be ambiguous: choose another marker or drop the row",
                path=name,
                column="completions",
            )
        ids: list[int] = []
        spans: list[Span] = []
        read_at: list[int] = []
        for start, end in zip(starts, ends, strict=True):
            first, place = len(ids), self._place(whole, start, end)
            ids.extend(whole.token_ids[start:place])
            read_at.append(len(ids))
            ids.append(self.marker_id)
            ids.extend(whole.token_ids[place:end])
            spans.append((first, len(ids)))
        return Layout(tuple(ids), tuple(spans), tuple(read_at))

    def _place(self, whole: TokenizedText, start: int, end: int) -> int:
        """Where in ``[start, end]`` the marker goes."""
        if self.format.marker_place == "step_end":
            return end
        text = whole.span_text(start, end)
        begin = whole.char_ends[start - 1] if start else 0
        return max(start + 1, min(end, whole.token_end(begin + len(text.rstrip()))))

    def row_layout(self, row: Mapping[str, Any]) -> Layout:
        """Layout of a row: sampled ids where this tokenizer wrote them, else step texts, else the segmented text."""
        name = str(row.get("id", "?"))
        if self.format.marker_place == "prompt_end":
            columns = ("step_ends", "completions", "steps")
            return self._asked_before(len(next((row[each] for each in columns if row.get(each) is not None), "1")))
        if row.get("token_ids") is not None and self.format.tokenize == "whole" and row.get("step_ends") is not None:
            completion = text_from_ids(self.tokenizer, row["token_ids"])
            if row.get("completion") in (None, completion.text):
                return self.layout_from_ids(completion, sampled_spans(row), name)
        for column in ("completions", "steps"):
            if row.get(column) is not None:
                return self.layout(row[column], name)
        if row.get("step_ends") is not None:
            raise refused(
                row,
                "token_ids",
                f"the row's token ids are not of this model's tokenizer, or cannot serve tokenize "
                f"{self.format.tokenize!r}, and it has no 'steps' as text: label it again, or convert it to "
                "Stepwise (stepkd convert)",
            )
        text = row.get("completion") if row.get("completion") is not None else row.get("solution")
        if not isinstance(text, str) or not text.strip():
            raise refused(row, "completions", "the row has no steps: neither 'completions' nor a 'completion' text")
        completion = tokenize_text(self.tokenizer, text)
        return self.layout([completion.span_text(*span) for span in segment(self.segmenter, completion)], name)

    def example(self, row: Mapping[str, Any]) -> Completion | None:
        """A solution with markers and the targets of its steps; None (and a count in ``counts``) when no labelled step
        is left, or the solution cannot be laid out (a sampled one may hold the step marker, or only an end token).

        Steps behind the last labelled one are cut off: in a causal model they change nothing.
        """
        assert self.labels is not None, "an encoder without a label rule makes no training examples"
        prompt = self.prompt_ids(row)
        try:
            layout = self.row_layout(row)
        except UnreadableSolution:
            self.counts["rows_unreadable"] += 1
            return None
        targets = step_targets(row, len(layout.spans), self.num_classes, self.labels)
        if self.format.marker_place == "prompt_end":
            layout, targets = self._asked_before(1), targets[-1:]
        if all(target is None for target in targets):
            self.counts["rows_without_labels"] += 1
            return None
        fitting = self._fitting(prompt, layout.spans)
        labelled = [i for i, target in enumerate(targets[:fitting]) if target is not None]
        if not labelled:
            self.counts["rows_truncated_before_a_label"] += 1
            return None
        last = labelled[-1]
        return self._completion(
            row,
            prompt,
            layout.ids,
            [*layout.spans[:last], (layout.spans[last][0], layout.read_at[last] + 1)],
            targets=tuple(targets[: last + 1]),
            read_at=layout.read_at[: last + 1],
        )

    def check(self, examples: Sequence[Completion], *, training: bool, allow_one_class: bool) -> dict[str, int]:
        """Labelled steps per class (soft ones by the likelier class, and at even odds by the better one)."""
        targets = [target for each in examples for target in each.completions[0].targets if target is not None]
        names = ("incorrect", "correct") if self.num_classes == 2 else ("incorrect", "neutral", "correct")
        counts = Counter(max(zip(target, range(self.num_classes), names, strict=True))[-1] for target in targets)
        if training and len(set(targets)) < 2 and not allow_one_class:
            raise DataError(
                f"all {len(targets)} training labels are the same ({next(iter(counts))}): a reward model "
                "trained on them learns a constant. Give rows with correct and incorrect steps, or set "
                "data.allow_one_class",
                column="labels",
            )
        if training and self.num_classes == 3 and not counts["neutral"]:
            logger.warning(
                "the head has three classes, and none of the %d training labels is neutral: it learns that no step is. "
                "Set head.classes: 2 (two head.labels), or give rows with ratings -1, 0 and 1 (such as PRM800K's own "
                "files, source prm800k)",
                len(targets),
            )
        return dict(counts)

    def _nothing_left(self) -> str:
        return (
            "no row has a single labelled step that fits into "
            f"max_length={self.max_length} tokens ({dict(self.counts)}): label the rows, or raise max_length"
        )


def behind_line_break(tokenizer: Any, alone: Sequence[TokenizedText]) -> list[TokenizedText]:
    """Texts' tokens as they are behind a line break; as they are alone where one token holds the break and more."""
    found = []
    for text, behind in zip(alone, tokenize_texts(tokenizer, ["\n" + text.text for text in alone]), strict=True):
        skip = bisect_left(behind.char_ends, 1) + 1
        ids, char_ends = behind.token_ids[skip:], tuple(end - 1 for end in behind.char_ends[skip:])
        found.append(TokenizedText(ids, text.text, char_ends) if 1 in behind.char_ends else text)
    return found


def _joined(parts: Sequence[TokenizedText]) -> TokenizedText:
    ids: list[int] = []
    char_ends: list[int] = []
    text = ""
    for part in parts:
        ids.extend(part.token_ids)
        char_ends.extend(len(text) + end for end in part.char_ends)
        text += part.text
    return TokenizedText(tuple(ids), text, tuple(char_ends))
