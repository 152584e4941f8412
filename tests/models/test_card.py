"""An export's model card: what the run's files say, and nothing that somebody could smuggle into it or lose by it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from stepkd.data.templates import get_template
from stepkd.models import Classifier, LoRAConfig, PolicyConfig
from stepkd.models.checkpoint import export_model, load_trained, weights_fingerprint
from stepkd.models.policy import Policy

TOKEN, SECRET = "hf_" + "A1b2C3d4E5" * 3, "long-enough-password"
HOSTILE = '<script>alert(1)</script>|`x`](javascript:y) "\u202e---'


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


def interval(value: float) -> dict[str, Any]:
    return {"value": value, "low": value - 0.1, "high": value + 0.1, "method": "bootstrap"}


def made(folder: Path, *, head: Any = None, lora: bool = False, data: dict[str, Any] | None = None) -> Path:
    """A finished run on a base with a licence."""
    spec = PolicyConfig(path=str(folder), lora=LoRAConfig(r=2) if lora else None)
    policy = Policy.load(spec)
    if head is not None:
        policy.attach_step_head(head)
    section: dict[str, Any] = {"format": 2, "policy": asdict(spec), "module": "stepkd.modules.kto.StepKTOModule"}
    section["template"] = asdict(get_template("task"))
    if head is not None:
        section["step_head"] = head.to_dict()
    weights = {f"policy.{name}": each.detach() for name, each in policy.trainable_parameters()}
    run = folder.parent / "runs" / "kto"
    (run / "checkpoints").mkdir(parents=True)
    torch.save({"state_dict": weights, "global_step": 60, "stepkd": section}, run / "checkpoints" / "last.ckpt")
    train = data or {"source": "rows", "path": str(folder.parent / "private" / "labels.jsonl"), "split": "train"}
    write(run / "config.yaml", yaml.safe_dump({"data": {"init_args": {"train": train}}}))
    command = f"stepkd fit --config recipes/tiny/step_kto.yaml --config=my/own.yaml --out {run}"
    write(run / "run.json", {"kind": "fit", "stepkd": "0.2.0", "command": command, "host": "secret-host"})
    write(run / "metrics.jsonl", '{"run": 1, "step": 59, "val/loss": 0.25, "val/accuracy": 0.75}\n{"torn')
    write(folder / "README.md", "---\nlicense: apache-2.0\nbase_model: org/base\n---\n# Base\n")
    return run


def card(run: Path, out: Path, **settings: Any) -> tuple[dict[str, Any], str]:
    """Front matter and text of an export's card."""
    text = (export_model(run, out, **settings) / "README.md").read_text(encoding="utf-8")
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def test_it_says_what_the_run_was(folder: Path, tmp_path: Path) -> None:
    run = made(folder)
    front, body = card(run, tmp_path / "out")
    assert front == {
        "library_name": "transformers",
        "tags": ["stepkd"],
        "license": "apache-2.0",
        "base_model": "org/base",
    }
    assert "Trained by **StepKTO** (recipe step_kto, own) with stepkd, 60 optimiser steps." in body
    for line in (
        "| base model | model, of org/base |",
        "| licence of the base | apache-2.0 |",
        "| training data | rows, labels.jsonl, train |",
        "| prompt template | task |",
    ):
        assert line in body
    assert "Last validation during training, without intervals: loss 0.25, accuracy 0.75." in body
    assert "No evaluation of these weights lies in the run or beside it" in body
    assert "stepkd 0.2.0, torch " in body
    assert str(tmp_path) not in body
    assert "secret-host" not in body


