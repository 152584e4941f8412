"""The cluster examples, run as they are: SLURM's commands are stand-ins, two nodes are two agents on this machine."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from stepkd.cli import main
from stepkd.runs.job import read_results

CLUSTER = Path(__file__).resolve().parents[2] / "recipes" / "cluster"
SRUN = """#!/bin/bash
# Two tasks on one node. As with srun --kill-on-bad-exit=1, one that fails ends the other, and the highest code counts.
while [[ "$1" == --* ]]; do echo "$1" >> "$ASKED"; shift; done
export SLURM_NTASKS=2 SLURM_NTASKS_PER_NODE=2 SLURM_NNODES=1 SLURM_NODEID=0
export SLURM_JOB_NAME=stepkd SLURM_STEP_ID=0 SLURM_NODELIST=localhost
SLURM_PROCID=0 SLURM_LOCALID=0 "$@" &
SLURM_PROCID=1 SLURM_LOCALID=1 "$@" &
highest=0
for task in 0 1; do
    wait -n
    code=$?
    [ "$code" -gt "$highest" ] && highest=$code
    [ "$code" -ne 0 ] && kill -9 $(jobs -p) 2> /dev/null
done
exit "$highest"
"""


@pytest.fixture
def settings(runs: Callable[[str], Any]) -> tuple[Any, list[str]]:
    """A short run and the arguments that a user would give."""
    made = runs("sft")
    overlay = made.folder / "overlay.yaml"
    made.write_overlay("parts", overlay)
    return made, ["--config", str(made.recipe), "--config", str(overlay), "--out", str(made.folder / "parts")]


def start(script: str, arguments: list[str], **variables: str) -> subprocess.Popen[str]:
    here = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": here, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **variables}
    return subprocess.Popen(
        ["bash", str(CLUSTER / script), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_a_preempted_slurm_job_queues_again_and_ends(settings: tuple[Any, list[str]], tmp_path: Path) -> None:
    made, arguments = settings
    commands = tmp_path / "bin"
    commands.mkdir()
    (commands / "srun").write_text(SRUN)
    (commands / "scontrol").write_text(f'#!/bin/bash\necho "$@" >> {tmp_path}/asked\n')
    for file in commands.iterdir():
        file.chmod(0o755)
    number = str(os.getpid())  # Lightning's port follows from it
    job = {"PATH": f"{commands}:{os.environ['PATH']}", "VENV": str(tmp_path / "venv"), "SLURM_JOB_ID": number}
    job["ASKED"] = str(tmp_path / "options")
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "activate").write_text(f"PATH={Path(sys.executable).parent}:$PATH\n")
    first = start("slurm.sbatch", arguments, **job, STOP_AT="batch_end:3:SIGTERM")
    text, _ = first.communicate(timeout=240)
    assert first.returncode == 85, text[-3000:]
    assert (tmp_path / "asked").read_text() == f"requeue {number}\n"
    assert (tmp_path / "options").read_text() == "--kill-on-bad-exit=1\n--wait=120\n"
    assert made.last("parts")["global_step"] == 3
    again = start("slurm.sbatch", arguments, **job, SLURM_RESTART_COUNT="1")
    text, _ = again.communicate(timeout=240)
    assert again.returncode == 0, text[-3000:]
    assert "resuming from last.ckpt" in text
    assert made.last("parts")["global_step"] == made.steps
    assert len(made.batches("parts")) == 2, "two ranks trained"
    assert (tmp_path / "asked").read_text() == f"requeue {number}\n"


@pytest.mark.slow
def test_two_nodes(settings: tuple[Any, list[str]]) -> None:
    made, arguments = settings
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    nodes = [start("two_nodes.sh", arguments, HEAD="localhost", GPUS="1", PORT=port, PATH=path) for _ in range(2)]
    texts = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(text[-2000:] for text in texts)
    assert made.last("parts")["global_step"] == made.steps
    assert sum("finished after" in text for text in texts) == 1
    assert made.fit("one").returncode == 0
    ours, theirs = (made.last(name)["state_dict"] for name in ("parts", "one"))
    assert all(torch.allclose(ours[name], theirs[name], rtol=1e-3, atol=2e-5) for name in theirs)


STEP = """#!/bin/bash
# A task on a node, which is this machine.
while [[ "$1" == --* ]]; do shift; done
export SLURM_NTASKS=1 SLURM_NTASKS_PER_NODE=1 SLURM_NNODES=1 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_STEP_ID=1
exec "$@"
"""
CONTROL = """#!/bin/bash
if [ "$1" = show ]; then printf '127.0.0.1\\n127.0.0.1\\n'; else echo "$@" >> "$ASKED"; fi
"""


@pytest.mark.slow
def test_a_job_over_servers_is_preempted_queues_again_and_ends(tmp_path: Path) -> None:
    """Two stand-ins for vLLM: under SLURM's stand-ins until it is preempted, without SLURM to the end."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in {"srun": STEP, "scontrol": CONTROL}.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    server = Path(__file__).parents[1] / "helpers" / "standin_server.py"
    variables = {
        "PATH": f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "ASKED": str(tmp_path / "asked"),
        "MODEL": "tiny-0.1m",
        "SERVER": f"{sys.executable} {server}",
        "LOGS": str(tmp_path),
        "PORT": str(two_free_ports()),
    }
    job = ["evaluate", "--model", "tiny-0.1m", "--benchmark", "task", "--data", "task=modular:terms=3,n=48"]
    job += ["--sampling.max_new_tokens", "24", "--device", "cpu"]
    words = [*job, "--engine.requests", "4", "--out", str(tmp_path / "served")]
    parts = tmp_path / "served" / "parts" / "problems"
    slurm = {"SLURM_JOB_ID": "0", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NAME": "servers", "SLURM_NTASKS": "2"}
    first = start("vllm_servers.sbatch", words, **variables, **slurm)
    while first.poll() is None and not any(parts.glob("*.jsonl")):
        time.sleep(0.02)
    first.terminate()
    text, _ = first.communicate(timeout=600)
    assert first.returncode == 85, text[-3000:]
    assert (tmp_path / "asked").read_text() == "requeue 0\n"
    done = {path.name: path.stat().st_mtime_ns for path in parts.glob("*.jsonl")}
    assert 0 < len(done) < 12
    again = start("vllm_servers.sbatch", words, **variables, HOSTS="localhost 127.0.0.1")
    text, _ = again.communicate(timeout=600)
    assert again.returncode == 0, text[-3000:]
    assert "2 servers are ready" in text
    assert {name: (parts / name).stat().st_mtime_ns for name in done} == done, "what was done is kept"
    ended = [
        [line for line in path.read_text().splitlines() if "requests" in line] for path in tmp_path.glob("vllm-*.log")
    ]
    assert all(len(lines) == 1 for lines in ended), "every server was told to end, and did"
    assert len(ended) == 4
    told = [json.loads(line) for path in tmp_path.glob("vllm-[!0]*") for line in path.read_text().splitlines()[-1:]]
    assert all(each["requests"] for each in told), "both worked"
    keys = [set(each["keys"]) for each in told]
    assert keys[0] == keys[1]
    assert len(keys[0]) == 2, "health is asked without a key, all else with the same one"
    assert main([*job, "--out", str(tmp_path / "here")]) == 0
    ours, theirs = (read_results(tmp_path / name) for name in ("here", "served"))
    assert [[s["completion"] for s in row["samples"]] for row in ours] == [
        [s["completion"] for s in row["samples"]] for row in theirs
    ]


@pytest.mark.slow
def test_a_server_that_does_not_start_ends_the_job(tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    given = {"MODEL": "x", "SERVER": "false", "LOGS": str(tmp_path), "PATH": path, "PORT": str(two_free_ports())}
    job = start("vllm_servers.sbatch", ["evaluate"], **given)
    text, _ = job.communicate(timeout=60)
    assert job.returncode == 1
    assert "has ended: its log says why" in text


def two_free_ports() -> int:
    """The first of two neighbours."""
    while True:
        with socket.socket() as one, socket.socket() as two, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", 0))
            two.bind(("127.0.0.1", one.getsockname()[1] + 1))
            return int(one.getsockname()[1])


@pytest.mark.parametrize("script", sorted(CLUSTER.iterdir()), ids=lambda path: path.name)
def test_scripts_are_whole(script: Path) -> None:
    """They parse, and the recipes that their headers name are there."""
    if script.suffix == ".yaml":
        assert yaml.safe_load(script.read_text())["mixed_precision"] == "bf16"
    else:
        assert subprocess.run(["bash", "-n", script], timeout=30).returncode == 0
    named = re.findall(r"recipes/[\w./-]+\w", script.read_text())
    assert len(named) >= 3
    assert all((CLUSTER.parents[1] / name).is_file() for name in named)
