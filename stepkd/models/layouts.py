"""Reward models in the layouts that other programs load: a token classification model of transformers, and that of
Qwen2.5-Math-PRM. Both need no code beside the weights.

Beside them stand ``step_head.json`` and the prompt template, by which stepkd reads such a folder exactly as it reads
the run that it was exported from (:mod:`stepkd.scorers.published`); other programs lay solutions out themselves.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from stepkd.data.templates import PromptTemplate
from stepkd.errors import ConfigError
from stepkd.models.head import backbone_of
from stepkd.models.spec import Classifier, LabelTokens, StepHeadConfig
from stepkd.models.step_head import STEP_HEAD_CONFIG, StepHead
from stepkd.runs.files import write_json
from stepkd.steps.format import StepFormat

Layout = Literal["stepkd", "token_classification", "qwen_prm"]
QWEN_SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."
QWEN_FORMAT = StepFormat(marker="<extra_0>", separator="", tokenize="per_step")
CLASSES = {2: ("incorrect", "correct"), 3: ("incorrect", "neutral", "correct")}


def check_layout(layout: Layout, spec: StepHeadConfig | None, config: Any, template: PromptTemplate | None) -> None:
    """Refuse what a layout cannot say exactly.

    Args:
        layout: which.
        spec: how the model scores steps; None: it does not.
        config: the model's settings.
        template: the prompt template that it was trained with.

    Raises:
        ConfigError: says what, and what to train for this layout.
    """
    if layout == "stepkd":
        return
    if spec is None:
        raise ConfigError(f"layout {layout}: the model is no reward model; the layout stepkd is for policies")
    text, say = config.get_text_config(), f"layout {layout} cannot say this model exactly: "
    if isinstance(spec, Classifier) and layout == "token_classification" and spec.layers != 1:
        what = "its head has two layers, and a token classification model has one"
        raise ConfigError(
            f"{say}{what}. Train it with head.layers: 1, or take layout stepkd (or of a Qwen2 model qwen_prm)"
        )
    if spec.subclasses > 1:
        raise ConfigError(f"{say}its classes are sums of {spec.subclasses} sub-classes. Take layout stepkd")
    if spec.members > 1:
        raise ConfigError(f"{say}its scores are means of {spec.members} heads. Take layout stepkd")
    plain = {"final_logit_softcapping": None, "logit_scale": 1, "logits_scaling": 1}
    bent = [name for name, value in plain.items() if getattr(text, name, None) not in (None, value)]
    if isinstance(spec, LabelTokens) and bent:
        raise ConfigError(f"{say}its logits are scaled or soft-capped ({bent[0]}). Train it with head: Classifier")
    if layout == "token_classification":
        return
    form = spec.format
    reasons = {
        f"it is a {text.model_type} model, not qwen2": text.model_type != "qwen2",
        "its head is no two-layer Classifier of two classes": (
            not isinstance(spec, Classifier) or (spec.layers, spec.classes) != (2, 2)
        ),
        f"its steps end in {form.marker!r} behind {form.separator!r}, not in '<extra_0>' behind nothing": (
            (form.marker, form.separator, form.marker_place) != ("<extra_0>", "", "step_end")
        ),
        f"its prompt is not the chat template with the system message {QWEN_SYSTEM!r}": (
            template != PromptTemplate(style="chat", system=QWEN_SYSTEM)
        ),
    }
    if found := [reason for reason, holds in reasons.items() if holds]:
        raise ConfigError(
            f"{say}{'; '.join(found)}. Others read it as they read Qwen2.5-Math-PRM: train a Qwen2 model with "
            "head: Classifier, head.format: {marker: <extra_0>, separator: '', tokenize: per_step} and data.template: "
            "{style: chat, system: ...}, or take layout token_classification"
        )


def save_classifier(model: Any, head: StepHead, out: Path, layout: Layout) -> None:
    """Write a model with the layers of its step head, ``score``, in place of the vocabulary head.

    Label tokens become a linear head of their rows of the vocabulary head: the same scores at the same markers.

    Args:
        model: a transformers causal language model without adapters.
        head: how it scores steps; :func:`check_layout` has accepted it.
        out: the folder.
        layout: which.

    Raises:
        ConfigError: transformers has no such model of this architecture.
    """
    from transformers import MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING as KINDS

    backbone = backbone_of(model)

    spec, score, config = head.spec, head.score, model.config
    if isinstance(spec, LabelTokens):
        score = _rows(model.get_output_embeddings(), head.ids.labels)
        spec = Classifier(
            format=spec.format, neutral=spec.neutral, meaning=spec.meaning, classes=spec.num_classes, layers=1
        )
    kind, shell = KINDS.get(type(config), None), None
    config.num_labels = spec.num_classes
    config.id2label = dict(enumerate(CLASSES[spec.num_classes]))
    config.label2id = {name: number for number, name in config.id2label.items()}
    if kind is not None:
        if layout == "qwen_prm":  # the published class differs in its head alone
            kind = type("Qwen2ForProcessRewardModel", (kind,), {})
        with torch.device("meta"):
            shell = kind(config)
    own = getattr(shell, "base_model", None)
    if shell is None or type(own) is not type(backbone) or not isinstance(getattr(shell, "score", None), nn.Linear):
        what = f"transformers has no token classification model of {type(model).__name__} with a head named 'score'"
        raise ConfigError(f"layout {layout}: {what}; the layout stepkd holds any model")
    setattr(shell, shell.base_model_prefix, backbone)
    shell.score = score
    shell.save_pretrained(out, safe_serialization=True)
    write_json(out / STEP_HEAD_CONFIG, spec.to_dict())


def _rows(head: Any, ids: tuple[int, ...]) -> nn.Linear:
    """A linear layer that gives the logits of some tokens."""
    weight, bias = head.weight.detach()[list(ids)], getattr(head, "bias", None)
    score = nn.Linear(weight.shape[1], len(ids), device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        score.weight.copy_(weight)
        score.bias.copy_(torch.zeros(len(ids)) if bias is None else bias.detach()[list(ids)])
    return score
