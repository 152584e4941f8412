"""Step heads: scores, parity with transformers' classifiers, tokens, freezing, and their files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from stepkd.errors import ConfigError, ModelError
from stepkd.losses import step_cross_entropy
from stepkd.models.checkpoint import export_model, load_trained, save_policy
from stepkd.models.layouts import check_layout
from stepkd.models.policy import Policy
from stepkd.models.spec import (
    Classifier,
    LabelTokens,
    LoRAConfig,
    PolicyConfig,
    StepHeadConfig,
    build_tiny,
    step_head_from_dict,
    tiny_tokenizer,
)
from stepkd.models.step_head import (
    STEP_HEAD_CONFIG,
    STEP_HEAD_WEIGHTS,
    StepHeadIds,
    named_marker,
    resolve_ids,
    save_step_head,
    saved_step_head,
)
from stepkd.steps.format import MARKER_CANDIDATES, StepFormat

IDS = torch.tensor([[5, 17, 33, 8, 99, 4]])
TOKENS = LabelTokens()
THREE = LabelTokens(labels=("-", "0", "+"))
CLASSIFIER = Classifier(format=StepFormat(marker=None))
TRL = Classifier(layers=1)
LORA = LoRAConfig(r=4, target_modules=["q_proj", "down_proj"])
HEADS = pytest.mark.parametrize("spec", [TOKENS, CLASSIFIER, TRL], ids=["label_tokens", "classifier", "one_layer"])


def policy(spec: StepHeadConfig, **settings: Any) -> Policy:
    loaded = Policy.load(PolicyConfig(path="tiny-0.1m", **settings))
    loaded.attach_step_head(spec)
    return loaded


def shaken(model: Policy) -> Policy:
    """Trainable weights moved away from where they started."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, parameter in model.trainable_parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def scores(model: Policy) -> torch.Tensor:
    with torch.no_grad():
        return model.step_scores(model.hidden(IDS, torch.ones_like(IDS))[0])


def untied(path: Path) -> Path:
    """A model folder whose head has weights of its own."""
    from transformers import LlamaForCausalLM

    model, tokenizer = build_tiny("tiny-0.1m", seed=3)
    config = model.config
    config.tie_word_embeddings = False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fresh = LlamaForCausalLM(config)
    fresh.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


# ---- scores ---------------------------------------------------------------------------------------------------------


def test_label_token_scores_are_a_softmax_of_the_two_logits() -> None:
    model = policy(TOKENS, dtype="float64")
    logits = model.model(input_ids=IDS).logits[0]
    minus, plus = (model.tokenizer.convert_tokens_to_ids(token) for token in "-+")
    assert torch.allclose(scores(model), torch.sigmoid(logits[:, plus] - logits[:, minus]), rtol=1e-12)
    full = policy(replace(TOKENS, restricted=False), dtype="float64")
    assert torch.allclose(scores(full), scores(model), rtol=1e-12), "scores are always among the label tokens"


@pytest.mark.parametrize(("neutral", "share"), [("correct", 1.0), ("incorrect", 0.0), ("half", 0.5)])
@pytest.mark.parametrize("kind", ["label_tokens", "classifier"])
def test_three_classes(kind: str, neutral: Any, share: float) -> None:
    spec = THREE if kind == "label_tokens" else replace(CLASSIFIER, classes=3)
    model = policy(replace(spec, neutral=neutral), dtype="float64")
    hidden = model.hidden(IDS, torch.ones_like(IDS))[0]
    if kind == "label_tokens":
        ids = [model.tokenizer.convert_tokens_to_ids(token) for token in "-0+"]
        logits = model.model(input_ids=IDS).logits[0][:, ids]
    else:
        logits = model.require_step_head().score(hidden)  # type: ignore[misc]
    probs = logits.softmax(-1)
    assert torch.allclose(scores(model), probs[:, 2] + share * probs[:, 1], rtol=1e-12)


