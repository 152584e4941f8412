"""The step that a continuation begins with, cut as the solution it continues was cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stepkd.errors import ConfigError, DataError
from stepkd.models import Policy
from stepkd.rollout import Rollout, annotate
from stepkd.steps import (
    SEGMENTERS,
    AdaptiveStepSegmenter,
    EntropySegmenter,
    RegexSegmenter,
    Segmenter,
    TokenizedText,
    get_segmenter,
    segment,
    text_from_ids,
)


@dataclass(frozen=True)
class NextStep:
    """The first step of a continuation."""

    text: str
    """Its text, separators included."""
    token_ids: tuple[int, ...]
    """Its sampled ids; with the end token only where the solution ends with it."""
    ends: bool
    """Whether the continuation ends with it."""


def text_until_stop(tokenizer: Any, ids: Sequence[int], stop: Sequence[str], *, known: int = 0) -> str:
    """Text of all ids, decoded together, up to a stop string that comes after the first ``known`` ids."""

    def decode(part: Sequence[int]) -> str:
        return str(tokenizer.decode(list(part), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    text = decode(ids)
    if not stop:
        return text
    start = len(decode(ids[:known]))
    cuts = [found for word in stop if (found := text.find(word, start)) >= 0]
    return text[: min(cuts, default=len(text))]


def continuation_text(tokenizer: Any, prefix_ids: Sequence[int], token_ids: Sequence[int]) -> TokenizedText:
    """A continuation as it reads behind its prefix: some tokenizers decode the first token of a text differently."""
    whole = text_from_ids(tokenizer, (*prefix_ids, *token_ids))
    known = len(prefix_ids)
    start = whole.char_ends[known - 1] if known else 0
    return TokenizedText(whole.token_ids[known:], whole.text[start:], tuple(e - start for e in whole.char_ends[known:]))


def next_step(
    rollout: Rollout,
    prefix_ids: Sequence[int],
    segmenter: Segmenter,
    *,
    policy: Policy,
    prompt_ids: Sequence[int],
) -> NextStep | None:
    """The step that a continuation begins with.

    Args:
        rollout: the continuation.
        prefix_ids: ids of the solution before it.
        segmenter: what cuts it; ``adaptive_step`` reads the sampler's log-probabilities at temperature 1.
        policy: the sampler's model; reads the continuation once more where the segmenter needs its entropies.
        prompt_ids: the prompt, for the same.

    Returns:
        None when it has no text (an end token alone), or is cut off by the length limit.
    """
    text = continuation_text(policy.tokenizer, prefix_ids, rollout.token_ids)
    if not text.text.strip():
        return None
    signals: dict[str, Any] = {"logprobs": rollout.raw_logprobs}
    if isinstance(segmenter, EntropySegmenter):
        (found,) = annotate(policy, [[*prompt_ids, *prefix_ids]], [rollout.token_ids])
        signals["entropies"] = found.entropies
    start, end = segment(segmenter, TokenizedText(text.token_ids, text.text, text.char_ends, **signals))[0]
    ends = end == len(text)
    if not text.span_text(start, end).strip() or (ends and rollout.finish == "length"):
        return None
    return NextStep(text.span_text(start, end), text.token_ids[start:end], ends)


def segmenter_of(row: Mapping[str, Any]) -> Segmenter:
    """What cut a labelled row into steps, by its ``labelling``; ``newline`` where that does not say.

    Raises:
        ConfigError: a segmenter that cannot cut a continuation.
        DataError: settings that no segmenter has.
    """
    facts = dict((row.get("labelling") or {}).get("segmenter") or {})
    kind = facts.pop("name", None)
    if kind in SEGMENTERS:
        return SEGMENTERS[str(kind)]()
    makers = {
        "regex": RegexSegmenter,
        "regex_before": RegexSegmenter,
        "adaptive_step": AdaptiveStepSegmenter,
        "entropy": EntropySegmenter,
    }
    if kind in makers:
        try:
            return makers[str(kind)](**facts)
        except TypeError as error:
            raise DataError(
                f"the segmenter {kind!r} has other settings: {error}",
                path=str(row.get("id", "?")),
                column="labelling",
            ) from error
    if kind == "reject":
        raise ConfigError(
            f"row {row.get('id', '?')!r} was cut by the segmenter 'reject', which needs a teacher's signals that "
            "continuations do not have: give --segmenter"
        )
    return get_segmenter("newline")
