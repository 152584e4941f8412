r"""Published process reward models as scorers, in the layout they were trained with; no code of theirs is run.

Four families, checked against the usage code of the model cards, of huggingface/search-and-learn
(``reward_models.py``) and of TRL (``PRMTrainer.tokenize_row``). The weights are large, so the
wiring is tested on stand-ins of the same architecture.

* ``math-shepherd``: ``peiyi9979/math-shepherd-mistral-7b-prm`` (arXiv 2312.08935). A causal language model; the text is
  ``{question} {solution}`` with the tag ``ки`` behind every step, before the newline. At each tag the softmax over the
  logits of ``+`` and ``-``, in this order, of which the card takes class 0. The card looks the tag and the labels up
  with a begin-of-word prefix, which is what encoding them alone gives.
* ``asprm``: ``Lux0926/ASPRM-L``, ``-M`` and ``-D`` (AdaptiveStep, arXiv 2502.13943; server settings, evaluation code
  and data of Lux0926/ASPRM). As above, but steps are cuts of one text: the question, the solution as it was sampled (it
  begins with a blank), the tag with a blank on both sides at every cut; a blank first segment is a step. The labels are
  the tag's two letters with what stands before a word, ``к`` good and ``и`` bad: 7820 and 7740 in Llama 3.1's
  tokenizer, 1878 and 839 in Mistral's, as in the servers; 898 and 701 of deepseek-coder were not looked up.
* ``qwen-prm``: ``Qwen/Qwen2.5-Math-PRM-7B`` and its kin (arXiv 2501.07301; ``Qwen2ForProcessRewardModel``). The
  chat template with the system prompt "Please reason step by step, and put your final answer within \boxed{}.", the
  answer being the steps with ``<extra_0>`` behind each and nothing else between; a two-layer head (``score.0``,
  ``score.2``) on the last hidden states; softmax, class 1, at every ``<extra_0>``. The card picks the positions by
  ``sample != 0``, which loses a step whose probability underflows; here positions are indices.
* ``trl``: what TRL's PRMTrainer writes, any ``...ForTokenClassification`` with two labels: the prompt behind a
  begin-of-sequence token if there is one, every step tokenised alone with the separator's tokens behind it; softmax,
  class 1, at the separator. Separators of more than one token are not supported.

A folder that ``stepkd export --layout`` wrote is of the last two families; it says itself how it lays solutions out.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepkd.data.step_encode import Layout, StepEncoder, behind_line_break
from stepkd.data.templates import PromptTemplate
from stepkd.errors import DataError, ModelError
from stepkd.models.adapter import first_line
from stepkd.models.checkpoint import load_trained
from stepkd.models.layouts import CLASSES, QWEN_FORMAT, QWEN_SYSTEM
from stepkd.models.load import check_tokenizer
from stepkd.models.policy import Policy
from stepkd.models.source import check_source, model_file, trained_template
from stepkd.models.spec import TINY_PRESETS, Classifier, LabelTokens, PolicyConfig
from stepkd.models.step_head import STEP_HEAD_CONFIG, step_head_config
from stepkd.sampling.engine import Engine
from stepkd.sampling.vllm import ServerEngine
from stepkd.scorers.prm import Item, PRMScorer
from stepkd.steps.format import StepFormat
from stepkd.steps.text import TokenizedText, tokenize_texts

_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


class BareSteps(StepEncoder):
    """Step texts without the white space around them: what stands between steps is the format's business."""

    def layout(self, steps: Sequence[str], name: str = "?") -> Layout:
        """See :meth:`StepEncoder.layout`."""
        return super().layout([step.strip() for step in steps], name)


class SpacedSteps(BareSteps):
    """Math-Shepherd: a space between question and solution, which SentencePiece tokenizers put there by themselves."""

    def layout(self, steps: Sequence[str], name: str = "?") -> Layout:
        """See :meth:`StepEncoder.layout`."""
        bare = [step.strip() for step in steps]
        if bare and bare[0] and not _begins_words(self.tokenizer):
            bare[0] = f" {bare[0]}"
        return StepEncoder.layout(self, bare, name)


class CutSteps(StepEncoder):
    """ASPRM: a blank behind every tag and before the solution; steps are what stands between, blank ones too."""

    takes_blank_steps = True

    def layout(self, steps: Sequence[str], name: str = "?") -> Layout:
        """See :meth:`StepEncoder.layout`."""
        return super().layout([step if step[:1] == " " and not k else f" {step}" for k, step in enumerate(steps)], name)

    def _tokenized(self, pieces: Sequence[str]) -> list[TokenizedText]:
        """None as the beginning of a text, not even the first: their blanks are all that stands there."""
        alone = tokenize_texts(self.tokenizer, pieces)
        return behind_line_break(self.tokenizer, alone) if self._begins_texts else alone


def _begins_words(tokenizer: Any) -> bool:
    """Whether the tokenizer puts a blank before a text by itself (SentencePiece)."""
    return bool(tokenizer.tokenize("x")[0].startswith("▁"))


