"""Confidence-based segmenters: tables of cuts, the rules as properties, bad input."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepkd.errors import ConfigError, DataError
from stepkd.steps.confidence import AdaptiveStepSegmenter, EntropySegmenter, RejectSegmenter
from stepkd.steps.segment import Segmenter, segment, spans_from_ends, step_ends
from stepkd.steps.text import TokenizedText, text_from_ids


def signals(tokens: list[str], doubted: set[int]) -> TokenizedText:
    """One token per piece of text; confidence 0.01 and entropy 2 at the doubted ones, 0.9 and 0.1 elsewhere."""
    ends, text = [], ""
    for token in tokens:
        text += token
        ends.append(len(text))
    return TokenizedText(
        tuple(range(len(tokens))),
        text,
        tuple(ends),
        logprobs=tuple(math.log(0.01 if i in doubted else 0.9) for i in range(len(tokens))),
        entropies=tuple(2.0 if i in doubted else 0.1 for i in range(len(tokens))),
    )


def cut(tokens: list[str], doubted: set[int]) -> list[str]:
    """Steps as text; both signals must give the same."""
    completion = signals(tokens, doubted)
    spans = segment(AdaptiveStepSegmenter(0.05), completion)
    assert segment(EntropySegmenter(1.5), completion) == spans
    return [completion.span_text(*span) for span in spans]


ABCDEF = list("abcdef")


@pytest.mark.parametrize(
    ("tokens", "doubted", "steps"),
    [
        (ABCDEF, {2}, ["abc", "def"]),
        (ABCDEF, set(), ["abcdef"]),
        (ABCDEF, {0}, ["a", "bcdef"]),
        (ABCDEF, {5}, ["abcdef"]),
        (ABCDEF, {1, 2, 3}, ["ab", "c", "d", "ef"]),  # a run: each one divides
        (ABCDEF, set(range(6)), ABCDEF),
        # white space alone is never a step: it stays with the step before, or opens the first one
        (["a", "b", "\n", " ", "c", "d"], {1, 2, 3}, ["ab\n ", "cd"]),
        (["\n", " ", "c", "d"], {0, 1, 2}, ["\n c", "d"]),
        (["a", "b", "\n", "\n"], {1, 2}, ["ab\n\n"]),
        ([" ", "\n"], {0}, [" \n"]),
        # tokens without text: an end token, or the first bytes of a character
        (["a", "b", "", ""], {1, 2}, ["ab"]),
        (["", "a", "", "b"], {0, 1, 2, 3}, ["a", "b"]),
    ],
)
def test_which_tokens_cut(tokens: list[str], doubted: set[int], steps: list[str]) -> None:
    assert cut(tokens, doubted) == steps


def test_the_threshold_itself_does_not_cut() -> None:
    completion = replace(signals(ABCDEF, set()), logprobs=(math.log(0.25),) * 6, entropies=(1.5,) * 6)
    confidence = math.exp(math.log(0.25))
    assert segment(AdaptiveStepSegmenter(confidence), completion) == [(0, 6)]
    assert len(segment(AdaptiveStepSegmenter(math.nextafter(confidence, 1)), completion)) == 6
    assert segment(EntropySegmenter(1.5), completion) == [(0, 6)]
    assert len(segment(EntropySegmenter(math.nextafter(1.5, 0)), completion)) == 6


@pytest.mark.parametrize("name", ["characters", "bpe", "sentencepiece"])
def test_the_end_token_is_no_step(name: str, tokenizers_by_name: dict[str, Any]) -> None:
    """Doubt everywhere: as many steps as without the end token, which belongs to the last one."""
    tokenizer = tokenizers_by_name[name]
    ids = tokenizer("ab 日b", add_special_tokens=False)["input_ids"]
    bare = text_from_ids(tokenizer, ids, [-9.0] * len(ids))
    ended = text_from_ids(tokenizer, [*ids, tokenizer.eos_token_id], [-9.0] * (len(ids) + 1))
    segmenter = AdaptiveStepSegmenter(0.5)
    expected, actual = step_ends(segment(segmenter, bare)), step_ends(segment(segmenter, ended))
    assert len(expected) > 1
    assert actual == [*expected[:-1], len(ids) + 1]


def reject_cuts(student: list[float], teacher: list[float], h: float, shortest: int, longest: int) -> list[int]:
    """The stop rule by its definition, in probabilities."""
    ends: list[int] = []
    start = 0
    for end in range(1, len(student) + 1):
        accepted = math.prod(min(1.0, math.exp(teacher[i]) / math.exp(student[i])) for i in range(start, end))
        if (1 - accepted > h and end - start >= shortest) or end - start == longest:
            ends.append(end)
            start = end
    return sorted({*ends, len(student)})


def with_teacher(student: list[float], teacher: list[float]) -> TokenizedText:
    n = len(student)
    return TokenizedText(
        tuple(range(n)), "x" * n, tuple(range(1, n + 1)), logprobs=tuple(student), teacher_logprobs=tuple(teacher)
    )


def test_reject_closed_forms() -> None:
    # a = 1/2 at every token: 1 - a^1 = 0.5 > 0.3 at once, so the shortest length decides
    halves = with_teacher([math.log(0.8)] * 7, [math.log(0.4)] * 7)
    assert step_ends(segment(RejectSegmenter(), halves)) == [2, 4, 6, 7]
    assert step_ends(segment(RejectSegmenter(0.8), halves)) == [3, 6, 7]  # 1 - 1/8 = 0.875
    # a teacher that agrees, or likes the tokens more: only the longest length cuts
    agrees = with_teacher([math.log(0.4)] * 50, [math.log(0.8)] * 50)
    assert step_ends(segment(RejectSegmenter(), agrees)) == [20, 40, 50]
    # one token that the teacher rules out
    ruled_out = with_teacher([-0.1] * 6, [-0.1, -0.1, -0.1, -math.inf, -0.1, -0.1])
    assert step_ends(segment(RejectSegmenter(), ruled_out)) == [4, 6]


def test_reject_keeps_the_end_token_with_the_last_step() -> None:
    completion = TokenizedText((1, 2, 3), "ab", (1, 2, 2), logprobs=(-0.1,) * 3, teacher_logprobs=(-5.0,) * 3)
    assert segment(RejectSegmenter(), completion) == [(0, 3)]


logprob = st.floats(-12, 0)


@settings(max_examples=150, deadline=None)
@given(
    pairs=st.lists(st.tuples(logprob, logprob), min_size=1, max_size=60),
    h=st.floats(0.05, 0.95),
)
def test_reject_is_its_definition(pairs: list[tuple[float, float]], h: float) -> None:
    student, teacher = [s for s, _ in pairs], [t for _, t in pairs]
    spans = segment(RejectSegmenter(h), with_teacher(student, teacher))
    assert step_ends(spans) == reject_cuts(student, teacher, h, 2, 20)
    assert all(2 <= end - start <= 20 for start, end in spans[:-1])


segmenters = st.one_of(
    st.builds(AdaptiveStepSegmenter, st.floats(0.01, 0.99)),
    st.builds(EntropySegmenter, st.floats(0, 4)),
    st.builds(RejectSegmenter, st.floats(0.05, 0.95)),
)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), segmenter=segmenters, tokenizer=st.sampled_from(["characters", "bpe", "sentencepiece"]))
def test_rules(data: st.DataObject, segmenter: Segmenter, tokenizer: str, tokenizers_by_name: dict[str, Any]) -> None:
    """Random ids and signals: a partition, no step without words."""
    used = tokenizers_by_name[tokenizer]
    likely = [used.eos_token_id, *used("a\n 7 日", add_special_tokens=False)["input_ids"]]
    token = st.one_of(st.sampled_from(likely), st.integers(0, len(used) - 1))
    ids = data.draw(st.lists(token, max_size=30))
    column = st.lists(logprob, min_size=len(ids), max_size=len(ids))
    entropies = [-x / 3 for x in data.draw(column)]
    decoded = text_from_ids(used, ids, data.draw(column))
    teacher = tuple(data.draw(column))
    completion = replace(decoded, entropies=tuple(entropies), teacher_logprobs=teacher)
    spans = segment(segmenter, completion)
    assert spans_from_ends(step_ends(spans), len(ids)) == list(spans)
    steps = [completion.span_text(*span) for span in spans]
    assert "".join(steps) == completion.text
    if len(steps) > 1:
        assert all(step.strip() for step in steps), steps


def test_long_blank_completions_are_read_once() -> None:
    n = 200_000
    completion = TokenizedText(tuple(range(n)), "\n" * n, tuple(range(1, n + 1)), logprobs=(-9.0,) * n)
    assert segment(AdaptiveStepSegmenter(0.5), completion) == [(0, n)]


@pytest.mark.parametrize(
    ("segmenter", "given_", "message"),
    [
        (
            AdaptiveStepSegmenter(0.1),
            {},
            "segmenter 'adaptive_step' needs the logprobs of every token, and this completion has none: sampled ones "
            "carry raw_logprobs, and stepkd.sampling.annotate computes all signals of any text",
        ),
        (
            EntropySegmenter(1.0),
            {"logprobs": (-1.0, -1.0)},
            "needs the entropies of every token, and this completion has none",
        ),
        (RejectSegmenter(), {"teacher_logprobs": (-1.0, -1.0)}, "'reject' needs the logprobs of"),
        (
            RejectSegmenter(),
            {"logprobs": (-1.0, -1.0)},
            "needs the teacher_logprobs of every token, and this completion has none",
        ),
        (
            AdaptiveStepSegmenter(0.1),
            {"logprobs": (-1.0, math.nan)},
            "hold nan at token 1: must be a number of nats, at most",
        ),
        (AdaptiveStepSegmenter(0.1), {"logprobs": (0.9, -1.0)}, "the logprobs hold 0.9 at token 0"),
        (
            EntropySegmenter(1.0),
            {"entropies": (1.0, -1.0)},
            "entropies hold -1.0 at token 1: must be a number of nats, at least",
        ),
        (EntropySegmenter(1.0), {"entropies": (math.nan, 1.0)}, "entropies hold nan at token 0"),
    ],
)
def test_missing_and_impossible_signals(segmenter: Segmenter, given_: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        segment(segmenter, TokenizedText((1, 2), "ab", (1, 2), **given_))


@pytest.mark.parametrize("segmenter", [AdaptiveStepSegmenter(0.1), EntropySegmenter(1.0), RejectSegmenter()])
def test_no_tokens_need_no_signals(segmenter: Segmenter) -> None:
    assert isinstance(segmenter, Segmenter)
    assert segment(segmenter, TokenizedText((), "", ())) == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdaptiveStepSegmenter(2.0), "confidence threshold 2.0: must lie between 0 and 1 (a probability, not"),
        (lambda: AdaptiveStepSegmenter(math.nan), "confidence threshold nan"),
        (lambda: EntropySegmenter(-0.1), "entropy threshold -0.1: must be a finite number of nats"),
        (lambda: EntropySegmenter(math.inf), "entropy threshold inf"),
        (lambda: RejectSegmenter(1.0), "reject threshold 1.0: must lie between 0 and 1"),
    ],
)
def test_bad_settings(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        make()


@pytest.mark.parametrize("name", ["logprobs", "entropies", "teacher_logprobs"])
def test_signals_have_one_number_per_token(name: str) -> None:
    with pytest.raises(ValueError, match=f"2 ids but 1 {name}"):
        TokenizedText((1, 2), "ab", (1, 2), **{name: (0.0,)})
