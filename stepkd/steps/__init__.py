"""What a step is: token-index spans made once and used by labelling, training, search and evaluation."""

from stepkd.steps.markers import MarkedSteps, insert_markers, marker_token_id
from stepkd.steps.segment import (
    SEGMENTERS,
    RegexSegmenter,
    Segmenter,
    SentenceSegmenter,
    WholeSegmenter,
    get_segmenter,
    segment,
)
from stepkd.steps.spans import (
    Span,
    TruncatedSpans,
    check_partition,
    spans_from_ends,
    step_ends,
    step_index,
    truncate_spans,
)
from stepkd.steps.text import TokenizedText, text_from_ids, tokenize_text

__all__ = [
    "SEGMENTERS",
    "MarkedSteps",
    "RegexSegmenter",
    "Segmenter",
    "SentenceSegmenter",
    "Span",
    "TokenizedText",
    "TruncatedSpans",
    "WholeSegmenter",
    "check_partition",
    "get_segmenter",
    "insert_markers",
    "marker_token_id",
    "segment",
    "spans_from_ends",
    "step_ends",
    "step_index",
    "text_from_ids",
    "tokenize_text",
    "truncate_spans",
]
