"""How a language model scores steps: label tokens at a marker, or a small classifier on the hidden state.

Both read one hidden state per step. ``label_tokens`` asks the vocabulary head for the probability of a good and a bad
token *at the marker's own position* (Math-Shepherd, arXiv 2312.08935; ASPRM, arXiv 2502.13943); ``classifier`` is a
two-layer head in place of the vocabulary (Qwen2.5-Math-PRM, arXiv 2501.07301).

Axes: M members of an ensemble, S steps, H hidden size, C classes from worst to best, K their sub-classes, class by
class.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from stepkd.errors import ConfigError, ModelError
from stepkd.losses.linear import DEFAULT_CHUNK, VocabHead
from stepkd.losses.prm import label_token_logps
from stepkd.models.adapter import first_line
from stepkd.models.source import model_file
from stepkd.models.spec import Classifier, LabelTokens, StepHeadConfig, step_head_from_dict
from stepkd.runs.files import write_json
from stepkd.steps.format import auto_marker, marker_token_id

STEP_HEAD_CONFIG, STEP_HEAD_WEIGHTS = "step_head.json", "step_head.safetensors"


@dataclass(frozen=True)
class StepHeadIds:
    """The spec's tokens as ids of one tokenizer."""

    marker: int | None
    """Id of the step marker."""
    labels: tuple[int, ...]
    """Ids of the label tokens, worst to best; empty for a classifier."""


def resolve_ids(spec: StepHeadConfig, tokenizer: Any) -> StepHeadIds:
    """Look the marker and the label tokens up.

    Raises:
        ConfigError: one of them is not exactly one token of this tokenizer, or two of them are the same token.
    """
    marker = named_marker(spec, tokenizer).format.marker
    marker_id = None if marker is None else marker_token_id(tokenizer, marker)
    texts = spec.labels if isinstance(spec, LabelTokens) else ()
    labels = tuple(marker_token_id(tokenizer, text, what="label") for text in texts)
    if len(set(labels)) != len(labels) or (labels and marker_id in labels):
        raise ConfigError(f"labels {list(texts)} and marker {marker!r} are not different tokens in this tokenizer")
    return StepHeadIds(marker_id, labels)


def named_marker(spec: StepHeadConfig, tokenizer: Any) -> StepHeadConfig:
    """The spec with ``auto`` replaced by the marker it means for this tokenizer.

    That is what a model records: a list of candidates that grows must not change the marker of a trained model.
    """
    if spec.format.marker != "auto":
        return spec
    marked = replace(spec.format, marker=auto_marker(tokenizer))
    return replace(spec, format=marked)  # type: ignore[type-var]


class StepHead(nn.Module):
    """The head itself.

    Args:
        spec: which kind.
        ids: its tokens.
        hidden_size: H.
        seed: seed of a classifier's first weights; the global generators are left as they were.

    The classifier's layers and parameter names are those of Qwen2.5-Math-PRM's ``score``: Linear, ReLU, Linear; with
    one layer those of a transformers token classification model.
    """

    def __init__(self, spec: StepHeadConfig, ids: StepHeadIds, hidden_size: int, *, seed: int = 0) -> None:
        super().__init__()
        self.spec = spec
        self.ids = ids
        self.score: nn.Module | None = None
        if isinstance(spec, Classifier):
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)  # torch.manual_seed would reset the GPUs' too
                members = [_classifier(spec, hidden_size) for _ in range(spec.members)]
                self.score = members[0] if spec.members == 1 else nn.ModuleList(members)

    def logps(self, hidden_SH: Tensor, vocab_head: VocabHead, *, chunk_size: int = DEFAULT_CHUNK) -> Tensor:
        """Log-probability of every class: (S, C), nats, at least float32.

        With ``restricted=False`` these are log-probabilities over the whole vocabulary and do not sum to one; nor do
        those of an ensemble, which are the members' mean, so that cross-entropy is the mean of theirs; accuracies in
        training are by them, too. Its scores, and :meth:`mean_logps`, are by the members' mean probability.
        """
        logps_SK = self.subclass_logps(hidden_SH, vocab_head, chunk_size=chunk_size)
        return logps_SK.unflatten(-1, (self.spec.num_classes, -1)).logsumexp(-1)

    def mean_logps(self, hidden_SH: Tensor, vocab_head: VocabHead, *, chunk_size: int = DEFAULT_CHUNK) -> Tensor:
        """Logarithm of an ensemble's mean probability of every class: (S, C); else as :meth:`logps`."""
        if self.spec.members == 1:
            return self.logps(hidden_SH, vocab_head, chunk_size=chunk_size)
        return self._member_logps(hidden_SH).logsumexp(0) - math.log(self.spec.members)

    def subclass_logps(self, hidden_SH: Tensor, vocab_head: VocabHead, *, chunk_size: int = DEFAULT_CHUNK) -> Tensor:
        """Log-probability of every sub-class: (S, K), as :meth:`logps`; of the classes where each has but one."""
        if self.score is None:
            assert isinstance(self.spec, LabelTokens)
            return label_token_logps(
                vocab_head, hidden_SH, self.ids.labels, restricted=self.spec.restricted, chunk_size=chunk_size
            )
        return self._member_logps(hidden_SH).mean(0)

    def _member_logps(self, hidden_SH: Tensor) -> Tensor:
        """Log-probability of every class or sub-class by every member of a classifier: (M, S, K)."""
        assert self.score is not None
        hidden_SH = hidden_SH.to(next(self.score.parameters()).dtype)
        members = self.score if isinstance(self.score, nn.ModuleList) else [self.score]
        logits_MSK = torch.stack([member(hidden_SH) for member in members])
        return torch.log_softmax(logits_MSK if logits_MSK.dtype == torch.float64 else logits_MSK.float(), dim=-1)

    def features(self, hidden_SH: Tensor) -> Tensor:
        """What the last layer reads of every step: (S, H), in the head's dtype; of an ensemble the hidden states, which
        all members read."""
        if self.score is None:
            return hidden_SH
        below = self.score[:-1] if isinstance(self.score, nn.Sequential) else nn.Identity()
        return cast(Tensor, below(hidden_SH.to(next(self.score.parameters()).dtype)))

    def output_weights(self, vocab: nn.Module) -> Tensor:
        """Weights of the last layer, (K, H): for label tokens their rows of the model's output layer ``vocab``."""
        if self.score is None:
            return cast(Tensor, vocab.weight)[list(self.ids.labels)]
        return list(self.score.parameters())[-2]

    def scores(self, hidden_SH: Tensor, vocab_head: VocabHead, *, chunk_size: int = DEFAULT_CHUNK) -> Tensor:
        """Chance that each step is correct: (S,), in [0, 1]; of an ensemble the members' mean."""
        if self.spec.members > 1:
            return self.member_scores(hidden_SH).mean(0)
        return self._correct(self.logps(hidden_SH, vocab_head, chunk_size=chunk_size))

    def member_scores(self, hidden_SH: Tensor) -> Tensor:
        """Chance that each step is correct by every member of an ensemble: (M, S), in [0, 1]."""
        return self._correct(self._member_logps(hidden_SH))

    def _correct(self, logps_SC: Tensor) -> Tensor:
        probs_SC = torch.softmax(logps_SC, dim=-1)
        correct_S = probs_SC[..., -1]
        if probs_SC.shape[-1] == 3:
            neutral = {"correct": 1.0, "incorrect": 0.0, "half": 0.5}[self.spec.neutral]
            correct_S = correct_S + probs_SC[..., 1] * neutral
        return correct_S