def test_metrics_are_those_of_evaluations_of_the_same_weights(folder: Path, tmp_path: Path) -> None:
    run = made(folder)
    own = weights_fingerprint(load_trained(run))
    metrics = {"pass@1": interval(0.5), "mean_tokens": interval(20), "correct_with_incorrect_step": interval(0.75)}
    metrics["step_accuracy"] = {"value": None, "low": None, "high": None}  # no step was labelled
    for name, weights in (("eval", own), ("other", "0" * 16)):
        write(run.parent / name / "settings.json", {"model": {"weights": weights}, "benchmark": {"name": name}})
        write(run.parent / name / "summary.json", {"metrics": metrics})
    sets = {"math": {"fixed": {"f1": interval(0.25)}, "baselines": {"random": {"f1": interval(0.9)}}}}
    write(run / "judged" / "settings.json", {"scorer": {"weights": own}})
    write(run / "judged" / "summary.json", {"sets": sets})
    write(run.parent / "torn" / "settings.json", "{")
    write(run.parent / "torn" / "summary.json", {})
    _, body = card(run, tmp_path / "out")
    rows = [line for line in body.splitlines() if " to 0." in line]
    assert rows == [
        "| eval | pass@1 | 0.500 | 0.400 to 0.600 |",
        "| eval | correct_with_incorrect_step | 0.750 | 0.650 to 0.850 |",
        "| math | f1 | 0.250 | 0.150 to 0.350 |",
    ]


def test_data_of_a_module_of_ones_own(folder: Path, tmp_path: Path) -> None:
    run = made(folder, data="/home/ann/rows.jsonl")  # type: ignore[arg-type]
    assert "| training data | rows.jsonl |" in card(run, tmp_path / "out")[1]


def test_hostile_names_are_text(folder: Path, tmp_path: Path) -> None:
    run = made(folder, data={"source": "rows", "hub": HOSTILE, "options": {HOSTILE: HOSTILE}})
    write(folder / "README.md", yaml.safe_dump({"license": HOSTILE}, explicit_start=True) + "---\n")
    front, body = card(run, tmp_path / "<img src=x onerror=alert(1)>`|v1.5")
    assert not any(sign in body.replace("```", "") for sign in ("<", ">", "`|", "](", "\u202e"))
    assert "# &#60;img src=x onerror=alert(1)&#62;&#96;&#124;v1.5\n" in body
    assert len([line for line in body.splitlines() if line.startswith("| training data |")]) == 1
    assert "\u202e" not in front["license"]
    assert "\n" not in front["license"]


def test_no_credential_and_no_folder_of_this_machine(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_API_KEY", SECRET)
    options = {
        "a": TOKEN,
        "b": SECRET,
        "c": "https://ann:pass-word@example.org/x",
        "d": "/home/ann/data/x.jsonl",
        "e": "~/y",
    }
    run = made(folder, data={"source": "rows", "path": "/home/ann/z.jsonl", "options": options})
    write(folder / "README.md", f"---\nlicense: {TOKEN}\nbase_model: {SECRET}\n---\n")
    front, body = card(run, tmp_path / "out")
    text = json.dumps(front) + body
    for secret in (TOKEN, SECRET, "pass-word", "/home", "ann", "~/", str(tmp_path)):
        assert secret not in text
    assert "z.jsonl" in body
    assert "x.jsonl" in body


@pytest.mark.parametrize(
    ("settings", "loads", "not_loads"),
    [
        ({}, ["stepkd.load_scorer"], ["AutoModel", "load_policy"]),
        (
            {"layout": "token_classification"},
            ["stepkd.load_scorer", "AutoModelForTokenClassification"],
            ["load_policy"],
        ),
    ],
)
def test_a_reward_model_says_how_it_is_loaded(
    folder: Path, tmp_path: Path, settings: dict[str, Any], loads: list[str], not_loads: list[str]
) -> None:
    front, body = card(made(folder, head=Classifier(layers=1, meaning="value")), tmp_path / "out", **settings)
    assert front["tags"] == ["stepkd", "reward-model"]
    assert "A process reward model: it scores every step of a solution (value)." in body
    assert "| step format | marker '&#126;', separator '&#92;n', marker_place 'step_end', tokenize 'whole' |" in body
    assert all(each in body for each in loads)
    assert not any(each in body for each in not_loads)


def test_an_adapter_says_how_it_is_loaded(folder: Path, tmp_path: Path) -> None:
    _, body = card(made(folder, lora=True), tmp_path / "out", mode="adapter")
    assert "peft.AutoPeftModelForCausalLM" in body
    assert "transformers.AutoModel" not in body


def test_a_model_without_a_run_has_a_card(tmp_path: Path) -> None:
    front, body = card(Path("tiny-0.1m"), tmp_path / "out")
    assert front == {"library_name": "transformers", "tags": ["stepkd"]}
    assert "| base model | tiny-0.1m, random weights of stepkd |" in body
    assert "a method that its files do not name" in body
