"""QLoRA on a CPU, where bitsandbytes has kernels for it: a step, resuming, and the merged export."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from stepkd.models.load import load_model
from stepkd.models.spec import LoRAConfig, PolicyConfig, tiny_config, tiny_tokenizer
from stepkd.runs.logger import read_metrics
from stepkd.training.fit import run

LORA = {"r": 4, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights, in shapes that 4-bit blocks fit."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("base")
    tokenizer = tiny_tokenizer()
    config = tiny_config("tiny-0.1m", tokenizer)
    config.intermediate_size = 192
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def dequantised(base: Path, folder: Path) -> Path:
    """The same model with the weights that nf4 stands for."""
    import bitsandbytes as bnb
    from transformers import AutoModelForCausalLM

    quantised, tokenizer = load_model(
        PolicyConfig(path=str(base), dtype="float32", lora=LoRAConfig(), quantization="nf4")
    )
    plain = AutoModelForCausalLM.from_pretrained(base)
    layers = {name: layer for name, layer in quantised.get_base_model().named_modules() if hasattr(layer, "base_layer")}
    assert layers
    with torch.no_grad():
        for name, layer in layers.items():
            weight = layer.base_layer.weight
            assert isinstance(weight, bnb.nn.Params4bit)
            plain.get_submodule(name).weight.copy_(bnb.functional.dequantize_4bit(weight.data, weight.quant_state))
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def fit(folder: Path, name: str, base: Path, repo_root: Path, *extra: str, quantization: str = "nf4") -> Path:
    policy = {"path": str(base), "dtype": "float32", "quantization": quantization, "lora": LORA}
    optimizer = {"lr": 1e-2, "warmup": 0, "schedule": "constant"}
    data = {"train": {"options": {"n": 20}}, "validation": {"options": {"n": 4}}, "global_batch_size": 5}
    overlay: dict[str, Any] = {
        "trainer": {"max_steps": 4, "val_check_interval": 1, "check_val_every_n_epoch": None},
        "checkpoint": {"every_n_steps": 100, "monitor": "val/loss", "mode": "min"},
        "model": {"init_args": {"policy": policy, "optimizer": optimizer, "validation": {"sampling": None}}},
        "data": {"init_args": data},
    }
    (folder / "overlay.yaml").write_text(yaml.safe_dump(copy.deepcopy(overlay)))
    configs = ["--config", str(repo_root / "recipes/tiny/sft.yaml"), "--config", str(folder / "overlay.yaml")]
    assert run(["fit", *configs, "--out", str(folder / name), *extra]) == 0
    return folder / name


def series(run_folder: Path, name: str) -> list[float]:
    return [row[name] for row in read_metrics(run_folder) if name in row]


@pytest.mark.slow
def test_qlora_trains_resumes_and_exports(base: Path, tmp_path: Path, repo_root: Path) -> None:
    """Gradients are those of LoRA on the weights that nf4 stands for, also after a validation."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM

    from stepkd.cli import main

    whole = fit(tmp_path, "whole", base, repo_root)
    plain = fit(tmp_path, "plain", dequantised(base, tmp_path / "dense"), repo_root, quantization="none")
    for name in ("train/loss", "train/grad_norm", "val/loss"):
        assert len(series(plain, name)) == 4
        assert series(whole, name) == pytest.approx(series(plain, name), rel=2e-3), name
    fit(tmp_path, "parts", base, repo_root, "--trainer.max_steps", "2")
    parts = fit(tmp_path, "parts", base, repo_root, "--resume")
    ours, theirs = (
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for folder in (parts, whole)
    )
    assert all("lora_" in name and value.dtype == torch.float32 for name, value in ours.items())
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert main(["export", str(whole), "--to", str(tmp_path / "merged")]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    before = AutoModelForCausalLM.from_pretrained(base)
    changed = {name for name, value in merged.named_parameters() if not value.equal(before.get_parameter(name))}
    assert len(changed) == 2 * len(LORA["target_modules"]), "two layers, merged into plain weights"
    assert not hasattr(merged.config, "quantization_config")
