"""Reward models exported in the layouts of others score as their run: in plain transformers, and read by us."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stepkd.data.templates import PromptTemplate, get_template
from stepkd.errors import ConfigError, ModelError
from stepkd.models import Classifier, LabelTokens, LoRAConfig, PolicyConfig, StepHeadConfig, tiny_tokenizer
from stepkd.models.checkpoint import export_model
from stepkd.models.layouts import QWEN_FORMAT, QWEN_SYSTEM
from stepkd.models.policy import Policy
from stepkd.scorers.load import PRM, QwenPRM, load_scorer
from stepkd.scorers.prm import PRMScorer
from stepkd.scorers.published import recognise
from stepkd.scorers.scorer import Solutions
from stepkd.steps.format import StepFormat

SHAPE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 512,
}  # fmt: skip
PROBLEMS = [
    Solutions({"id": "a", "prompt": "4+8*6="}, [["8*6=8\n", "4+8=2\n", "#### 2"], ["4+8=2", "2*6=2"]]),
    Solutions({"id": "b", "prompt": "7+5="}, [["7+5=2\n\n", "#### 2"]]),
]
QWEN = Classifier(format=QWEN_FORMAT)
CHAT = PromptTemplate(style="chat", system=QWEN_SYSTEM)
ONE_LAYER = Classifier(layers=1)


def made(
    folder: Path,
    head: StepHeadConfig,
    *,
    kind: str = "Llama",
    template: PromptTemplate | None = None,
    lora: bool = False,
    **config: Any,
) -> Path:
    """A run of a reward model of random weights, on a base of an architecture."""
    import transformers

    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<extra_0>"]})
    settings = SHAPE | {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, **config}
    torch.manual_seed(1)
    base = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**settings))
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    spec = PolicyConfig(path=str(folder / "base"), lora=LoRAConfig(r=2) if lora else None)
    policy = Policy.load(spec)
    policy.attach_step_head(head)
    with torch.no_grad():
        for name, parameter in policy.trainable_parameters():
            if "step_head" in name or "lora_B" in name:
                parameter.add_(torch.randn_like(parameter) * (0.1 if "lora" in name else 0.3))
    trained = {f"policy.{name}": each.detach() for name, each in policy.trainable_parameters()}
    section = {"format": 2, "policy": asdict(spec), "step_head": head.to_dict()}
    section["template"] = asdict(template or get_template("task"))
    (folder / "run" / "checkpoints").mkdir(parents=True)
    torch.save({"state_dict": trained, "stepkd": section}, folder / "run" / "checkpoints" / "last.ckpt")
    return folder / "run"


def scores(path: Any) -> tuple[PRMScorer, list[float]]:
    scorer = load_scorer(path, device="cpu")
    assert isinstance(scorer, PRMScorer)
    return scorer, [value for problem in scorer.score(PROBLEMS) for steps in problem for value in steps]


def from_logits(scorer: PRMScorer, read: Any) -> list[float]:
    """Scores of a model that gives logits at every position, of the last class."""
    found: list[float] = []
    for problem in PROBLEMS:
        prompt = scorer.encoder.prompt_ids(problem.row)
        for steps in problem.solutions:
            layout = scorer.encoder.layout(steps)
            logits: Tensor = read(torch.tensor([[*prompt, *layout.ids]]))
            found += logits.softmax(-1)[0, [len(prompt) + at for at in layout.read_at], -1].tolist()
    return found


@pytest.mark.parametrize(
    ("kind", "head", "settings"),
    [
        ("Llama", ONE_LAYER, {}),
        ("Qwen2", ONE_LAYER, {"tie_word_embeddings": True}),
        ("Qwen3", LabelTokens(), {"head_dim": 16}),
        ("Llama", LabelTokens(), {"tie_word_embeddings": True}),
        ("Mistral", LabelTokens(format=StepFormat(marker="~", marker_place="before_separator")), {}),
        ("Llama", Classifier(layers=1, format=StepFormat(marker=None)), {}),
    ],
    ids=["classifier", "tied", "tokens", "tied tokens", "marker before", "no marker"],
)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_token_classification_gives_the_scores_of_the_run(
    tmp_path: Path, kind: str, head: StepHeadConfig, settings: dict[str, Any], lora: bool
) -> None:
    from transformers import AutoModelForTokenClassification

    run = made(tmp_path, head, kind=kind, lora=lora, **settings)
    trained, expected = scores(str(run))
    assert max(expected) - min(expected) > 0.02, "scores that tell steps apart"
    out = export_model(run, tmp_path / "out", layout="token_classification")
    model, report = AutoModelForTokenClassification.from_pretrained(out, output_loading_info=True)
    assert not any(report.values())
    assert model.config.id2label == {0: "incorrect", 1: "correct"}
    assert not list(out.glob("*.py"))
    with torch.no_grad():
        assert from_logits(trained, lambda ids: model.eval()(ids).logits) == pytest.approx(expected, abs=1e-5)
    again, found = scores(str(out))
    assert found == pytest.approx(expected, abs=1e-5)
    assert (again.meaning, again.template) == (trained.meaning, trained.template)
    assert PRM(str(out), meaning="outcome").build(device="cpu").meaning == "outcome"


def test_three_classes_keep_what_a_neutral_step_counts_as(tmp_path: Path) -> None:
    run = made(tmp_path, Classifier(layers=1, classes=3, neutral="half", meaning="value"))
    out = export_model(run, tmp_path / "out", layout="token_classification")
    assert json.loads((out / "config.json").read_text())["id2label"]["1"] == "neutral"
    scorer, found = scores(str(out))
    assert found == pytest.approx(scores(str(run))[1], abs=1e-5)
    assert scorer.meaning == "value"


def test_qwen_layout_gives_the_scores_of_the_run(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    run = made(tmp_path, QWEN, kind="Qwen2", template=CHAT)
    trained, expected = scores(str(run))
    out = export_model(run, tmp_path / "out", layout="qwen_prm")
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForProcessRewardModel"]
    assert "auto_map" not in config
    assert not list(out.glob("*.py"))
    assert recognise(str(out)) == "qwen-prm"
    for path in (str(out), QwenPRM(str(out))):
        assert scores(path)[1] == pytest.approx(expected, abs=1e-5)

    from transformers import Qwen2Config, Qwen2Model

    weights = load_file(out / "model.safetensors")
    body = Qwen2Model(Qwen2Config.from_pretrained(out)).eval()
    body.load_state_dict({k.removeprefix("model."): v for k, v in weights.items() if k.startswith("model.")})
    score = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))
    score.load_state_dict({k.removeprefix("score."): v for k, v in weights.items() if k.startswith("score.")})
    with torch.no_grad():
        found = from_logits(trained, lambda ids: score(body(ids).last_hidden_state))
    assert found == pytest.approx(expected, abs=1e-5)


def test_the_card_of_the_published_model_lays_the_qwen_layout_out_alike(tmp_path: Path) -> None:
    """Without our own files beside the weights, steps without white space at their ends have the same scores."""
    run = made(tmp_path, QWEN, kind="Qwen2", template=CHAT)
    out = export_model(run, tmp_path / "out", layout="qwen_prm")
    for name in ("step_head.json", "prompt_template.json"):
        (out / name).unlink()
    bare = [Solutions(each.row, [[step.strip() for step in steps] for steps in each.solutions]) for each in PROBLEMS]
    found, expected = (load_scorer(str(path), device="cpu").score(bare) for path in (out, run))
    assert found[0][0] == pytest.approx(expected[0][0], abs=1e-5)
    assert found[1][0] == pytest.approx(expected[1][0], abs=1e-5)


@pytest.mark.parametrize(
    ("layout", "head", "settings", "message"),
    [
        ("token_classification", Classifier(), {}, "its head has two layers.*head.layers: 1, or take layout stepkd"),
        ("qwen_prm", QWEN, {"template": CHAT}, "it is a llama model, not qwen2"),
        ("qwen_prm", ONE_LAYER, {"kind": "Qwen2"}, "no two-layer Classifier of two classes; its steps end in '<extra_"),
        ("qwen_prm", LabelTokens(), {"kind": "Qwen2", "template": CHAT}, "its head is no two-layer Classifier"),
        ("qwen_prm", QWEN, {"kind": "Qwen2"}, "its prompt is not the chat template with the system message"),
        (
            "token_classification",
            LabelTokens(),
            {"kind": "Gemma2", "head_dim": 16},
            r"its logits are scaled or soft-capped \(final_",
        ),
        (
            "token_classification",
            ONE_LAYER,
            {"kind": "Granite"},
            "no token classification model of GraniteForCausalLM with a head named 'score'",
        ),
    ],
)
def test_what_a_layout_cannot_say_is_refused_with_the_reason(
    tmp_path: Path, layout: Any, head: StepHeadConfig, settings: dict[str, Any], message: str
) -> None:
    run = made(tmp_path, head, **settings)
    with pytest.raises(ConfigError, match=f"layout {layout}.*{message}"):
        export_model(run, tmp_path / "out", layout=layout)
    assert not (tmp_path / "out").exists()


def test_policies_and_adapters_have_no_such_layout(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the model is no reward model"):
        export_model("tiny-0.1m", tmp_path / "out", layout="token_classification")
    run = made(tmp_path, ONE_LAYER, lora=True)
    with pytest.raises(ConfigError, match="layout token_classification is of whole models: leave mode at merged"):
        export_model(run, tmp_path / "out", mode="adapter", layout="token_classification")


def test_training_on_such_an_export_is_refused(tmp_path: Path) -> None:
    run = made(tmp_path, ONE_LAYER)
    out = export_model(run, tmp_path / "out", layout="token_classification")
    with pytest.raises(ModelError, match="lacks weights that LlamaForCausalLM needs"):
        Policy.load(PolicyConfig(path=str(out)))


def test_an_export_is_known_by_its_configuration(tmp_path: Path) -> None:
    """Whatever names it: settings, a word, or a policy that cannot be one."""
    run = made(tmp_path, ONE_LAYER, tie_word_embeddings=True)
    expected = scores(str(run))[1]
    out = export_model(run, tmp_path / "model", layout="token_classification")
    for named in (PRM(str(out)), f"prm:{out}", str(out)):
        assert scores(named)[1] == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ModelError, match=r"a reward model in a layout for others, which only scores .*take the run"):
        export_model(out, tmp_path / "again")
    (out / "prompt_template.json").unlink()
    with pytest.raises(ConfigError, match="does not say which prompt template it was trained with"):
        scores(str(out))
    assert scores(PRM(str(out), template="task"))[1] == pytest.approx(expected, abs=1e-5)
    (out / "step_head.json").write_text(json.dumps(LabelTokens().to_dict()))
    with pytest.raises(ModelError, match=r"step_head\.json says LabelTokens"):
        scores(str(out))
    (out / "step_head.json").write_text("{")
    with pytest.raises(ModelError, match="cannot read the step head"):
        scores(str(out))