@pytest.mark.parametrize("layers", [1, 2])
def test_classes_are_the_sums_of_their_sub_classes(layers: int, tmp_path: Path) -> None:
    """Also once exported; a layout for others, whose heads have one output a class, is refused."""
    model = shaken(policy(replace(CLASSIFIER, layers=layers, subclasses=3), dtype="float64"))
    hidden, head = model.hidden(IDS, torch.ones_like(IDS))[0], model.require_step_head()
    probs = head.score(hidden).softmax(-1)  # type: ignore[misc]
    assert probs.shape[-1] == 6
    assert torch.allclose(scores(model), probs[:, 3:].sum(-1), rtol=1e-12)
    assert torch.allclose(head.subclass_logps(hidden, model.head).exp(), probs, rtol=1e-12)
    assert torch.allclose(head.logps(hidden, model.head).exp().sum(-1), torch.ones(6, dtype=torch.float64))
    save_policy(model, tmp_path)
    assert torch.equal(scores(load_trained(tmp_path)), scores(model))
    with pytest.raises(ConfigError, match="its classes are sums of 3 sub-classes"):
        check_layout("token_classification", replace(TRL, subclasses=3), model.causal_lm.config, None)


@pytest.mark.parametrize("layers", [1, 2])
def test_an_ensemble_has_heads_of_its_own_on_one_model(layers: int, tmp_path: Path) -> None:
    """Scores are the members' mean, cross-entropy is the mean of theirs; also once exported."""
    spec = replace(CLASSIFIER, layers=layers, members=3, classes=3, neutral="half")
    model = shaken(policy(spec, dtype="float64"))
    hidden, head = model.hidden(IDS, torch.ones_like(IDS))[0], model.require_step_head()
    probs = [member(hidden).softmax(-1) for member in head.score]  # type: ignore[union-attr]
    members = torch.stack([each[:, 2] + 0.5 * each[:, 1] for each in probs])
    assert members.std(0).min() > 1e-3, "each has first weights of its own"
    assert torch.allclose(head.member_scores(hidden), members, rtol=1e-12)
    assert torch.allclose(scores(model), members.mean(0), rtol=1e-12)
    targets = torch.full((6, 3), 1 / 3, dtype=torch.float64)
    targets[:4] = torch.eye(3, dtype=torch.float64)[[0, 1, 2, 0]]
    found = step_cross_entropy(head.logps(hidden, model.head), targets).sums["prm"]
    expected = sum(step_cross_entropy(each.log(), targets).sums["prm"] for each in probs).detach() / 3
    assert found.item() == pytest.approx(float(expected), rel=1e-12)
    assert torch.allclose(head.mean_logps(hidden, model.head), torch.stack(probs).mean(0).log(), rtol=1e-10)
    save_policy(model, tmp_path)
    assert torch.equal(scores(load_trained(tmp_path)), scores(model))
    with pytest.raises(ConfigError, match="its scores are means of 3 heads"):
        check_layout("token_classification", replace(TRL, members=3), model.causal_lm.config, None)
    with pytest.raises(ConfigError, match=r"head\.members=3, head\.subclasses=2.*set one of both to 1"):
        replace(CLASSIFIER, members=3, subclasses=2)
    with pytest.raises(ConfigError, match="members=0: must be at least 1"):
        replace(CLASSIFIER, members=0)


@pytest.mark.parametrize("spec", [TOKENS, CLASSIFIER, TRL])
def test_the_last_layer_makes_logits_of_features(spec: StepHeadConfig) -> None:
    model = policy(spec, dtype="float64")
    head, hidden = model.require_step_head(), model.hidden(IDS, torch.ones_like(IDS))[0]
    logits = head.features(hidden) @ head.output_weights(model.causal_lm.get_output_embeddings()).T
    bias = 0.0 if head.score is None else list(head.parameters())[-1]
    assert torch.allclose((logits + bias).log_softmax(-1), head.logps(hidden, model.head), rtol=1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-12)])
def test_one_layer_is_a_transformers_token_classifier(dtype: Any, tolerance: float, tmp_path: Path) -> None:
    """TRL's PRMTrainer trains this class; its weights and ours are the same tensors under the same names."""
    from transformers import LlamaForTokenClassification

    model = policy(TRL, dtype=dtype)
    theirs = LlamaForTokenClassification(model.causal_lm.config).to(getattr(torch, dtype)).eval()
    theirs.model.load_state_dict(model.causal_lm.model.state_dict())
    head = model.require_step_head()
    theirs.load_state_dict(head.state_dict(), strict=False)
    assert set(head.state_dict()) == {name for name in theirs.state_dict() if name.startswith("score")}
    with torch.no_grad():
        probs = theirs(input_ids=IDS).logits[0].softmax(-1)
    assert torch.allclose(scores(model), probs[:, 1].to(scores(model).dtype), rtol=tolerance)


def test_a_classifier_in_bfloat16_keeps_its_own_precision() -> None:
    model = policy(CLASSIFIER, dtype="bfloat16")
    assert {p.dtype for p in model.require_step_head().parameters()} == {torch.float32}
    assert scores(model).dtype == torch.float32


