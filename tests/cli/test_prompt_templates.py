"""A model is asked in the words it was trained with, by every command, unless a template is given."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from stepkd.cli import main
from stepkd.data.templates import PromptTemplate, get_template
from stepkd.models.source import TEMPLATE_NAME, trained_template
from stepkd.runs.job import read_settings

ROOT = Path(__file__).resolve().parents[2]
OWN = "style: plain\nplain: 'Q {prompt}'\nanswer_prefix: 'A '\n"


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def fit(rows: Path, out: Path, *extra: str) -> int:
    train = json.dumps({"source": "rows", "path": str(rows), "split": None, "options": {}})
    return main(
        [
            *("fit", "--config", str(ROOT / "recipes" / "tiny" / "sft.yaml"), "--out", str(out)),
            *("--data.train", train, "--data.validation", "null", "--data.global_batch_size", "8"),
            *("--model.policy.path", "tiny-0.1m", "--model.optimizer.lr", "0.01", "--trainer.max_steps", "80", *extra),
        ]
    )


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight sums that a tiny model learns by heart."""
    sums = [(f"{i}+{i + 7}=", str(2 * i + 7)) for i in range(8)]
    lines = [
        {"id": start, "prompt": f"{start}\n", "solution": f"{start}{end}\n#### {end}", "answer": end}
        for start, end in sums
    ]
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    return write(path, "".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def run(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was trained with ``template: task``."""
    out = tmp_path_factory.mktemp("runs") / "run"
    assert fit(rows, out) == 0
    return out


@pytest.fixture(scope="module")
def export(run: Path) -> Path:
    assert main(["export", str(run), "--to", str(run.parent / "export")]) == 0
    return run.parent / "export"


def evaluate(model: Path, rows: Path, out: Path, *extra: str) -> float:
    """Accuracy on the rows, asked as the benchmark ``rows`` (whose own template is ``gsm8k``)."""
    words = ["--model", str(model), "--benchmark", "rows", "--data", str(rows), "--sampling.max_new_tokens", "24"]
    assert main(["evaluate", *words, "--device", "cpu", "--out", str(out), *extra]) == 0
    return float(json.loads((out / "summary.json").read_text())["metrics"]["pass@1"]["value"])


@pytest.mark.parametrize("kind", ["run folder", "checkpoint", "lone checkpoint", "export", "export of the export"])
def test_a_trained_model_is_evaluated_under_its_own_template(
    run: Path, export: Path, rows: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    model = {"run folder": run, "checkpoint": run / "checkpoints" / "last.ckpt", "export": export}.get(kind)
    if model is None and kind == "lone checkpoint":
        model = tmp_path / "moved.ckpt"
        shutil.copy(run / "checkpoints" / "last.ckpt", model)
    elif model is None:
        model = tmp_path / "again"
        assert main(["export", str(export), "--to", str(model)]) == 0
    assert evaluate(model, rows, tmp_path / "own") == 1.0
    said = [record.message for record in caplog.records if "prompt template" in record.message]
    assert said == [f"prompt template: task, with which {model} was trained (the benchmark's own: --template gsm8k)"], (
        "said once"
    )
    assert read_settings(tmp_path / "own")["template"] == asdict(get_template("task"))


def test_a_template_that_is_asked_for_wins(run: Path, rows: Path, tmp_path: Path) -> None:
    assert evaluate(run, rows, tmp_path / "benchmark", "--template", "gsm8k") <= 0.125, "it knows one answer at most"
    own = write(tmp_path / "own.yaml", OWN)
    evaluate(run, rows, tmp_path / "file", "--template", str(own), "--limit", "1")
    assert "Q 0+7=\\nA " in (tmp_path / "file" / "results.jsonl").read_text()
    evaluate(run, rows, tmp_path / "changed", "--system", "Be brief.", "--limit", "1")
    changed = read_settings(tmp_path / "changed")["template"]
    assert changed == asdict(get_template("task")) | {"system": "Be brief."}, "a change to the run's own, not the other"


def test_labels_of_a_model_are_sampled_under_its_own_template(export: Path, rows: Path, tmp_path: Path) -> None:
    words = ["--solutions", "Sampled", "--solutions.problems", str(rows), "--solutions.model", str(export)]
    words += ["--solutions.sampling.n", "1", "--solutions.sampling.temperature", "0", "--labeller", "Outcome"]
    words += ["--solutions.sampling.max-new-tokens", "24", "--device", "cpu"]
    assert main(["label", *words, "--out", str(tmp_path / "labels")]) == 0
    assert json.loads((tmp_path / "labels" / "summary.json").read_text())["correct_answers"] == 8
    assert read_settings(tmp_path / "labels")["template"] == asdict(get_template("task"))


def test_training_goes_on_under_the_policys_own_template(
    export: Path, rows: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    short = ("--model.policy.path", str(export), "--trainer.max_steps", "1")
    assert fit(rows, tmp_path / "open", *short, "--data.template", "null") == 0
    assert trained_template(tmp_path / "open") == get_template("task")
    assert not [record for record in caplog.records if "prompt template" in record.message]
    assert fit(rows, tmp_path / "other", *short, "--data.template", "gsm8k", "--data.max_length", "200") == 0
    assert trained_template(tmp_path / "other") == get_template("gsm8k"), "a recipe's explicit template is kept"
    said = [record.message for record in caplog.records if "prompt template" in record.message]
    assert said == ["prompt template: data.template is gsm8k, which this run uses; the policy was trained with task"], (
        "one warning"
    )


def test_validation_of_a_checkpoint_takes_its_template(
    run: Path, rows: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = json.dumps({"source": "rows", "path": str(rows), "split": None, "options": {}})
    words = ["validate", "--config", str(ROOT / "recipes" / "tiny" / "sft.yaml"), "--model.policy.path", "tiny-0.1m"]
    words += ["--data.train", "null", "--data.validation", held_out, "--model.validation.sampling.max_new_tokens", "24"]
    words += ["--ckpt_path", str(run / "checkpoints" / "last.ckpt")]
    words += ["--data.max_length", "200"]
    assert main([*words, "--data.template", "null"]) == 0
    assert "val/accuracy 1\n" in capsys.readouterr().out
    assert not [record for record in caplog.records if "prompt template" in record.message]
    assert main([*words, "--data.template", "gsm8k"]) == 0
    assert [record for record in caplog.records if "the policy was trained with task" in record.message]


@pytest.mark.parametrize(("given", "warned"), [(None, True), ("task", False), ("gsm8k", False)])
def test_a_teacher_that_reads_other_prompts_than_it_was_trained_on_is_named(
    export: Path, rows: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, given: str | None, warned: bool
) -> None:
    recipe = ROOT / "recipes" / "tiny" / "gkd.yaml"
    words = ["fit", "--config", str(recipe), "--trainer.max_steps", "1", "--model.source.lmbda", "0"]
    words += ["--data.train", json.dumps({"source": "rows", "path": str(rows), "split": None, "options": {}})]
    words += ["--data.validation", "null", "--data.template", "plain", "--model.policy.path", "tiny-0.1m"]
    words += ["--model.teacher.path", str(export)]
    words += [] if given is None else ["--model.teacher.template", given]
    assert main([*words, "--data.global_batch_size", "2", "--out", str(tmp_path / "run")]) == 0
    said = [record.message for record in caplog.records if "prompt template: the teacher" in record.message]
    assert said == [
        "prompt template: the teacher reads the student's prompts (plain); it was trained with task, which "
        "teacher.template gives it"
    ] * int(warned)


def test_a_yaml_file_is_a_template_in_recipes_and_is_kept_with_the_run(rows: Path, tmp_path: Path) -> None:
    own = write(tmp_path / "own.yaml", OWN)
    assert fit(rows, tmp_path / "run", "--trainer.max_steps", "1", "--data.template", str(own)) == 0
    own.unlink()
    expected = PromptTemplate(style="plain", plain="Q {prompt}", answer_prefix="A ")
    assert trained_template(tmp_path / "run") == expected
    assert json.loads((tmp_path / "run" / TEMPLATE_NAME).read_text()) == asdict(expected), "for people to read"
    section = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["stepkd"]
    assert section["template"] == asdict(expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sytem: x\n", "'sytem' is not a setting; did you mean 'system'"),
        ("plain: Question\n", "plain of a prompt template must hold {prompt} once"),
        ("style: [plain]\n", "style"),
        ("few_shot: many\n", "few_shot"),
        ("", "no prompt template"),
        ("- plain\n", "no prompt template"),
        ("plain: {prompt\n", "not valid YAML"),
    ],
)
def test_a_template_file_with_a_mistake_is_named_with_its_key(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    file = write(tmp_path / "own.yaml", text)
    words: dict[str, list[str]] = {
        "evaluate": ["--model", "tiny-0.1m", "--benchmark", "rows", "--data", str(rows)],
        "label": ["--solutions", "Existing", "--solutions.completions", str(rows), "--solutions.model", "tiny-0.1m"],
    }
    for command, given in words.items():
        assert main([command, *given, "--template", str(file), "--out", str(tmp_path / "out")]) == 2
        shown = capsys.readouterr().err
        assert str(file) in shown
        assert message in shown
    assert fit(rows, tmp_path / "run", "--data.template", str(file)) == 2
    shown = capsys.readouterr().err
    assert str(file) in shown
    assert message in shown


def test_a_template_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words: list[Any] = ["evaluate", "--model", "tiny-0.1m", "--template", tmp_path / "absent.yaml", "--out", tmp_path]
    assert main([str(word) for word in words]) == 2
    assert "absent.yaml: cannot read the prompt template" in capsys.readouterr().err


def test_what_is_logged_is_a_name_or_the_settings(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    from stepkd.models.source import save_template, template_for

    save_template(PromptTemplate(style="plain", plain="Q {prompt}"), tmp_path)
    with caplog.at_level(logging.WARNING):
        assert template_for(tmp_path, "math").plain == "Q {prompt}"
        assert template_for(tmp_path / "nothing here", "math") == get_template("math")
    assert len(caplog.records) == 1
    assert '{"style": "plain", "plain": "Q {prompt}"}, with which' in caplog.records[0].message
