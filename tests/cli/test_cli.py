"""The command line: help, suggestions, and a message instead of a traceback."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import forked
import pytest
import torch
import yaml

from stepkd import yaml_files
from stepkd.cli import COMMANDS, TRAINER_COMMANDS, main
from stepkd.errors import ConfigError
from stepkd.settings import with_recipe_files

ROOT = Path(__file__).resolve().parents[2]
RECIPE = str(ROOT / "recipes" / "tiny" / "sft.yaml")
GRPO = str(ROOT / "recipes" / "tiny" / "grpo.yaml")


def test_overview_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(command in text for command in {**COMMANDS, **TRAINER_COMMANDS})
    assert main([]) == 2


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    import stepkd

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"stepkd {stepkd.__version__}\n"


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help_of_every_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert f"stepkd {command}" in text
    assert len(text.splitlines()) > 8


def test_recipes_that_the_commands_texts_name_exist() -> None:
    for command in COMMANDS:
        text = import_module(f"stepkd.cli.{command.replace('-', '_')}").__doc__ or ""
        for name in re.findall(r"--config ([\w/.-]+)", text):
            if not name.endswith(".yaml"):
                with_recipe_files(["--config", name])


def test_help_of_fit_tells_what_every_setting_and_data_module_is(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--help"], ["--model.help", "SFTModule"], ["--data.help", "StepData"]):
        with pytest.raises(SystemExit) as caught:
            main(["fit", *words])
        assert not caught.value.code
    shown, errors = capsys.readouterr()
    assert not errors
    text = " ".join(shown.split())
    assert "A run folder, a model folder, a hub id (``org/name``)" in text, "a field's docstring"
    assert "written every so many optimiser steps" in text
    assert "stepkd.StepData" in text
    assert "--data.labels" in text
    for option in ("--config", "--resume", "--overwrite", "--checkpoint.every_n_steps", "--trainer.help"):
        assert option in shown
    assert "--trainer.max_steps" not in shown


@pytest.mark.parametrize(
    ("words", "shown", "not_shown"),
    [
        (["--trainer.help"], "--trainer.max_steps", "--checkpoint"),
        (["--model", "KDRLModule", "--model.policy_loss.help"], "--model.policy_loss.clip_low", "--model.policy.path"),
        (["--config", GRPO, "--model.policy_loss.help"], "--model.policy_loss.clip_low", "--model.policy.path"),
        (["--checkpoint.help"], "--checkpoint.monitor", "--out"),
    ],
)
def test_help_of_fit_shows_a_part(
    words: list[str], shown: str, not_shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["fit", *words])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert shown in text
    assert not_shown not in text


def test_help_of_no_part_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--model", "KDRLModule", "--model.policy_los.help"]) == 2
    assert "did you mean --model.policy_loss?" in capsys.readouterr().err
    assert main(["fit", "--model.help", "Nope"]) == 2
    assert "model: no class 'Nope'; known are " in capsys.readouterr().err
    assert main(["fit", "--model.help", "SFTModul"]) == 2
    assert "did you mean 'SFTModule'?" in capsys.readouterr().err
    assert main(["fit", "--config", RECIPE, "--model.policy_loss.help"]) == 2
    assert "'policy_loss' is not a setting of model; name a class that has it: --model KDRL" in capsys.readouterr().err


def test_an_unknown_command_suggests_the_correct_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evalute"]) == 2
    assert "Did you mean 'evaluate'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--trainer.max_stepz 3", "'max_stepz' is not a setting of trainer; did you mean --trainer.max_steps?"),
        ("--model.init_args.polcy.path x", "'polcy' is not a setting of model; did you mean --model.policy?"),
        ("--model.policy.pth x", "'pth' is not a setting of model.policy; did you mean --model.policy.path?"),
        (
            "--model.policy.lora {rank: 8}",
            "'rank' is not a setting of model.policy.lora; did you mean --model.policy.lora.r?",
        ),
        (
            "--model.init_args.optimizer.learning_rate 1e-4",
            "'learning_rate' is not a setting of model.optimizer; did you mean --model.optimizer.lr?",
        ),
        ("--lr=1e-4", "'lr' is not a setting; did you mean --model.optimizer.lr?"),
        ("--optimizer.lr 1e-4", "'optimizer' is not a setting; did you mean --model.optimizer.lr?"),
        ("--model.lr 1e-4", "'lr' is not a setting of model; did you mean --model.optimizer.lr?"),
        ("--epochs 3", "'epochs' is not a setting; did you mean --trainer.max_epochs?"),
        ("--path x", "'path' is not a setting; did you mean --model.policy.path or --data.train.path?"),
        ("--model.max_length 9", "'max_length' is not a setting of model; did you mean --data.max_length?"),
        (
            "--data.globl_batch_size 3",
            "'globl_batch_size' is not a setting of data; did you mean --data.global_batch_size?",
        ),
        ("--data.batch_size 3", "'batch_size' is not a setting of data; did you mean --data.global_batch_size?"),
        (
            "--data.init_args.template.systm x",
            "'systm' is not a setting of data.template; did you mean --data.template.system?",
        ),
        (
            "--checkpoint.every_n_step 3",
            "'every_n_step' is not a setting of checkpoint; did you mean --checkpoint.every_n_steps?",
        ),
        ("--conf x.yaml", "'conf' is not a setting; did you mean --config?"),
        (
            "--model.policy_loss 8",
            "'policy_loss' is not a setting of model; name a class that has it: --model KDRLModule --model.policy_",
        ),
        ("--model SFTModul", "model: no class 'SFTModul'; did you mean 'SFTModule'?"),
        ("--data StepDta", "data: no class 'StepDta'; did you mean 'StepData'?"),
        ("--model.init_args.optimizer.lr fast", "model.optimizer.lr: expected float, got 'fast'"),
        ("--model.policy.dtype float33", "model.policy.dtype: expected one of ['float32', 'bfloat16', "),
        ("--model.validation 7", "model.validation: expected {sampling, "),
    ],
)
def test_a_mistake_in_a_setting_is_one_line_about_it(
    arguments: str, expected: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    flag, _, value = arguments.partition(" ")
    assert main(["fit", "--config", RECIPE, "--out", str(tmp_path / "run"), *filter(None, (flag, value))]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"stepkd fit: {expected}")
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model.init_args.rewards", "my_rewards:close"], "model.rewards: expected a list of {name, weight, options"),
        (["--model.rewards", "[{nme: x}]"], "'nme' is not a setting of model.rewards[0]; did you mean 'name'?"),
        (["--model.rewards", "[{name: length}, 3]"], "model.rewards: expected a list of {name, weight, options"),
        (["--model.rewards", "[{name: a, weight: b}]"], "model.rewards[0].weight: expected float, got 'b'"),
        (["--model.policy_los.clip", "4"], "'policy_los' is not a setting of model; did you mean --model.policy_loss?"),
        (
            ["--model.rollout.samplng.n", "4"],
            "'samplng' is not a setting of model.rollout; did you mean --model.rollout.sampling?",
        ),
    ],
)
def test_settings_are_those_of_the_recipes_own_module(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", "--config", GRPO, *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"stepkd fit: {expected}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: {init_args: {policy: {pth: x}}}", "'pth' is not a setting of model.policy; did you mean 'path'?"),
        ("model: {init_args: {optimizer: {learning_rate: 1}}}", "'learning_rate' is not a setting of model.optimizer"),
        ("modle: {init_args: {policy: {path: x}}}", "'modle' is not a setting; did you mean 'model'?"),
        ("trainer: {max_step: 3}", "'max_step' is not a setting of trainer; did you mean 'max_steps'?"),
        ("data: {init_args: {train: {pth: x}}}", "'pth' is not a setting of data.train; did you mean 'path'?"),
    ],
)
def test_a_mistake_in_a_recipe_names_the_file(
    text: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(f"{text}\n")
    assert main(["fit", "--config", RECIPE, "--config", str(overlay), "--out", str(tmp_path / "run")]) == 2
    assert f"{overlay}: {expected}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_module_of_ones_own_has_its_settings_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "from stepkd.modules import SFTModule\nclass Mine(SFTModule):\n"
    code += "    def __init__(self, sharpness: float = 1.0, **settings):\n        super().__init__(**settings)\n"
    (tmp_path / "own_module_of_a_test.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    words = ["fit", "--config", RECIPE, "--model", "own_module_of_a_test.Mine"]
    assert main([*words, "--model.sharpnes", "2"]) == 2
    assert "'sharpnes' is not a setting of model; did you mean --model.sharpness?" in capsys.readouterr().err
    assert main([*words, "--model.sharpness", "big"]) == 2
    assert "model.sharpness: expected float, got 'big'" in capsys.readouterr().err


def test_help_and_version_go_with_safe(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stepkd.safe.enter", lambda: None)
    for words, expected in ((["--safe", "--help"], "usage: stepkd COMMAND"), (["--safe", "--version"], "stepkd ")):
        assert main(words) == 0
        assert expected in capsys.readouterr().out


def test_other_commands_suggest_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--benchmrk", "gsm8k"]) == 2
    assert capsys.readouterr().err == "stepkd evaluate: 'benchmrk' is not a setting; did you mean --benchmark?\n"
    assert main(["doctor", "--config", RECIPE]) == 2
    assert f"{RECIPE} is a training recipe: give it as --recipe" in capsys.readouterr().err


def test_print_config_is_a_recipe_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def printed(recipe: str) -> str:
        with pytest.raises(SystemExit) as caught:
            main(["fit", "--print_config", "--config", recipe])
        assert not caught.value.code
        return capsys.readouterr().out

    first = printed(RECIPE)
    assert "max_steps: 800" in first
    full = tmp_path / "full.yaml"
    full.write_text(first)
    assert printed(str(full)) == first


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--trainer.gradient_clip_val", "1.0"], "set model.init_args.optimizer.max_grad_norm"),
        (["--trainer.accumulate_grad_batches", "4"], "one batch is one optimiser step"),
        (["--trainer.max_steps", "-1"], "the run has no end"),
        (
            ["--trainer.precision", "bf16-true"],
            "set model.init_args.policy.dtype (bfloat16 with LoRA, float64), or trainer.precision bf16-mixed",
        ),
        (["--trainer.precision", "64"], "set model.init_args.policy.dtype"),
        (["--model.init_args.policy.path", "/no/such/model"], "no model folder at /no/such/model"),
        (["--data.init_args.train.source", "math500"], "source 'math500'"),
        (["--checkpoint.mode", "up"], "checkpoint.mode: expected one of ['min', 'max'], got 'up'"),
        (["--checkpoint.monitor", "train/loss"], "must be a validation value"),
        (["--model.init_args.validation", "null"], "validation samples nothing"),
        (["--model.init_args.loss_weights", "{kd: 1.0}"], "the loss has the components ['ce']"),
        (["--data.init_args.max_length", "5000"], "exceeds the model's context of 1024 tokens"),
        pytest.param(
            ["--trainer.accelerator", "gpu"],
            "No supported gpu backend found",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_user_mistakes_get_a_message(
    arguments: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--data.init_args.train.options.n", "8", "--data.init_args.validation.options.n", "4"]
    assert main(["fit", "--config", RECIPE, "--out", str(tmp_path / "run"), *few, *arguments]) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "run").exists(), "a corrected command must not need a flag"


@pytest.mark.parametrize("recipe", ["tiny/prm", "prm"])
def test_a_runs_settings_are_of_the_rows_that_are_read(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from stepkd.training.fit import StepkdCLI

    texts: list[str] = []
    monkeypatch.setattr(StepkdCLI, "before_instantiate_classes", lambda self: texts.append(self._config_text))
    for name in ("instantiate_classes", "_run_subcommand"):
        monkeypatch.setattr(StepkdCLI, name, lambda *arguments: None)
    assert main(["fit", "--config", recipe, "--data.train.path", "mine.jsonl", "--out", "runs/x"]) == 0
    data = yaml.safe_load(texts[0])["data"]["init_args"]
    wanted = {"source": "rows", "path": "mine.jsonl", "hub": None, "options": {}}
    assert {name: data["train"][name] for name in wanted} == wanted
    assert data["validation"]["source"] == ("task" if recipe == "tiny/prm" else "rows"), "which no file was given for"


def test_fit_without_a_folder_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", RECIPE]) == 2
    assert "give --out FOLDER" in capsys.readouterr().err


def test_training_on_an_evaluation_set_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "test.jsonl"
    rows.write_text('{"question": "1+1?", "answer": "two\\n#### 2"}\n')
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(
        f"data: {{init_args: {{train: {{source: gsm8k, path: {rows}, options: {{}}}}, validation: null}}}}\n"
    )
    assert main(["fit", "--config", RECIPE, "--config", str(overlay), "--out", str(tmp_path / "run")]) == 2
    assert "kept for evaluation" in capsys.readouterr().err


class TestRecipes:
    def test_list_show_copy(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["recipes", "list"]) == 0
        listed = capsys.readouterr().out
        assert "tiny/sft" in listed
        assert all(line.endswith((".", "?")) for line in listed.splitlines()), "whole sentences"
        assert "base/smollm2-135m-lora" in listed
        assert main(["recipes", "show", "tiny/sft"]) == 0
        assert capsys.readouterr().out == Path(RECIPE).read_text()
        assert main(["recipes", "copy", "recipes/tiny/sft.yaml", str(tmp_path)]) == 0
        assert (tmp_path / "sft.yaml").read_text() == Path(RECIPE).read_text()
        assert f"copied the recipe recipes/tiny/sft.yaml to {tmp_path / 'sft.yaml'}" in capsys.readouterr().out

    def test_copy_never_overwrites(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        target = tmp_path / "mine.yaml"
        target.write_text("mine")
        assert main(["recipes", "copy", "sft", str(target)]) == 2
        assert "already exists" in capsys.readouterr().err
        assert target.read_text() == "mine"

    def test_unknown_recipe(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["recipes", "show", "tiny/stf"]) == 2
        assert "Did you mean 'tiny/sft'" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["recipes", "list"], ["label", "--help"], ["--help"]])
def test_a_reader_that_leaves_gets_no_traceback(words: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)  # as `head` does, only sooner
    done = subprocess.run([sys.executable, "-m", "stepkd", *words], stdout=write, stderr=subprocess.PIPE, timeout=120)
    os.close(write)
    assert done.stderr == b""
    # The printing of a help text swallows the error, unless a part is left for the end.
    assert done.returncode in ((0, 141) if "label" in words else (141,))


@pytest.mark.parametrize("name", ["sft", "tiny/sft", "recipes/tiny/sft.yaml", "strategy/fsdp2", "recipes/sft"])
def test_a_recipe_is_found_by_name_outside_a_checkout(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sft").mkdir()  # no file
    short = name.removeprefix("recipes/").removesuffix(".yaml")
    expected = str(ROOT / "recipes" / f"{short}.yaml")
    assert with_recipe_files(["fit", "--config", name]) == ["fit", "--config", expected]
    assert with_recipe_files([f"--config={name}", "-c", name]) == [f"--config={expected}", "-c", expected]


def test_an_installed_package_finds_its_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, beside = tmp_path / "stepkd" / "recipes", tmp_path / "recipes"
    for folder in (inside, beside):  # another package's folder may be called recipes too
        folder.mkdir(parents=True)
        (folder / "mine.yaml").write_text("# A recipe.\n")
    monkeypatch.chdir(tmp_path / "stepkd")
    monkeypatch.setattr(yaml_files, "__file__", str(tmp_path / "stepkd" / "yaml_files.py"))
    assert with_recipe_files(["--config", "mine"]) == ["--config", str(inside / "mine.yaml")]
    shutil.rmtree(inside)
    assert with_recipe_files(["--config", "mine"]) == ["--config", str(beside / "mine.yaml")]
    shutil.rmtree(beside)
    with pytest.raises(ConfigError, match=r"no recipes in .*: reinstall stepkd"):
        with_recipe_files(["--config", "mine"])


def test_a_file_wins_over_a_recipe_of_its_name_and_settings_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sft.yaml").write_text("{}")
    words = ["--config", "sft.yaml", "--config", "trainer: {max_steps: 1}", "--model", "sft", "--config"]
    assert with_recipe_files(words) == words
    assert with_recipe_files(["--config", "sft"])[1].endswith("recipes/sft.yaml")


@pytest.mark.parametrize(
    "command",
    [
        ["fit", "--out", "x", "--config"],
        ["validate", "--config"],
        ["predict", "--out", "x", "--config"],
        ["doctor", "--recipe"],
        ["cache-teacher", "--out", "x", "--recipe"],
        ["iterate", "--config"],
    ],
)
def test_every_command_names_the_nearest_recipe(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*command, "fsdp2"]) == 2
    told = capsys.readouterr().err
    assert "no file 'fsdp2' here, and no recipe 'fsdp2'. Did you mean 'strategy/fsdp2'?" in told
    assert main([*command, "tiny/iterate_step_kot"]) == 2
    assert "Did you mean 'tiny/iterate_step_kto'" in capsys.readouterr().err


def test_recipes_run_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from stepkd.training.fit import check_fit

    monkeypatch.chdir(tmp_path)
    small = ["--model.policy.path", "tiny-0.1m"]
    module, data, _ = check_fit(words=["--config", "tiny/sft", "--config=base/tiny", *small, "--data", "StepData"])
    assert (type(module).__name__, type(data).__name__) == ("SFTModule", "StepData")


@pytest.mark.slow
def test_a_run_or_an_export_is_taken_wherever_a_model_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--config", "tiny/sft", "--model.policy.path", "tiny-0.1m", "--data.train.options.n", "8"]
    small += ["--data.validation.options.n", "4", "--trainer.val_check_interval", "1", "--trainer.callbacks", "[]"]
    small += ["--data.global_batch_size", "8", "--model.validation", "null", "--checkpoint.monitor", "val/loss"]
    small += ["--checkpoint.mode", "min", "--trainer.max_steps", "2"]
    run, export, second = (str(tmp_path / name) for name in ("run", "export", "second"))
    assert main(["fit", *small, "--model.optimizer.lr", "0.01", "--out", run]) == 0
    hint = next(line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("evaluate: "))
    assert f"stepkd evaluate --model {run} --benchmark task --data task=modular:terms=4,n=4 --out" in hint
    assert main(["export", run, "--to", export]) == 0

    def loss(*words: str) -> str:
        capsys.readouterr()
        assert main(["validate", *small, *words]) == 0
        return next(line for line in capsys.readouterr().out.splitlines() if "val/loss" in line)

    start = loss()
    best = loss("--ckpt_path", f"{run}/checkpoints/best.ckpt")
    assert best != start
    for words in (["--ckpt_path", run], ["--ckpt_path", export], ["--model.policy.path", run]):
        assert loss(*words) == best
    assert main(["fit", *small, "--model.policy.path", run, "--out", second]) == 0
    same = ["--model.optimizer.lr", "0.01", "--trainer.max_steps", "3"]
    assert main(["fit", *small, *same, "--ckpt_path", run, "--out", f"{second}-continued"]) == 0
    assert "finished after 3 steps" in capsys.readouterr().out
    assert main(["fit", *small, "--ckpt_path", export, "--out", f"{second}-export"]) == 2
    assert "holds no checkpoint: to start from a model, --model.policy.path" in capsys.readouterr().err
    for file in Path(run, "checkpoints").iterdir():
        file.unlink()
    assert main(["validate", *small, "--ckpt_path", run]) == 2
    assert "is a run folder (kind 'fit', status finished) without a checkpoint" in capsys.readouterr().err


OWN = """
from lightning.pytorch import Callback
from stepkd.modules import SFTModule
class Mine(SFTModule): pass
class Hello(Callback): pass
def close(completions, **_): return [1.0 for _ in completions]
"""


@pytest.fixture
def own_folder(tmp_path: Path) -> Path:
    """A current folder with a module of one's own, and with files named as modules that stepkd imports."""
    (tmp_path / "my_rewards.py").write_text(OWN)
    for name in ("json", "torch", "argparse", "yaml", "tqdm"):
        (tmp_path / f"{name}.py").write_text(f"raise RuntimeError('{name} of the current folder')")
    return tmp_path