def test_the_first_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = policy(CLASSIFIER).require_step_head().state_dict()
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator is left as it was"
    torch.manual_seed(2)
    again = policy(CLASSIFIER).require_step_head().state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    other = Policy.load(PolicyConfig(path="tiny-0.1m")).attach_step_head(CLASSIFIER, seed=7).state_dict()
    assert not torch.equal(first["score.0.weight"], other["score.0.weight"])
    assert list(first) == ["score.0.weight", "score.0.bias", "score.2.weight", "score.2.bias"]


# ---- tokens ---------------------------------------------------------------------------------------------------------


def test_auto_picks_the_tilde_in_the_tiny_world_and_is_recorded_by_name() -> None:
    tokenizer = tiny_tokenizer()
    assert MARKER_CANDIDATES[-1] == "~"
    assert resolve_ids(TOKENS, tokenizer).marker == tokenizer.convert_tokens_to_ids("~")
    assert resolve_ids(TOKENS, tokenizer).labels == tuple(tokenizer.convert_tokens_to_ids(["-", "+"]))
    assert resolve_ids(CLASSIFIER, tokenizer) == StepHeadIds(None, ())
    assert policy(TOKENS).require_step_head().spec.format.marker == "~"
    assert named_marker(CLASSIFIER, tokenizer) is CLASSIFIER


def test_auto_prefers_a_reserved_token() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<file_sep>", "<extra_0>"]})
    assert resolve_ids(TOKENS, tokenizer).marker == tokenizer.convert_tokens_to_ids("<extra_0>")


def test_a_tokenizer_without_any_usual_marker() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "</s>": 2}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    with pytest.raises(ConfigError, match=r"none of the usual step markers .* name one that is"):
        resolve_ids(TOKENS, tokenizer)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (LabelTokens(format=StepFormat(marker="END")), r"step marker 'END' is 3 tokens \['E', 'N', 'D'\]"),
        (LabelTokens(format=StepFormat(marker="ки")), "step marker 'ки' is"),
        (LabelTokens(labels=("bad", "+")), r"label 'bad' is 3 tokens \['b', 'a', 'd'\]"),
        (LabelTokens(labels=("-", "é")), "label 'é' is unknown to this tokenizer"),
        (LabelTokens(format=StepFormat(marker="+")), "are not different tokens"),
    ],
)
def test_tokens_that_do_not_fit(spec: StepHeadConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        policy(spec)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LabelTokens(labels=("+",)), r"head.labels=\['\+'\]: two or three different tokens"),
        (lambda: LabelTokens(labels=("+", "+")), "two or three different tokens"),
        (lambda: LabelTokens(labels=("a", "b", "c", "d")), "two or three different tokens"),
        (lambda: LabelTokens(format=StepFormat(marker=None)), "set head.format.marker"),
        (lambda: Classifier(classes=4), r"head.classes=4: must lie in \[2, 3\]"),
        (lambda: Classifier(layers=3), r"head.layers=3: must lie in \[1, 2\]"),
        (lambda: LabelTokens(neutral="ignore"), "unknown head.neutral"),
        (lambda: Classifier(meaning="reward"), "unknown head.meaning"),
        (lambda: step_head_from_dict({"kind": "regression"}), "unknown head.kind 'regression'"),
    ],
)
def test_bad_settings(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


# ---- on a policy ----------------------------------------------------------------------------------------------------


def test_a_plain_model_scores_no_steps() -> None:
    with pytest.raises(ModelError, match="it has no step head"):
        scores(Policy.load(PolicyConfig(path="tiny-0.1m")))


def test_a_second_head_is_refused_and_the_same_one_is_kept() -> None:
    model = policy(CLASSIFIER)
    assert model.attach_step_head(CLASSIFIER, seed=9) is model.step_head
    with pytest.raises(ConfigError, match="already has a step head"):
        model.attach_step_head(TOKENS)
    tokens = policy(TOKENS)
    assert tokens.attach_step_head(LabelTokens(format=StepFormat(marker="~"))) is tokens.step_head


def test_weights_of_another_shape() -> None:
    model = Policy.load(PolicyConfig(path="tiny-0.1m"))
    weights = {"score.weight": torch.zeros(2, 3), "score.bias": torch.zeros(2)}
    with pytest.raises(ModelError, match="the step head's weights do not fit this model"):
        model.attach_step_head(TRL, weights=weights)


LORA_ON_HEAD = LoRAConfig(r=4, target_modules=["q_proj", "lm_head"])
HEAD_SAVED = LoRAConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])


