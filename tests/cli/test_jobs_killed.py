"""Evaluation, scoring and caches, killed at random moments alone and among ranks, end with a whole run's bytes."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import forked
import pytest

from stepkd.runs.files import write_jsonl
from stepkd.tasks.rows import make_rows

RECIPE = """
trainer: {accelerator: cpu, max_steps: 1}
model:
  class_path: stepkd.modules.GKDModule
  init_args:
    policy: {path: tiny-0.1m, init_seed: 5}
    teacher: {class_path: Local, init_args: {path: tiny-0.1m}}
    divergence: {class_path: ForwardKL}
    source: {lmbda: 0.0}
    micro_batch_tokens: 512
data:
  class_path: stepkd.data.StepData
  init_args:
    train: {source: task, options: {task: 'modular:terms=5', n: 4000}}
    template: task
    overlap_ngram: 0
"""
COMMANDS = {
    "evaluate": "evaluate --model tiny-0.1m --benchmark task --data task=modular:terms=3,n=40 --sampling.n 2 "
    "--sampling.temperature 1 --sampling.max-new-tokens 60 --engine.max-rows 2 --device cpu --out {out}",
    "score": "score --scorer Judge --scorer.path tiny-0.1m --completions {data}/rows.jsonl --max-rows 1 "
    "--scorer.answers Y N --device cpu --out {out}",
    "cache-teacher": "cache-teacher --recipe {data}/gkd.yaml --validation false --top-k 6 --device cpu --out {out}",
}
OUTPUTS = {
    "evaluate": ("{out}/settings.json", "{out}/results.jsonl", "{out}/summary.json"),
    "score": ("{out}/settings.json", "{out}/results.jsonl", "{out}/summary.json"),
    "cache-teacher": ("{out}/settings.json", *(f"{{out}}/parts/completions/{n:06d}.safetensors" for n in range(16))),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_jsonl(folder / "rows.jsonl", make_rows("modular:terms=6", 200, seed=0))
    (folder / "gkd.yaml").write_text(RECIPE)
    return folder


class Runs:
    """One command, started as often as it takes."""

    def __init__(self, command: str, data: Path, out: Path) -> None:
        self.command = command
        self.words = COMMANDS[command].format(data=data, out=out).split()
        self.outputs = [Path(name.format(out=out)) for name in OUTPUTS[command]]
        self.job = out

    def finish(self, ranks: int) -> None:
        done = forked.run(self.words, ranks=ranks)
        assert done.returncode == 0, done.stderr[-3000:]

    def parts(self) -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in self.job.glob("parts/*/[0-9]*")}

    def wait_for(self, parts: int, process: forked.Command | forked.Ranks, starts: int) -> None:
        """Wait for parts, and until so many processes have begun since the job was."""
        deadline = time.monotonic() + 240
        while process.poll() is None and time.monotonic() < deadline:
            begun = sum(path.read_text().count('"event": "start"') for path in self.job.glob("log/rank-*.jsonl"))
            if len(self.parts()) >= parts and begun >= starts:
                break
            time.sleep(0.01)

    def log(self) -> list[dict[str, Any]]:
        return [
            json.loads(line) for path in self.job.glob("log/rank-*.jsonl") for line in path.read_text().splitlines()
        ]

    def pids(self) -> list[int]:
        """The process of each rank that was started last."""
        found = {}
        for path in sorted(self.job.glob("log/rank-*.jsonl")):
            entries = [json.loads(line) for line in path.read_text().splitlines()]
            found[path.name] = next(entry["pid"] for entry in reversed(entries) if entry.get("event") == "start")
        return list(found.values())


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture(scope="module", params=COMMANDS)
def whole(request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """A command, done without interruption by one process."""
    runs = Runs(request.param, data, tmp_path_factory.mktemp("whole") / "out")
    runs.finish(ranks=1)
    return runs


@pytest.mark.slow
def test_killed_alone_and_among_ranks(whole: Runs, data: Path, tmp_path: Path) -> None:
    """The commands share the job that answers a signal; one of them is asked to stop, the others get no warning."""
    torn = Runs(whole.command, data, tmp_path / "torn")
    sign = signal.SIGTERM if whole.command == "evaluate" else signal.SIGKILL
    units = {"evaluate": 40, "score": 200, "cache-teacher": 16}[whole.command]
    draw = random.Random(f"{whole.command} {sign}")
    first, second = draw.randint(1, units // 4), draw.randint(units // 4 + 1, units // 2)

    alone = forked.Command(torn.words)
    torn.wait_for(first, alone, starts=1)
    alone.send_signal(sign)
    _, errors = alone.communicate(timeout=60)
    assert alone.returncode == -sign, errors[-3000:]
    kept = torn.parts()
    assert first <= len(kept) < units
    assert not any(path.exists() for path in torn.outputs[1:3] if "parts" not in path.parts)

    launched = forked.Ranks(torn.words)
    torn.wait_for(max(second, len(kept) + 1), launched, starts=3)
    pids = torn.pids()
    os.kill(pids[1], sign)
    _, errors = launched.communicate(timeout=120)
    assert launched.returncode not in (0, None), errors[-3000:]
    assert not any(map(is_running, pids)), "a killed rank ends the others"
    more = torn.parts()
    assert len(kept) < len(more) < units
    assert {name: more[name] for name in kept} == kept, "what is done is not done again"

    torn.finish(ranks=2)
    assert {name: torn.parts()[name] for name in more} == more
    done = [entry["unit"] for entry in torn.log() if "unit" in entry]
    assert len(done) == len(set(done)), "no unit was finished twice"
    for path, expected in zip(torn.outputs, whole.outputs, strict=True):
        assert path.read_bytes() == expected.read_bytes(), path.name