def test_the_current_folder_stands_behind_all_that_is_installed(own_folder: Path) -> None:
    (own_folder / "my_rewards.py").write_text("")
    entry = (
        "import sys; sys.path.remove(''); from stepkd.cli import main; main(['benchmarks']); import my_rewards, tqdm"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", entry], cwd=own_folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "gsm8k" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("module", [pytest.param(False, id="stepkd"), pytest.param(True, id="python -m stepkd")])
def test_modules_of_the_current_folder_are_found_and_shadow_nothing(module: bool, own_folder: Path) -> None:
    tmp_path = own_folder
    (tmp_path / "grpo.yaml").write_text("model: {init_args: {rewards: [{name: 'my_rewards:close'}]}}\n")
    entry = "import sys; sys.path.remove(''); from stepkd.cli import main; sys.exit(main())"
    start = ["-m", "stepkd"] if module else ["-c", entry]  # a console script puts its own folder first, no current one
    words = ["doctor", "--recipe", "tiny/grpo", "grpo.yaml", "--set", "model.policy.path=tiny-0.1m"]
    words += ["--set", "trainer.callbacks=my_rewards.Hello"]
    if not module:
        words += ["--set", "trainer.accelerator=gpu"]  # no second process that measures memory
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *start, *words], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240
    )
    assert "memory" in done.stdout, done.stderr
    assert "my_rewards" not in done.stderr
    safe = forked.run([*words[:3], str(tmp_path / "grpo.yaml"), *words[4:], "--safe"])
    assert safe.returncode == 2
    assert "names the code" in safe.stderr
    assert "my_rewards" in safe.stderr


def test_export_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(tmp_path / "none.ckpt"), "--to", str(tmp_path / "out")]) == 2
    assert "no checkpoint at" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_of_version_0_1_is_neither_exported_nor_continued(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--config", RECIPE, "--trainer.max_steps", "1", "--data.train.options.n", "4", "--data.validation", "null"]
    run = tmp_path / "run"
    assert main(["fit", *small, "--model.policy.path", "tiny-0.1m", "--out", str(run)]) == 0
    last = run / "checkpoints" / "last.ckpt"
    content = torch.load(last, weights_only=True)
    content["stepkd"]["format"] = 1
    torch.save(content, last)
    again = [
        "fit",
        *small,
        "--model.policy.path",
        "tiny-0.1m",
        "--ckpt_path",
        str(run),
        "--out",
        str(tmp_path / "other"),
    ]
    for words in (["export", str(run), "--to", str(tmp_path / "model")], again):
        assert main(words) == 2
        assert "was written by stepkd 0.1: export it with that version" in capsys.readouterr().err


def test_the_citation_names_the_version() -> None:
    import stepkd

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == stepkd.__version__
    assert citation["cff-version"]
    assert citation["authors"]
