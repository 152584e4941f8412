"""Under ``--safe`` a recipe runs no code but stepkd's and Lightning's; without it, it may name what it likes."""

from __future__ import annotations

import subprocess
from pathlib import Path

import forked
import pytest

ROOT = Path(__file__).resolve().parents[1]
EVIL = """
import pathlib
pathlib.Path({mark!r}).touch()
from lightning.pytorch import Callback
from stepkd.modules import SFTModule
class Own(SFTModule): pass
class Watch(Callback): pass
def reward(completions, **_): return [1.0 for _ in completions]
"""
RUN = "import sys; from stepkd.cli import main; print([main(line.split()) for line in sys.argv[1:]])"
FIT = "fit --safe --config recipes/tiny/sft.yaml --trainer.max_steps 1 --trainer.val_check_interval null"
SMALL = "--data.init_args.train.options.n 8 --data.init_args.validation null --model.init_args.policy.path tiny-0.1m"


@pytest.fixture
def evil(tmp_path: Path) -> tuple[Path, Path]:
    """A folder with a module of a stranger, and the file that its import leaves."""
    mark = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(EVIL.format(mark=str(mark)))
    return tmp_path, mark


def run(folder: Path, *lines: str) -> subprocess.CompletedProcess[str]:
    """Several command lines, one after the other, in one process."""
    script = folder / "run.py"
    script.write_text(RUN)
    return forked.run(lines, script=script, PYTHONPATH=str(folder))


def test_what_names_foreign_code_is_refused(evil: tuple[Path, Path]) -> None:
    folder, mark = evil
    (folder / "model.yaml").write_text("model: {class_path: evil.Own}\n")
    (folder / "callback.yaml").write_text("trainer: {callbacks: [{class_path: evil.Watch}]}\n")
    (folder / "short.yaml").write_text("trainer: {callbacks: evil.Watch}\n")
    (folder / "system.yaml").write_text(
        "trainer: {strategy: {class_path: subprocess.Popen, init_args: {args: [ls]}}}\n"
    )
    lines = [f"{FIT} {SMALL} --config {folder / name}.yaml --out {folder / name}" for name in ("model", "callback")]
    lines += [f"{FIT} {SMALL} --config {folder / name}.yaml --out {folder / name}" for name in ("short", "system")]
    lines.append(f"{FIT} {SMALL} --model evil.Own --out {folder / 'word'}")
    lines.append(
        f"{FIT} {SMALL} --model.init_args.policy.trust_remote_code true --model.init_args.policy.path "
        f"{folder} --out {folder / 'remote'}"
    )
    (folder / "reward.yaml").write_text("model: {init_args: {rewards: [{name: 'evil:reward'}]}}\n")
    grpo = FIT.replace("sft", "grpo") + f" --config {folder / 'reward.yaml'} {SMALL}"
    lines.append(f"{grpo} --model.init_args.validation null --out {folder / 'reward'}")
    (folder / "dotted.yaml").write_text("model: {init_args: {rewards: [{name: trl.rewards.accuracy_reward}]}}\n")
    lines.append(f"{grpo.replace('reward.yaml', 'dotted.yaml')} --out {folder / 'dotted'}")
    (folder / "data.yaml").write_text("data: {class_path: evil.Own}\n")  # beside a mistake, which is explained
    lines.append(f"{FIT} --model.optimizer.lrr 1 --config {folder / 'data.yaml'} --out {folder / 'mistake'}")
    done = run(folder, *lines)
    assert done.stdout.strip().endswith(str([2] * len(lines))), done.stdout + done.stderr[-3000:]
    assert not mark.exists()
    told = [line for line in done.stderr.splitlines() if line.startswith("stepkd fit: ")]
    classes = ("evil.Own", "evil.Watch", "evil.Watch", "subprocess.Popen", "evil.Own")
    words = [f"the recipe names the code {name!r}, and --safe allows only stepkd, lightning" for name in classes]
    words += ["runs code of the model's repository", "rewards names the code 'evil.reward'"]
    words += ["rewards names the code 'trl.rewards.accuracy_reward'", "the recipe names the code 'evil.Own'"]
    for line, expected in zip(told, words, strict=True):
        assert expected in line


@pytest.mark.slow
def test_stepkds_own_recipes_run(evil: tuple[Path, Path]) -> None:
    folder, mark = evil
    strategy = "--config recipes/strategy/single.yaml"
    done = run(folder, f"{FIT} {SMALL} {strategy} --out {folder / 'own'}")
    assert done.stdout.strip().endswith("[0]"), done.stdout + done.stderr[-3000:]
    free = run(folder, f"{FIT.replace('--safe ', '')} {SMALL} --model evil.Own --out {folder / 'free'}")
    assert free.stdout.strip().endswith("[0]"), free.stdout + free.stderr[-3000:]
    assert mark.exists()
