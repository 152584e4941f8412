"""A step label's way from a labelled row to the loss: row, completion, batch, loss terms, and nothing in between."""

from __future__ import annotations

from dataclasses import is_dataclass
from typing import Any

import pytest
import torch

from stepkd.data.collate import Batch
from stepkd.data.completion import Completion
from stepkd.data.datamodule import StepData
from stepkd.data.encode import LabelRule
from stepkd.data.rows import COMPLETION, validate
from stepkd.losses import LossTerms
from stepkd.models.spec import PolicyConfig, tiny_tokenizer
from stepkd.modules.kto import StepKTOModule
from stepkd.modules.optim import OptimizerConfig
from stepkd.modules.prm import PRMModule
from stepkd.steps.segment import get_segmenter, segment, step_ends
from stepkd.steps.text import tokenize_text

TINY = PolicyConfig(path="tiny-0.1m")
STEADY = OptimizerConfig(lr=1e-3, schedule="constant", warmup=0)
LABELS = [[True, False, None], [True, True, False], [None, True, True]]


def labelled_rows() -> list[dict[str, Any]]:
    """Labelled rollouts, as a labelling job leaves them."""
    tokenizer, text = tiny_tokenizer(), "1+2=3\n3*2=6\n#### 6\n"
    whole = tokenize_text(tokenizer, text)
    ends = step_ends(segment(get_segmenter("newline"), whole))
    common = {"token_ids": list(whole.token_ids), "logprobs": [-0.1] * len(whole), "step_ends": list(ends)}
    return [
        validate(
            {
                "id": f"r{i}", "problem_id": f"p{i}", "prompt": f"{i}+1=\n", "completion": text, "finish": "stop",
                "correct": i > 0, "model": "m", "sampling": {}, "seed": 0, "step_labels": labels, **common,
            },
            COMPLETION,
        )
        for i, labels in enumerate(LABELS)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("module", "settings"),
    [
        (lambda: PRMModule(TINY, optimizer=STEADY), {"labels": LabelRule(after_error="keep")}),
        (lambda: StepKTOModule(TINY, optimizer=STEADY), {}),
    ],
    ids=["PRM", "Step-KTO"],
)
def test_a_step_label_goes_from_row_to_loss_as_completion_and_batch(
    module: Any, settings: dict[str, Any], trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, made = labelled_rows(), module()
    met: dict[str, None] = {}
    terms: list[tuple[Batch, LossTerms]] = []
    loss_terms = made.loss_terms

    def recording(batch: Batch) -> LossTerms:
        found = loss_terms(batch)
        met.update(dict.fromkeys(type(each).__name__ for each in batch.examples))
        met.update(dict.fromkeys([type(batch).__name__, type(found).__name__]))
        terms.append((batch, found))
        return found

    monkeypatch.setattr(made, "loss_terms", recording)
    data = StepData(rows, template="task", global_batch_size=3, shuffle=False, **settings)
    trainer().fit(made, datamodule=data)

    assert list(met) == ["Completion", "Batch", "LossTerms"], "every class that the label met on its way"
    completions = data.examples["train"]
    for row, completion, labels in zip(rows, completions, LABELS, strict=True):
        assert type(completion) is Completion
        assert completion.row is row or completion.row == row
        wanted = tuple(-1 if label is None else int(label) for label in labels)
        assert completion.step_labels == wanted[: len(completion.step_labels)]
        assert not any(is_dataclass(target) for target in completion.targets), "probabilities of classes, as they are"
    (batch, found) = terms[0]
    assert all(any(each is other for other in completions) for each in batch.examples), "the very same objects"
    order = {completion.id: labels for completion, labels in zip(completions, LABELS, strict=True)}
    for number, example in enumerate(batch.examples):
        steps = batch.label_S[batch.completion_S == number].tolist()
        wanted = [-1 if label is None else int(label) for label in order[example.id]]
        assert steps == wanted[: len(steps)]
        assert (batch.completion_L == number).sum() == sum(label >= 0 for label in steps)
    assert set(found.sums) == ({"prm"} if isinstance(made, PRMModule) else {"outcome", "step"})
    assert all(torch.isfinite(value) for value in found.sums.values())
