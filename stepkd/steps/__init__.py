"""What a step is: token-index spans made once and used by labelling, training, search and evaluation."""

from __future__ import annotations

from stepkd.lazy import lazily

_HOMES = {
    "confidence": "AdaptiveStepSegmenter EntropySegmenter RejectSegmenter SegmentThreshold fit_threshold",
    "format": "MARKER_CANDIDATES Meaning StepFormat auto_marker marker_token_id written_steps",
    "labels": (
        "THRESHOLD EffectiveReward Label Progress Reduce Tally ValueRatio correct_targets first_incorrect is_settled "
        "label_kind passes reduce_values tally verdicts"
    ),
    "segment": (
        "SEGMENTERS RegexSegmenter Segmenter SentenceSegmenter Span WholeSegmenter get_segmenter "
        "segmenter_settings spans_from_ends step_ends"
    ),
    "text": "TokenizedText first_difference text_from_ids tokenize_text tokenize_texts",
}

__getattr__ = lazily(__name__, _HOMES)