def _classifier(spec: Classifier, hidden_size: int) -> nn.Module:
    """One member, of the global generator's weights."""
    below = [nn.Linear(hidden_size, hidden_size), nn.ReLU()] if spec.layers == 2 else []
    output = nn.Linear(hidden_size, spec.classes * spec.subclasses)
    return nn.Sequential(*below, output) if below else output


def save_step_head(head: StepHead, folder: Path) -> None:
    """Write a step head into a model folder."""
    from safetensors.torch import save_file

    write_json(folder / STEP_HEAD_CONFIG, head.spec.to_dict())
    if head.score is not None:
        weights = {name: value.detach().cpu().contiguous() for name, value in head.state_dict().items()}
        save_file(weights, folder / STEP_HEAD_WEIGHTS)


def step_head_config(path: str, revision: str | None = None) -> StepHeadConfig | None:
    """How a model folder or hub repository says that it scores steps; None where it does not say.

    Raises:
        ModelError: its file cannot be read.
    """
    folder = Path(path).expanduser()
    config = model_file(path, folder, STEP_HEAD_CONFIG, revision)
    if config is None:
        return None
    try:
        return step_head_from_dict(json.loads(config.read_text(encoding="utf-8")))
    except Exception as error:  # broken JSON, foreign settings
        raise ModelError(f"cannot read the step head in {folder}: {first_line(error)}") from error


def saved_step_head(
    path: str, revision: str | None = None
) -> tuple[StepHeadConfig, Mapping[str, Tensor] | None] | None:
    """Read the step head of a model folder or hub repository; None when there is none.

    Returns:
        How it scores steps, and a classifier's weights (None for label tokens).

    Raises:
        ModelError: its files cannot be read, or the classifier's weights are missing.
    """
    spec, folder = step_head_config(path, revision), Path(path).expanduser()
    if not isinstance(spec, Classifier):
        return None if spec is None else (spec, None)
    from safetensors.torch import load_file

    weights = model_file(path, folder, STEP_HEAD_WEIGHTS, revision)
    if weights is None:
        config = model_file(path, folder, "config.json", revision)
        if config is not None and re.search("TokenClassification|ProcessRewardModel", config.read_text("utf-8")):
            raise ModelError(
                f"{folder} is a reward model in a layout for others, which only scores (stepkd.load_scorer, --scorer): "
                "to train or export it, take the run, or its export in layout stepkd"
            )
        raise ModelError(f"{folder} has {STEP_HEAD_CONFIG} but no {STEP_HEAD_WEIGHTS}: was the export cut off?")
    try:
        return spec, load_file(weights)
    except Exception as error:  # a torn safetensors file
        raise ModelError(f"cannot read the step head in {folder}: {first_line(error)}") from error
