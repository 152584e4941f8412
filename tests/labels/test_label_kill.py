"""Label and pair jobs that are killed at random moments, by one and two ranks, end with the bytes of a whole run.

The parts that appear in a job's folder are the clock: nothing here depends on how fast the machine is.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import pytest
import torch

from stepkd.cli import main
from stepkd.models.policy import Policy
from stepkd.runs.files import write_jsonl

pytestmark = pytest.mark.slow
PROBLEMS = 'task:task="modular:terms=3,modulus=2",n=16'
SMALL = ["--device", "cpu", "--dtype", "float64", "--grading.extractors", "last_number"]
CUT = "regex:[^0-9]"
JOBS = {
    "labels": [
        *("label", "--solutions", "Sampled", "--solutions.problems", PROBLEMS, "--solutions.model", "tiny-0.1m"),
        *("--solutions.sampling.n", "2", "--solutions.sampling.max_new_tokens", "12", "--steps", "Cut"),
        *("--steps.segmenter", CUT, "--labeller.sampling.n", "2", "--labeller.sampling.max_new_tokens", "12"),
        *("--engine.max_rows", "2"),
    ],
    "step": [
        *("pairs", "step", "--sampling.n", "8", "--sampling.max_new_tokens", "6", "--engine.max_rows", "8"),
    ],
    "tree": [
        *("pairs", "tree", "--problems", PROBLEMS, "--model", "tiny-0.1m", "--search.iterations", "1"),
        *("--search.actions", "2", "--search.depth", "2", "--search.max_steps", "2", "--max_step_tokens", "8"),
        *("--sampling.max_new_tokens", "8", "--value.continuations", "2", "--pairs.require", "none"),
        *("--segmenter", CUT, "--engine.max_rows", "2"),
    ],
}
Command = Callable[[str], list[str]]


@pytest.fixture(params=list(JOBS))
def job(request: pytest.FixtureRequest, tmp_path: Path, policy: Policy) -> Command:
    """The command of a job, given its folder."""
    words = [*JOBS[request.param], *SMALL]
    if request.param == "step":
        rows = [labelled(policy, number) for number in range(32)]
        write_jsonl(tmp_path / "completions.jsonl", rows)
        words += ["--completions", str(tmp_path / "completions.jsonl")]
    return lambda name: [*words, "--out", str(tmp_path / name)]


def labelled(policy: Policy, number: int) -> dict[str, Any]:
    """A solution with an incorrect second step; its prefix ends in the answer, so a continuation can be correct."""
    steps = ["1+1=0\n", "0*1=1\n", "#### 1"]
    ids = [policy.tokenizer("".join(steps[: k + 1]), add_special_tokens=False)["input_ids"] for k in range(3)]
    return {
        "id": f"p{number}/0",
        "problem_id": f"p{number}",
        "prompt": f"{number}+1*1%2=\n",
        "answer": "0",
        "completion": "".join(steps),
        "token_ids": ids[-1],
        "logprobs": [-1.0] * len(ids[-1]),
        "step_ends": [len(each) for each in ids],
        "steps": steps,
        "step_labels": [True, False, True],
        "correct": False,
        "finish": "stop",
        "model": "tiny-0.1m",
        "sampling": {"temperature": 1.0},
        "seed": 0,
    }


def parts(out: Path) -> int:
    return len(list(out.glob("parts/*/[0-9]*.jsonl")))


def log(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for path in out.glob("log/*.jsonl") for line in path.read_text().splitlines()]


def check(out: Path, whole: Path, kills: int) -> None:
    """The same files, and no unit was done twice: one that was in flight is no part and stands in no log."""
    names = {path.name for path in whole.iterdir()} - {"log", "parts", "config.yaml"}
    written = {path.name for path in out.iterdir()} - {"log", "parts", "config.yaml"}
    assert names == {name for name in written if not name.endswith(".tmp")}, "a kill within a write leaves its file"
    assert {name: (out / name).read_bytes() for name in names} == {name: (whole / name).read_bytes() for name in names}
    assert sorted(path.relative_to(out) for path in out.glob("parts/*/*")) == sorted(
        path.relative_to(whole) for path in whole.glob("parts/*/*")
    )
    done = Counter((entry["phase"], entry["unit"]) for entry in log(out) if "unit" in entry)
    assert max(done.values()) == 1
    assert parts(whole) - kills <= len(done) <= parts(whole), "a kill may come between a part and its line in the log"


def test_killed_at_random_moments(job: Command, tmp_path: Path) -> None:
    assert main(job("whole")) == 0
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    draw = random.Random(parts(whole))
    kills = 0
    for sign, ranks in ((signal.SIGKILL, 1), (signal.SIGTERM, 2)):
        running = forked.Ranks(job("torn"), ranks).ranks
        enough = parts(torn) + draw.randint(1, 5)
        while parts(torn) < enough and all(process.poll() is None for process in running):
            time.sleep(0.01)
        victim = running[draw.randrange(ranks)]
        victim.send_signal(sign)
        for other in running:
            if other is not victim:  # as a launcher does
                other.terminate()
        said = [process.communicate() for process in running]
        codes = [process.returncode for process in running]
        assert set(codes) <= {0, -sign, -signal.SIGTERM}, said
        kills += sum(code != 0 for code in codes)
    assert kills
    assert main(job("torn")) == 0
    check(torn, whole, kills)


@pytest.mark.parametrize("job", ["labels"], indirect=True)
def test_a_killed_rank_ends_the_others_and_the_same_command_does_what_is_missing(job: Command, tmp_path: Path) -> None:
    """Under torchrun itself; the log says which process is which rank."""
    assert main(job("whole")) == 0
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "stepkd"]
    environ = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    with subprocess.Popen([*command, *job("torn")], env=environ) as launcher:
        begun: list[Path] = []  # logs, in the order in which the ranks begin
        while launcher.poll() is None and len(begun) < 2:
            begun += [path for path in torn.glob("log/*.jsonl") if path not in begun and path.stat().st_size]
            time.sleep(0.01)
        pids = [json.loads(path.read_text().splitlines()[0])["pid"] for path in begun]
        os.kill(pids[1], signal.SIGKILL)
        assert launcher.wait(120) != 0
    assert parts(torn) < parts(whole)
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)
    again = forked.run(job("torn"), ranks=2)
    assert again.returncode == 0, again.stderr[-3000:]
    check(torn, whole, 2)