class SeparatedSteps(StepEncoder):
    """TRL: every step tokenised alone, the separator's token behind each; it may also occur inside a step."""

    def layout(self, steps: Sequence[str], name: str = "?") -> Layout:
        """See :meth:`StepEncoder.layout`."""
        assert self.marker_id is not None
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        for step in steps:
            start = len(ids)
            ids += self.tokenizer(step.strip(), add_special_tokens=False)["input_ids"]
            if len(ids) == start:
                raise DataError(f"step {len(spans) + 1} has no text: drop empty steps", path=name, column="completions")
            ids.append(self.marker_id)
            spans.append((start, len(ids)))
        if not spans:
            raise DataError("a solution without steps cannot be scored", path=name, column="completions")
        return Layout(tuple(ids), tuple(spans), tuple(end - 1 for _, end in spans))


class ServedPRM(PRMScorer):
    """A model of the Qwen layout on vLLM servers started with ``--runner pooling``, which score token ids by /pooling.

    Args:
        policy: its settings, tokenizer and step head, weights on ``meta``.
        engine: of the servers.
        **settings: as for :class:`~stepkd.scorers.prm.PRMScorer`.
    """

    def __init__(self, policy: Policy, *, engine: Engine, **settings: Any) -> None:
        super().__init__(policy, **settings)
        assert isinstance(engine, ServerEngine)
        self.engine, self.client = engine, engine.client

    def provenance(self) -> dict[str, Any]:
        """See :class:`~stepkd.scorers.scorer.StepScorer`."""
        return super().provenance() | {"engine": {"name": type(self.engine).__name__, **self.engine.facts()}}

    def _score_items(self, items: Sequence[Item]) -> list[list[float]]:
        asked = [item for item in items if item.places]
        for item, correct in zip(asked, self.client.map(self._pooled, asked), strict=True):
            scores = self._scores(torch.tensor(correct), [item.name] * len(correct))
            for (step, _), score in zip(item.places, scores, strict=True):
                item.scores[step] = score
        return [item.scores for item in items]

    def _pooled(self, item: Item) -> list[float]:
        """Chance that each scored step is correct; the server says it at every marker, also at those in a prompt."""
        ids, marker = item.head + item.ids, self.encoder.marker_id
        marks = [place for place, token in enumerate(ids) if token == marker]
        body = {"model": self.client.name, "input": ids}
        found = self.client.ask("/pooling", body, read=lambda answer: answer["data"][0]["data"])
        if len(found) != len(marks) or any(len(each) != 2 for each in found):
            raise ModelError(
                f"the vLLM server at {self.client.urls[0]} gives {len(found)} scores for {len(marks)} step markers of "
                f"problem {item.name!r}: start it with --runner pooling --pooler-config '{{\"step_tag_id\": {marker}}}'"
            )
        return [float(found[marks.index(len(item.head) + at)][1]) for _, at in item.places]


def recognise(path: str) -> str | None:
    """Tell from a model's configuration, or for Math-Shepherd from its name, which family it belongs to.

    Args:
        path: folder or hub id.

    Returns:
        ``math-shepherd``, ``asprm``, ``qwen-prm`` or ``trl``; None for everything else (plain language models, stepkd's
        exports).

    Raises:
        ModelError: nothing of that name here or on the hub.
    """
    folder, names = Path(path).expanduser(), list[str]()
    if path not in TINY_PRESETS and not folder.is_file():
        if not folder.exists():
            check_source(path)
        # No configuration there; offline, no such repository, no permission: loading will say which.
        with contextlib.suppress(Exception):
            config = model_file(path, folder, "config.json", None)
            names = [] if config is None else json.loads(config.read_bytes()).get("architectures") or []
    if any("ProcessRewardModel" in name for name in names):
        return "qwen-prm"
    if any(name.endswith("ForTokenClassification") for name in names):
        return "trl"
    name = folder.name.lower()
    if "asprm" in name:
        return "asprm"
    return "math-shepherd" if "math-shepherd" in name and "prm" in name else None


