"""Exports load in plain transformers and peft, with the logits they had."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stepkd.data.templates import PromptTemplate
from stepkd.errors import ConfigError, MachineError, ModelError
from stepkd.models import checkpoint as checkpoint_module
from stepkd.models.checkpoint import export_model, load_trained, save_policy
from stepkd.models.policy import Policy
from stepkd.models.source import trained_template
from stepkd.models.spec import LoRAConfig, PolicyConfig, build_tiny

IDS = torch.tensor([[5, 17, 33, 8, 60, 4]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def checkpoint(spec: PolicyConfig, file: Path) -> tuple[Path, torch.Tensor]:
    """A checkpoint of a policy that moved away from its start; and its logits."""
    policy, generator = Policy.load(spec), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in policy.trainable_parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    extra: dict[str, Any] = {"format": 2, "policy": asdict(spec), "position": {}, "seed": 0}
    weights = {name: p.detach() for name, p in policy.trainable_parameters()}
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": {f"policy.{name}": value for name, value in weights.items()}, "stepkd": extra}, file)
    return file, logits(policy.model)


def plain(path: Path) -> Any:
    model, report = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model.eval()


def hidden_files(path: Path) -> list[str]:
    return [file.name for file in path.iterdir() if file.name.startswith(".")]


def test_full_training_exports_the_same_logits(folder: Path, tmp_path: Path) -> None:
    _, expected = checkpoint(PolicyConfig(path=str(folder)), tmp_path / "run" / "checkpoints" / "best.ckpt")
    out = export_model(tmp_path / "run", tmp_path / "deep" / "out")
    assert out == tmp_path / "deep" / "out"
    assert torch.equal(logits(plain(out)), expected)
    assert not list(out.glob("*.bin"))
    tokenizer = AutoTokenizer.from_pretrained(out)
    original = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == original.chat_template
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<pad>", "<eos>")
    assert tokenizer("3+4=\n").input_ids == original("3+4=\n").input_ids
    assert hidden_files(out.parent) == []
    assert torch.equal(logits(Policy.load(PolicyConfig(path=str(out))).model), expected)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "lora",
    [
        LoRAConfig(r=4),
        LoRAConfig(r=4, target_modules=["q_proj", "lm_head"]),
        LoRAConfig(r=4, modules_to_save=["lm_head"]),
        LoRAConfig(r=4, target_modules=["embed_tokens", "v_proj"]),
        LoRAConfig(r=4, modules_to_save=["embed_tokens", "lm_head"]),
    ],
    ids=["layers", "head", "saved-head", "embeddings", "saved-both"],
)
def test_merged_adapters_give_the_same_logits(folder: Path, tmp_path: Path, lora: LoRAConfig, tied: bool) -> None:
    if not tied:
        untie(folder)
    file, expected = checkpoint(PolicyConfig(path=str(folder), lora=lora), tmp_path / "x.ckpt")
    out = export_model(file, tmp_path / "out")
    assert not (out / "adapter_config.json").exists()
    found = logits(plain(out))
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is (tied and lora == LoRAConfig(r=4))
    base = logits(plain(folder))
    assert (base - expected).norm() > 1e-2 * expected.norm()


def untie(folder: Path) -> None:
    model = plain(folder)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().roll(1, 0))
    model.save_pretrained(folder)
    again = plain(folder)
    assert not torch.equal(again.lm_head.weight, again.get_input_embeddings().weight)


def test_adapter_export_loads_with_peft(folder: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    file, expected = checkpoint(PolicyConfig(path=str(folder), lora=LoRAConfig(r=4)), tmp_path / "x.ckpt")
    out = export_model(file, tmp_path / "out", mode="adapter")
    assert not (out / "model.safetensors").exists()
    assert torch.equal(logits(PeftModel.from_pretrained(plain(folder), out).eval()), expected)
    assert AutoTokenizer.from_pretrained(out).chat_template
    # An adapter folder is itself something to export: merged, or again alone.
    assert torch.allclose(logits(plain(export_model(out, tmp_path / "merged"))), expected, atol=1e-5)
    again = export_model(out, tmp_path / "again", mode="adapter")
    assert torch.equal(logits(Policy.load(PolicyConfig(path=str(again))).model), expected)


def test_adapters_on_random_weights_need_merging(tmp_path: Path) -> None:
    spec = PolicyConfig(path="tiny-0.1m", init_seed=5, lora=LoRAConfig(r=4))
    file, expected = checkpoint(spec, tmp_path / "x.ckpt")
    with pytest.raises(
        ConfigError, match=r"tiny-0\.1m \(random weights, or a run\) cannot name its base model: use mode merged"
    ):
        export_model(file, tmp_path / "out", mode="adapter")
    assert torch.allclose(logits(plain(export_model(file, tmp_path / "out"))), expected, atol=1e-5)


def test_quantised_training_is_merged_into_the_plain_base(folder: Path, tmp_path: Path) -> None:
    file, expected = checkpoint(PolicyConfig(path=str(folder), lora=LoRAConfig(r=4)), tmp_path / "x.ckpt")
    content = torch.load(file)
    content["stepkd"]["policy"]["quantization"] = "nf4"
    torch.save(content, file)
    out = export_model(file, tmp_path / "out")
    assert torch.allclose(logits(plain(out)), expected, atol=1e-5)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())


def test_dtype_of_the_export(folder: Path, tmp_path: Path) -> None:
    out = export_model(folder, tmp_path / "out", dtype="bfloat16")
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert plain(out).dtype == torch.bfloat16


def test_settings_that_contradict(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no adapter to write: the model was trained in full"):
        export_model(folder, tmp_path / "out", mode="adapter")
    with pytest.raises(ModelError, match="no model folder at"):
        export_model(tmp_path / "absent", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_existing_folders(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_model("tiny-0.1m", out)
    before = logits(plain(out))
    with pytest.raises(ConfigError, match=f"{out} already exists: give another folder, or set overwrite"):
        export_model(folder, out)
    assert torch.equal(logits(plain(out)), before)
    (out / "stale.safetensors").write_bytes(b"")
    export_model(folder, out, overwrite=True)
    assert torch.equal(logits(plain(out)), logits(plain(folder)))
    assert not (out / "stale.safetensors").exists()
    assert hidden_files(tmp_path) == []
    empty = tmp_path / "empty"
    empty.mkdir()
    export_model(folder, empty, overwrite=True)
    export_model(folder, folder, overwrite=True)  # onto itself
    assert torch.equal(logits(plain(folder)), logits(plain(out)))


def test_overwrite_replaces_nothing_but_models(folder: Path, tmp_path: Path) -> None:
    precious = tmp_path / "home"
    (precious / "checkpoints").mkdir(parents=True)
    (precious / "checkpoints" / "best.ckpt").write_bytes(b"weeks of work")
    for out in (precious, precious / "checkpoints" / "best.ckpt"):
        with pytest.raises(ConfigError, match="is not a model folder, so overwrite does not replace it"):
            export_model(folder, out, overwrite=True)
    assert (precious / "checkpoints" / "best.ckpt").read_bytes() == b"weeks of work"


@pytest.mark.parametrize("stage", ["save_policy", "_put_in_place"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_export_leaves_what_was_there(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, error: Any
) -> None:
    old = export_model("tiny-0.1m", tmp_path / "old")
    before = logits(plain(old))

    def cut(policy: Any, out: Path, **settings: Any) -> None:
        if stage == "save_policy":
            save_policy(policy, out, **settings)  # everything written, but not in place
        raise error

    monkeypatch.setattr(checkpoint_module, stage, cut)
    expected, message = (
        (KeyboardInterrupt, None) if error is KeyboardInterrupt else (MachineError, "No space left on dev")
    )
    for out, overwrite in ((tmp_path / "new", False), (old, True)):
        with pytest.raises(expected, match=message):
            export_model(folder, out, overwrite=overwrite)
    assert not (tmp_path / "new").exists()
    assert hidden_files(tmp_path) == []
    assert torch.equal(logits(plain(old)), before)


def test_a_failed_rename_puts_the_old_folder_back(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = export_model("tiny-0.1m", tmp_path / "old")
    before, rename = logits(plain(old)), Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name.endswith(".tmp"):
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(MachineError, match=r"cannot write .*old: Input/output error\. Nothing was left there"):
        export_model(folder, old, overwrite=True)
    assert torch.equal(logits(plain(old)), before)
    assert hidden_files(tmp_path) == []


def test_a_target_that_cannot_be_made(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match=r"cannot write .*file/out"):
        export_model(folder, tmp_path / "file" / "out")


def test_a_policy_in_memory(tmp_path: Path) -> None:
    model, tokenizer = build_tiny("tiny-0.1m", seed=9)
    expected = logits(model)
    save_policy(Policy(model, tokenizer), tmp_path / "out")
    assert torch.equal(logits(plain(tmp_path / "out")), expected)


@pytest.mark.parametrize("mode", ["merged", "adapter"])
def test_an_export_says_the_prompt_template_of_its_run(folder: Path, tmp_path: Path, mode: Any) -> None:
    own = PromptTemplate(style="chat", system="Be brief.", few_shot=1)
    file, _ = checkpoint(PolicyConfig(path=str(folder), lora=LoRAConfig(r=2)), tmp_path / "run" / "last.ckpt")
    content = torch.load(file, weights_only=True)
    content["stepkd"]["template"] = asdict(own)
    torch.save(content, file)
    out = export_model(tmp_path / "run", tmp_path / "out", mode=mode)
    assert trained_template(out) == own
    assert json.loads((out / "prompt_template.json").read_text())["system"] == "Be brief."


HEAD_OF_0_1 = """{
  "kind": "label_tokens",
  "format": {"marker": "~", "separator": "\\n", "marker_place": "step_end", "tokenize": "whole"},
  "labels": ["-", "+"],
  "restricted": true,
  "classes": 2,
  "layers": 2,
  "neutral": "right",
  "meaning": "correctness"
}
"""
TEMPLATE_OF_0_1 = """{
  "style": "plain", "system": null, "user": "{prompt}", "plain": "{prompt}", "few_shot": 0,
  "answer_line": "#### {answer}", "separator": "\\n\\n", "answer_prefix": "", "chat_kwargs": {}
}
"""


def test_exports_of_version_0_1_still_load(folder: Path) -> None:
    """Its files as it wrote them, beside a plain model folder."""
    plain_logits = logits(load_trained(folder).model)
    (folder / "step_head.json").write_text(HEAD_OF_0_1)
    (folder / "prompt_template.json").write_text(TEMPLATE_OF_0_1)
    policy = load_trained(folder)
    assert torch.equal(logits(policy.model), plain_logits)
    head = policy.require_step_head().spec
    assert (head.kind, head.format.marker, head.format.tokenize) == ("label_tokens", "~", "whole")
    assert trained_template(folder) == PromptTemplate(style="plain", separator="\n\n", few_shot=0)
