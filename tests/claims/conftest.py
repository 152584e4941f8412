"""Claim files whose one job is a function outside the package, named by a dotted path."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

CODE = """
from __future__ import annotations

import os
import signal

from stepkd.claims import Measured
from stepkd.randomness import generator


def draw(*, base, gain, problems, steps, task, kill_at, seed, out):
    with open(out / "calls.txt", "a") as file:
        file.write("call\\n")
    if kill_at == seed and gain and not os.environ.get("SPARE"):
        os.kill(os.getpid(), signal.Signals[os.environ.get("SIGN", "SIGKILL")])
    noise = generator(seed, "fake", task).random((problems, 2))
    columns = {
        "correct": (noise[:, 0] < base + gain).astype(float).tolist(),
        "share": [[int(x < 0.2), 1] for x in noise[:, 1]],
        "steps": steps,
    }
    return Measured(columns, [f"p{i}" for i in range(problems)])


def give(*, out, columns, problems=()):
    return Measured(columns, problems)


def nothing(*, out):
    return 3
"""

CLAIM: dict[str, Any] = {
    "claim": "The better arm is correct more often.",
    "source": "nowhere, 0.8 against 0.5",
    "settings": {"base": 0.5, "gain": 0.0, "problems": 30, "steps": 100, "task": "one", "kill_at": None},
    "jobs": {
        "drawn": {
            "call": {
                "function": "fake_claim_code.draw",
                **{name: f"${name}" for name in ("base", "gain", "problems", "steps", "task", "kill_at", "seed")},
            }
        }
    },
    "metrics": {"correct": "drawn", "share": "drawn", "steps": "drawn.steps"},
    "arms": {"plain": {}, "better": {"gain": 0.3}},
    "seeds": [0, 1, 2, 3, 4],
    "statements": [{"metric": "correct", "better": "better", "worse": "plain", "paper": "0.8 against 0.5"}],
    "quick": {"seeds": [0], "settings": {"problems": 5}},
}


@pytest.fixture
def code_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder on the import path with the function."""
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "fake_claim_code.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "fake_claim_code", raising=False)
    return folder


@pytest.fixture
def write_claim(tmp_path: Path, code_folder: Path) -> Callable[..., Path]:
    """Writes ``fake.yaml``; keyword arguments replace keys (settings: some of them), None removes one."""

    def write(**changes: Any) -> Path:
        if isinstance(settings := changes.get("settings"), dict):
            changes["settings"] = {**CLAIM["settings"], **settings}
        keys = {key: value for key, value in {**CLAIM, **changes}.items() if value is not None}
        path = tmp_path / "fake.yaml"
        path.write_text(yaml.safe_dump(keys, sort_keys=False))
        return path

    return write