def open_published(
    family: str, path: str, separator: str = "\n", weights: bool = True, **how: Any
) -> tuple[Policy, PromptTemplate | None, type[StepEncoder]]:
    """Load a published model.

    Args:
        family: ``math-shepherd``, ``asprm``, ``qwen-prm`` or ``trl``.
        path: folder or hub id.
        separator: the ``step_separator`` that TRL's PRMTrainer had; the other families have their own.
        weights: off, the weights of a classifier stay on the ``meta`` device: a server has them.
        **how: ``dtype`` and ``attention``, as for :func:`~stepkd.models.checkpoint.load_trained`.

    Returns:
        The model with its step head, its prompt template (None: an export of ours that has lost it), and how steps are
        laid out.

    Raises:
        ModelError: nothing loadable there.
        ConfigError: a marker that is not one token of the model's tokenizer.
    """
    if family == "math-shepherd":
        policy = load_trained(path, **how)
        layout = StepFormat(marker="ки", separator="\n", marker_place="before_separator")
        policy.attach_step_head(LabelTokens(format=layout, labels=("-", "+"), meaning="value"))
        return policy, PromptTemplate(style="plain"), SpacedSteps
    if family == "asprm":
        policy = load_trained(path, **how)
        before = "" if _begins_words(policy.tokenizer) else " "
        layout = StepFormat(marker=f"{before}ки", separator="", tokenize="per_step")
        labels = (f"{before}и", f"{before}к")
        policy.attach_step_head(LabelTokens(format=layout, labels=labels, restricted=False, meaning="value"))
        return policy, PromptTemplate(style="plain"), CutSteps
    layout = QWEN_FORMAT if family == "qwen-prm" else replace(QWEN_FORMAT, marker=separator)
    spec = Classifier(format=layout, layers=2 if family == "qwen-prm" else 1)
    policy, head = _load_classifier(path, **how) if weights else (load_trained(path, weights=False, **how), None)
    own = step_head_config(path)  # of an export of ours, which says how it was trained
    if own is not None and not isinstance(own, Classifier):
        raise ModelError(
            f"{path}: {STEP_HEAD_CONFIG} says {type(own).__name__}, and the weights are those of a Classifier"
        )
    spec = own or spec
    if head is not None:
        _check_head(path, head, spec)
    policy.attach_step_head(spec, weights=head)
    if own is not None:
        return policy, trained_template(path), StepEncoder
    if family == "qwen-prm":
        return policy, PromptTemplate(style="chat", system=QWEN_SYSTEM), BareSteps
    return policy, _trl_template(policy.tokenizer), SeparatedSteps


def _trl_template(tokenizer: Any) -> PromptTemplate:
    """PRMTrainer puts the begin-of-sequence token before the prompt whether the tokenizer adds it or not."""
    bos = tokenizer.bos_token
    adds_it = bos is not None and tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    return PromptTemplate(style="plain", plain=f"{'' if bos is None or adds_it else bos}{{prompt}}")


def _load_classifier(
    path: str, dtype: str | None = None, attention: str | None = None
) -> tuple[Policy, dict[str, Tensor]]:
    """The language model below a classification head, and the head's weights."""
    from huggingface_hub import snapshot_download
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = Path(path).expanduser()
    if not folder.is_dir():
        check_source(path)
    arguments: dict[str, Any] = {"dtype": "auto" if dtype is None else getattr(torch, dtype)}
    if attention is not None:
        arguments["attn_implementation"] = attention
    try:
        folder = folder if folder.is_dir() else Path(snapshot_download(path, allow_patterns=_FILES))
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        # There is no vocabulary head in the file; tied to the embeddings, nothing has to be made up. It is never read.
        config.tie_word_embeddings = True
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, config=config, trust_remote_code=False, output_loading_info=True, **arguments
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        weights = _tensors(folder, "score.")
    except Exception as error:  # transformers, safetensors and the hub raise many classes for a broken model
        raise ModelError(
            f"cannot load the reward model {path!r}: {first_line(error)}. Give an existing folder, or a hub id that "
            "this machine can reach (or has in its cache)"
        ) from error
    made_up = sorted(str(key) for name in ("missing_keys", "mismatched_keys") for key in report.get(name, ()))
    foreign = sorted(key for key in report.get("unexpected_keys", ()) if not key.startswith(("score.", "lm_head.")))
    if made_up or foreign or not weights:
        raise ModelError(
            f"{path!r} does not hold the weights of a reward model with a 'score' head: missing {made_up[:3]}, unknown "
            f"{foreign[:3]}, head {sorted(weights)}. Was it cut off, or is it of another kind?"
        )
    check_tokenizer(tokenizer, path)
    return Policy(model.eval(), tokenizer, PolicyConfig(path=path, dtype=None)), weights


def _check_head(path: str, weights: dict[str, Tensor], spec: Classifier) -> None:
    last = "score.2" if spec.layers == 2 else "score"
    if f"{last}.weight" not in weights or weights[f"{last}.weight"].shape[0] != spec.classes:
        shapes = {name: tuple(value.shape) for name, value in weights.items()}
        classes = f"{'three' if spec.classes == 3 else 'two'} classes, {', '.join(CLASSES[spec.classes])}"
        raise ModelError(
            f"the head of {path!r} is {shapes}: expected {last}.weight with {classes} (PRMTrainer's models are made "
            "with num_labels=2)"
        )
    if f"{last}.bias" not in weights:
        weights[f"{last}.bias"] = torch.zeros(spec.classes)


def _tensors(folder: Path, prefix: str) -> dict[str, Tensor]:
    from safetensors import safe_open

    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            found |= {name: tensors.get_tensor(name) for name in tensors.keys() if name.startswith(prefix)}  # noqa: SIM118
    return found
