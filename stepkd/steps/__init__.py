"""What a step is: token-index spans made once and used by labelling, training, search and evaluation."""

from stepkd.steps.confidence import AdaptiveStepSegmenter, EntropySegmenter, RejectSegmenter
from stepkd.steps.format import MARKER_CANDIDATES, Meaning, StepFormat, written_steps
from stepkd.steps.labels import (
    THRESHOLD,
    Label,
    Tally,
    first_incorrect,
    is_settled,
    label_kind,
    passes,
    tally,
    verdicts,
)
from stepkd.steps.markers import auto_marker, marker_token_id
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
    first_difference,
    spans_from_ends,
    step_ends,
    step_index,
    truncate_spans,
)
from stepkd.steps.text import TokenizedText, text_from_ids, tokenize_text, tokenize_texts
from stepkd.steps.threshold import SIGNAL_SEGMENTERS, SegmentThreshold, fit_threshold

__all__ = [
    "MARKER_CANDIDATES",
    "SEGMENTERS",
    "SIGNAL_SEGMENTERS",
    "THRESHOLD",
    "AdaptiveStepSegmenter",
    "EntropySegmenter",
    "Label",
    "Meaning",
    "RegexSegmenter",
    "RejectSegmenter",
    "SegmentThreshold",
    "Segmenter",
    "SentenceSegmenter",
    "Span",
    "StepFormat",
    "Tally",
    "TokenizedText",
    "TruncatedSpans",
    "WholeSegmenter",
    "auto_marker",
    "check_partition",
    "first_difference",
    "first_incorrect",
    "fit_threshold",
    "get_segmenter",
    "is_settled",
    "label_kind",
    "marker_token_id",
    "passes",
    "segment",
    "spans_from_ends",
    "step_ends",
    "step_index",
    "tally",
    "text_from_ids",
    "tokenize_text",
    "tokenize_texts",
    "truncate_spans",
    "verdicts",
    "written_steps",
]