@HEADS
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("lora", [None, LORA, LORA_ON_HEAD, HEAD_SAVED], ids=["full", "lora", "lora_head", "saved"])
def test_every_trainable_weight_gets_a_gradient(
    spec: StepHeadConfig, tied: bool, lora: LoRAConfig | None, folder: Path, tmp_path: Path
) -> None:
    """DDP waits for every trainable parameter. A classifier never reads the vocabulary head: it is frozen."""
    path = folder if tied else untied(tmp_path / "untied")
    model = Policy.load(PolicyConfig(path=str(path), lora=lora))
    model.attach_step_head(spec)
    head = model.require_step_head()
    head.logps(model.hidden(IDS, torch.ones_like(IDS))[0], model.head).sum().backward()
    named = dict(model.trainable_parameters())
    assert named
    assert [name for name, parameter in named.items() if parameter.grad is None] == []
    assert any("step_head" in name for name in named) is (spec.kind == "classifier")
    if spec.kind == "classifier" and not tied:
        assert not any("lm_head" in name for name in named)


# ---- files ----------------------------------------------------------------------------------------------------------


@HEADS
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_a_merged_export_scores_the_same_and_is_a_plain_model(
    spec: StepHeadConfig, lora: LoRAConfig | None, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = shaken(policy(spec, lora=lora))
    before = scores(model)
    save_policy(model, tmp_path)
    again = Policy.load(PolicyConfig(path=str(tmp_path)))
    assert again.require_step_head().spec == model.require_step_head().spec
    assert torch.allclose(scores(again), before, rtol=1e-5, atol=1e-6)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.allclose(plain(input_ids=IDS).logits, again.model(input_ids=IDS).logits)
    assert (tmp_path / STEP_HEAD_WEIGHTS).is_file() is (spec.kind == "classifier")


@pytest.mark.parametrize("spec", [TOKENS, CLASSIFIER], ids=["label_tokens", "classifier"])
def test_an_adapter_export_keeps_its_head(spec: StepHeadConfig, folder: Path, tmp_path: Path) -> None:
    model = Policy.load(PolicyConfig(path=str(folder), lora=LORA))
    model.attach_step_head(spec)
    before = scores(shaken(model))
    save_policy(model, tmp_path / "adapter", mode="adapter")
    assert torch.allclose(scores(Policy.load(PolicyConfig(path=str(tmp_path / "adapter")))), before, atol=1e-6)


@HEADS
def test_a_checkpoint_brings_the_head_back(spec: StepHeadConfig, tmp_path: Path) -> None:
    model = shaken(policy(spec, lora=LORA))
    file = checkpoint(model, tmp_path / "x.ckpt")
    again = load_trained(file)
    assert again.require_step_head().spec == model.require_step_head().spec
    assert torch.equal(scores(again), scores(model))
    exported = export_model(file, tmp_path / "out")
    assert torch.allclose(scores(Policy.load(PolicyConfig(path=str(exported)))), scores(model), rtol=1e-5, atol=1e-6)


def checkpoint(model: Policy, file: Path) -> Path:
    """What ``StepModule.on_save_checkpoint`` leaves in a checkpoint."""
    assert model.spec is not None
    extra: dict[str, Any] = {
        "format": 2, "module": "stepkd.modules.prm.PRMModule", "policy": asdict(model.spec), "position": {},
        "seed": 0, "step_head": model.require_step_head().spec.to_dict(),
    }  # fmt: skip
    weights = {f"policy.{name}": p.detach() for name, p in model.trainable_parameters()}
    torch.save({"state_dict": weights, "stepkd": extra, "epoch": 0, "global_step": 3}, file)
    return file


def test_float64_survives_an_export(tmp_path: Path) -> None:
    model = shaken(policy(CLASSIFIER, dtype="float64"))
    save_policy(model, tmp_path)
    assert torch.equal(scores(Policy.load(PolicyConfig(path=str(tmp_path), dtype="float64"))), scores(model))


def test_the_marker_of_an_export_is_a_name_not_a_rule(tmp_path: Path) -> None:
    """A list of candidates that grows must not move the marker of a trained model."""
    save_policy(policy(TOKENS), tmp_path)
    config = json.loads((tmp_path / STEP_HEAD_CONFIG).read_text())
    assert config["format"]["marker"] == "~"
    assert config["labels"] == ["-", "+"]
    saved = saved_step_head(str(tmp_path))
    assert saved is not None
    assert saved == (policy(TOKENS).require_step_head().spec, None)


def test_training_goes_on_from_an_export_with_the_same_head_only(tmp_path: Path) -> None:
    model = shaken(policy(CLASSIFIER))
    save_policy(model, tmp_path)
    again = Policy.load(PolicyConfig(path=str(tmp_path)))
    again.attach_step_head(CLASSIFIER, seed=3)
    assert torch.equal(scores(again), scores(model)), "the trained head is kept, not drawn again"
    with pytest.raises(ConfigError, match="give the same head settings to continue training it"):
        again.attach_step_head(replace(CLASSIFIER, meaning="value"))


def test_folders_without_a_head(folder: Path) -> None:
    assert saved_step_head(str(folder)) is None
    assert saved_step_head("org/name-on-the-hub") is None


def test_damaged_folders(tmp_path: Path) -> None:
    save_policy(policy(CLASSIFIER), tmp_path)
    config, weights = tmp_path / STEP_HEAD_CONFIG, tmp_path / STEP_HEAD_WEIGHTS
    whole, tensors = config.read_text(), load_file(weights)
    for text, message in [
        (whole[:20], "cannot read the step head"),
        ("[]", "cannot read the step head"),
        (whole.replace('"classifier"', '"regression"'), "unknown head.kind 'regression'"),
        (whole.replace('"classes"', '"outputs"'), r"unknown step head settings \['outputs'\]"),
        (whole.replace('"separator"', '"joint"'), r"unknown step head settings \['joint'\]"),
    ]:
        config.write_text(text)
        with pytest.raises(ModelError, match=message):
            Policy.load(PolicyConfig(path=str(tmp_path)))
    config.write_text(whole)
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(ModelError, match="cannot read the step head"):
        Policy.load(PolicyConfig(path=str(tmp_path)))
    save_file({name: value for name, value in tensors.items() if "bias" not in name}, weights)
    with pytest.raises(ModelError, match="weights do not fit this model"):
        Policy.load(PolicyConfig(path=str(tmp_path)))
    weights.unlink()
    with pytest.raises(ModelError, match=rf"has {STEP_HEAD_CONFIG} but no {STEP_HEAD_WEIGHTS}: was the export cut off"):
        Policy.load(PolicyConfig(path=str(tmp_path)))


def test_settings_survive_json() -> None:
    for spec in (TOKENS, THREE, CLASSIFIER, TRL, replace(TOKENS, restricted=False, meaning="value")):
        assert step_head_from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


@pytest.mark.parametrize(("kind", "spec"), [("label_tokens", THREE), ("classifier", replace(CLASSIFIER, classes=3))])
def test_files_with_the_settings_of_all_kinds_still_load(kind: str, spec: StepHeadConfig) -> None:
    old = {"kind": kind, "labels": ["-", "0", "+"], "restricted": True, "classes": 3, "layers": 2}
    layout = {"marker": spec.format.marker, "separator": "\n"}
    found = step_head_from_dict(old | {"format": layout, "neutral": "right", "meaning": "correctness"})
    assert found == replace(spec, format=StepFormat(**layout))  # type: ignore[type-var]


def test_the_step_head_of_a_hub_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub id has its step head beside its weights on the hub."""
    import transformers.utils

    policy = Policy.load(PolicyConfig(path="tiny-0.1m"))
    save_step_head(policy.attach_step_head(Classifier(), seed=3), tmp_path)
    asked: list[tuple[str, str, str | None]] = []

    def cached_file(path: str, name: str, revision: str | None = None, **_: bool) -> str | None:
        asked.append((path, name, revision))
        return str(tmp_path / name) if path == "org/prm" else None

    monkeypatch.setattr(transformers.utils, "cached_file", cached_file)
    saved = saved_step_head("org/prm", "v2")
    assert saved is not None
    spec, weights = saved
    assert spec == policy.require_step_head().spec
    assert weights is not None
    for name, value in policy.require_step_head().state_dict().items():
        assert torch.equal(weights[name], value)
    assert asked == [("org/prm", "step_head.json", "v2"), ("org/prm", "step_head.safetensors", "v2")]
    assert saved_step_head("org/policy") is None
    assert saved_step_head("tiny-0.1m") is None
    assert len(asked) == 3
