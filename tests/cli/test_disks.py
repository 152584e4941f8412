"""Every command on a full and on a read-only disk: one message with path and remedy, and nothing half-written."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from stepkd.cli import main
from stepkd.errors import MachineError, disk_error
from stepkd.tasks.rows import Noise, make_rows

ROOT = Path(__file__).resolve().parents[2]
TINY: dict[str, Any] = {
    "trainer": {"max_steps": 2, "val_check_interval": 1},
    "checkpoint": {"every_n_steps": 1, "monitor": "val/loss", "mode": "min"},
    "model": {"init_args": {"policy": {"path": "tiny-0.1m"}, "validation": {"sampling": None}}},
    "data": {
        "init_args": {
            "train": {"options": {"n": 8}},
            "validation": {"options": {"n": 4}},
            "predict": {"source": "task", "options": {"task": "modular", "n": 3}},
            "global_batch_size": 4,
        }
    },
}
PROBLEMS = "task:task=modular,n=2"
COMMANDS = {
    "fit": "fit --config tiny/sft --config {tiny} --out {out}",
    "predict": "predict --config tiny/sft --config {tiny} --out {out}",
    "export": "export tiny-0.1m --to {out}",
    "label": f"label --solutions Sampled --solutions.problems {PROBLEMS} --solutions.model tiny-0.1m "
    "--solutions.sampling.max_new_tokens 8 --labeller TaskChecker --out {out}",
    "convert": "convert {rows} --to Stepwise --out {out}.jsonl",
    "score": "score --scorer checker --completions {rows} --out {out}",
    "evaluate": "evaluate --model tiny-0.1m --benchmark task --data task=modular,n=2 --sampling.max-new-tokens 8 "
    "--out {out}",
    "cache-teacher": "cache-teacher --recipe tiny/gkd {tiny} --set model.teacher.path=tiny-0.1m "
    "--set model.source.lmbda=0.0 --top-k 4 --out {out}",
    "iterate": "iterate --config {iterate} --model tiny-0.1m --iterations 1 --out {out}",
    "claims": "claims run step_dpo --out {out}",
    "quickstart": "quickstart --scale 0.01 --out {out}",
    "report": "report {run} --out {out}.html",
    "recipes": "recipes copy sft {out}.yaml",
}
SLOW = {"predict", "score", "evaluate", "cache-teacher", "iterate", "claims", "quickstart"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files that the commands read."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    with open(folder / "rows.jsonl", "w", encoding="utf-8") as stream:
        for row in make_rows("modular:terms=4", 2, seed=0, noise=Noise(rate=0.4)):
            kept = {name: row[name] for name in ("id", "prompt", "answer", "outcome")}
            print(json.dumps(kept | {"completions": row["steps"], "labels": row["step_labels"]}), file=stream)
    sample = {"prompt": "1+1", "steps": ["2"], "step_scores": None, "correct": True, "answer": "2", "reward": 1.0}
    sample |= {"rewards": {"answer": 1.0}, "tokens": 2, "cut_off": False, "id": "a"}
    entry = {"step": 0, "lengths": {"edges": [0, 1], "counts": [1]}, "samples": [sample]}
    (folder / "run").mkdir()
    (folder / "run" / "samples.jsonl").write_text(json.dumps(entry) + "\n")
    iterate = ROOT / "recipes" / "tiny" / "iterate_step_kto.yaml"
    return {"tiny": folder / "tiny.yaml", "rows": folder / "rows.jsonl", "run": folder / "run", "iterate": iterate}


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """A folder on a disk of its own; where none may be mounted, one in which every write fails."""
    place = tmp_path / "disk"
    place.mkdir()

    def make(kind: str, size: str = "64k") -> Path:
        try:
            subprocess.run(
                ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], check=True, capture_output=True
            )
        except (OSError, subprocess.CalledProcessError):
            _refuse(monkeypatch, place, errno.EROFS if kind == "read-only" else errno.ENOSPC)
            return place
        if kind == "read-only":
            subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        elif kind == "full":
            with contextlib.suppress(OSError), open(place / "fill", "wb", buffering=0) as stream:
                while True:
                    stream.write(b"0" * 4096)
        return place

    yield make
    subprocess.run(["umount", place], check=False, capture_output=True)


def _refuse(monkeypatch: pytest.MonkeyPatch, place: Path, code: int) -> None:
    error = OSError(code, os.strerror(code))

    def refused(path: Any, *arguments: Any, **named: Any) -> Any:
        if isinstance(path, str | os.PathLike) and Path(path).is_relative_to(place):
            raise error
        return mkdir(path, *arguments, **named)

    def fails(*_: Any, **__: Any) -> None:
        raise error

    mkdir = os.mkdir
    monkeypatch.setattr(os, "mkdir", refused)
    monkeypatch.setattr(os, "fsync", fails)


def words(command: str, out: Path, inputs: dict[str, Path]) -> list[str]:
    return COMMANDS[command].format(out=out, **inputs).split()


@pytest.mark.parametrize(
    ("command", "kind"),
    [(command, "full") for command in COMMANDS]
    + [pytest.param(command, "read-only", marks=[pytest.mark.slow] if command in SLOW else []) for command in COMMANDS],
)
def test_one_message_and_nothing_half_written(
    command: str,
    kind: str,
    disk: Callable[..., Path],
    inputs: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    place = disk(kind)
    assert main(words(command, place / "x", inputs)) in (1, 2)
    text = capsys.readouterr().err
    assert str(place / "x") in text
    assert ("o space left" if kind == "full" else "ead-only") in text or "no permission" in text
    assert any(remedy in text for remedy in ("ree some", "give an --out", "rite to a folder", "another folder"))
    assert [path for path in place.rglob("*") if path.is_file() and path.name != "fill"] == []


def test_a_disk_that_fills_up_in_training(
    disk: Callable[..., Path], inputs: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    out = disk("small", "48k") / "x"
    if not os.path.ismount(out.parent):
        monkeypatch.undo()
        monkeypatch.setattr(torch, "save", _full)
    assert main(words("fit", out, inputs)) == 1
    text = capsys.readouterr().err
    assert "best.ckpt: No space left on device" in text
    assert "No checkpoint was written before. Free some space there" in text
    assert list((out / "checkpoints").iterdir()) == []


def test_a_checkpoint_that_cannot_be_replaced(
    inputs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one before is named, and the run goes on from it."""
    out = tmp_path / "x"
    save, calls = torch.save, 0

    def filling(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        (_full if calls > 2 else save)(*arguments)

    monkeypatch.setattr(torch, "save", filling)
    assert main(words("fit", out, inputs)) == 1
    assert "last.ckpt is intact, for --resume." in capsys.readouterr().err
    assert json.loads((out / "run.json").read_text())["status"] == "failed"
    monkeypatch.undo()
    assert main([*words("fit", out, inputs), "--resume"]) == 0


def _full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_finished_prediction_says_so(inputs: dict[str, Path], tmp_path: Path) -> None:
    assert main(words("predict", tmp_path / "x", inputs)) == 0
    assert json.loads((tmp_path / "x" / "run.json").read_text())["status"] == "finished"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "x"), "No space left on device .*MiB free there.*Free some space there"),
        (OSError(errno.EDQUOT, "x"), "Your share of that disk is used up"),
        (OSError(errno.EROFS, "x"), "Read-only file system. Write to a folder that you may"),
        (PermissionError(errno.EACCES, "x"), "Permission denied. Write to a folder that you may"),
        (OSError(errno.EFBIG, "x"), "raise the limit"),
        (NotADirectoryError(errno.ENOTDIR, "x"), "is a file: give another"),
        (Exception("I/O error: No space left on device (os error 28)"), "Free some space there"),
        (RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"), "Free some space there"),
    ],
)
def test_errors_of_a_disk_in_the_words_of_any_library(error: Exception, said: str, tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=f"(?s)cannot write .*/model: .*{said}"):
        raise disk_error(error, tmp_path / "model") or error


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    assert disk_error(FileNotFoundError(errno.ENOENT, "x"), tmp_path) is None
    assert disk_error(RuntimeError("shapes differ"), tmp_path) is None
