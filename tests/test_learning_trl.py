"""The comparison of what is learnt with TRL's trainers (``tests/benchmarks/learning_trl.py``) runs, with two steps."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_both_sides_train_on_the_same_batches(repo_root: Path, tmp_path: Path) -> None:
    script = repo_root / "tests" / "benchmarks" / "learning_trl.py"

    def table(*methods: str) -> dict[tuple[str, str], list[str]]:
        command = [
            sys.executable,
            str(script),
            "--quick",
            "--seeds",
            "0",
            "--out",
            str(tmp_path),
            "--methods",
            *methods,
        ]
        environ = {**os.environ, "PYTHONPATH": str(repo_root), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environ)
        assert done.returncode == 0, done.stderr[-4000:]
        lines = (tmp_path / "table.md").read_text().splitlines()[2:]
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        return {(method, side): rest for method, side, *rest in cells}

    first = table("dpo", "kto")
    for method in ("dpo", "kto"):  # whose batches and losses are the same: the same weights
        assert float(first[method, "TRL"][-1]) < 1e-3
    models = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("model.safetensors")}
    assert len(models) == 6  # teacher, student, two methods by two sides
    both = table("dpo", "kto", "gkd", "grpo")
    assert set(both) == {("student", ""), *((m, s) for m in ("dpo", "kto", "gkd", "grpo") for s in ("stepkd", "TRL"))}
    assert {path: path.stat().st_mtime_ns for path in models} == models  # what was trained was not trained again
