from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from stepkd.errors import ConfigError
from stepkd.runs.launcher import LaunchInfo, check_launch, detect_launch, single_child_count, trainer_defaults

# What accelerate 1.15 sets whatever the user asked for.
ACCELERATE = {
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_DYNAMO_BACKEND": "NO",
    "ACCELERATE_DYNAMO_MODE": "default",
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False",
    "ACCELERATE_DYNAMO_USE_DYNAMIC": "False",
    "OMP_NUM_THREADS": "1",
}
MASTER = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
ELASTIC = {
    "TORCHELASTIC_RUN_ID": "none",
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "LOCAL_WORLD_SIZE": "4",
    **MASTER,
}
SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_JOB_NAME": "train",
    "SLURM_NTASKS": "8",
    "SLURM_NTASKS_PER_NODE": "4",
    "SLURM_NNODES": "2",
    "SLURM_PROCID": "6",
    "SLURM_LOCALID": "2",
    "SLURM_NODEID": "1",
    "SLURM_STEP_ID": "0",
}


def test_no_variables_is_a_plain_single_process() -> None:
    assert detect_launch({}) == LaunchInfo()
    assert trainer_defaults(detect_launch({})) == {"devices": "auto", "num_nodes": 1, "accelerator": "auto"}


def test_elastic_sizes_and_ranks() -> None:
    info = detect_launch(ELASTIC)
    assert info == LaunchInfo(launcher="elastic", rank=5, local_rank=1, world_size=8, local_world_size=4, num_nodes=2)
    assert trainer_defaults(info) == {"devices": 4, "num_nodes": 2, "accelerator": "auto"}


def test_slurm_sizes_and_ranks() -> None:
    info = detect_launch(SLURM)
    assert info == LaunchInfo(launcher="slurm", rank=6, local_rank=2, world_size=8, local_world_size=4, num_nodes=2)
    assert trainer_defaults(info)["devices"] == 4


def test_elastic_wins_over_slurm_as_in_lightning() -> None:
    assert detect_launch({**SLURM, **ELASTIC}).launcher == "elastic"


@pytest.mark.parametrize("name", ["bash", "interactive"])
def test_an_interactive_slurm_shell_is_plain(name: str) -> None:
    assert detect_launch({**SLURM, "SLURM_JOB_NAME": name}).launcher == "plain"


@pytest.mark.parametrize("environ", [{}, ELASTIC, SLURM, {**SLURM, **ELASTIC}, {**SLURM, "SLURM_JOB_NAME": "bash"}])
def test_detection_equals_lightnings(environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
    from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

    for name in (*ELASTIC, *SLURM):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    info = detect_launch()
    expected = "elastic" if TorchElasticEnvironment.detect() else "slurm" if SLURMEnvironment.detect() else "plain"
    assert info.launcher == expected
    if info.launcher != "plain":
        theirs = TorchElasticEnvironment() if expected == "elastic" else SLURMEnvironment()
        assert (theirs.world_size(), theirs.global_rank(), theirs.local_rank()) == (
            info.world_size,
            info.rank,
            info.local_rank,
        )
        theirs.validate_settings(info.local_world_size, info.num_nodes)


def test_slurm_batch_script_without_srun_is_stopped_instead_of_hanging() -> None:
    environ = {name: value for name, value in SLURM.items() if name != "SLURM_STEP_ID"}
    with pytest.raises(ConfigError, match="Put `srun` before the command"):
        detect_launch(environ)
    assert detect_launch({**environ, "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1", "SLURM_NNODES": "1",
                          "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}).world_size == 1  # fmt: skip


def test_slurm_ntasks_without_per_node_names_the_option() -> None:
    environ = {name: value for name, value in SLURM.items() if name != "SLURM_NTASKS_PER_NODE"}
    with pytest.raises(ConfigError, match="--ntasks-per-node=G"):
        detect_launch(environ)


def test_lightnings_own_children_are_not_rank_zero() -> None:
    # Variables of Lightning's subprocess launcher for `devices: 2`.
    started = {"NODE_RANK": "0", "WORLD_SIZE": "2", **MASTER}
    assert detect_launch({**started, "LOCAL_RANK": "0"}).is_rank_zero
    child = detect_launch({**started, "LOCAL_RANK": "1"})
    assert (child.launcher, child.rank, child.world_size) == ("plain", 1, 2)


@pytest.mark.parametrize("local_rank", [None, "0", "1"])
def test_the_second_node_of_a_plain_launch_is_never_rank_zero(local_rank: str | None) -> None:
    environ = {"NODE_RANK": "1"} | ({} if local_rank is None else {"LOCAL_RANK": local_rank, "WORLD_SIZE": "4"})
    assert not detect_launch(environ).is_rank_zero


def test_mpi_is_refused() -> None:
    with pytest.raises(ConfigError, match="MPI started 4 processes"):
        detect_launch({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2"})
    assert detect_launch({"PMI_SIZE": "1"}).world_size == 1


def test_unequal_nodes_are_refused() -> None:
    with pytest.raises(ConfigError, match="same number of processes on every node"):
        detect_launch({**ELASTIC, "WORLD_SIZE": "7"})


def test_missing_and_malformed_variables_are_named() -> None:
    with pytest.raises(ConfigError, match="the launcher set no LOCAL_WORLD_SIZE"):
        detect_launch({name: value for name, value in ELASTIC.items() if name != "LOCAL_WORLD_SIZE"})
    with pytest.raises(ConfigError, match="WORLD_SIZE is 'two'"):
        detect_launch({**ELASTIC, "WORLD_SIZE": "two"})


FSDP2 = "add `--config recipes/strategy/fsdp2.yaml`"


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "mixed precision 'fp16'"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "mixed precision 'fp8'"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "`data.init_args.global_batch_size` in the recipe"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "--dynamo_backend no"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, FSDP2),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, FSDP2 + " (recipes/strategy/deepspeed_zero2.yaml and"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true", "MEGATRON_LM_TP_DEGREE": "2"}, FSDP2),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, FSDP2),
    ],
)
def test_settings_that_lightning_ignores_stop_with_advice(extra: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_launch({**ELASTIC, **ACCELERATE, **extra}, {})
    assert message in str(caught.value)
    assert next(iter(extra)) in str(caught.value)


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"},
        {"ACCELERATE_USE_FSDP": "false", "FSDP_VERSION": "1"},
        {"ACCELERATE_USE_DEEPSPEED": "false"},
        {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"},
        {"ACCELERATE_MIXED_PRECISION": "NO"},
    ],
)
def test_neutral_settings_pass(extra: dict[str, str]) -> None:
    assert check_launch({**ELASTIC, **ACCELERATE, **extra}, {}).world_size == 8


@pytest.mark.parametrize("launch", [ELASTIC, SLURM, {"ACCELERATE_USE_CPU": "True"}])
def test_the_launchers_bfloat16_is_taken_where_the_recipe_leaves_precision_open(launch: dict[str, str]) -> None:
    info = check_launch({**launch, **ACCELERATE, "ACCELERATE_MIXED_PRECISION": "bf16"}, {})
    assert info.bf16
    assert trainer_defaults(info)["precision"] == "bf16-mixed"
    assert trainer_defaults(info, {"precision": None})["precision"] == "bf16-mixed"
    assert "precision" not in trainer_defaults(info, {"precision": "32-true"})
    assert "precision" not in trainer_defaults(check_launch({**launch, **ACCELERATE}, {}))


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("5", 0)])
def test_commands_that_train_nothing_say_that_bfloat16_is_not_theirs(
    rank: str, lines: int, caplog: pytest.LogCaptureFixture
) -> None:
    environ = {**ELASTIC, "RANK": rank, **ACCELERATE, "ACCELERATE_MIXED_PRECISION": "bf16"}
    check_launch(environ)
    assert caplog.text.count("is for training") == lines
    check_launch(environ, {})
    assert caplog.text.count("is for training") == lines


@pytest.mark.parametrize("option", [["--gradient_accumulation_steps", "4"], ["--gradient-accumulation-steps=4"]])
@pytest.mark.parametrize("start", [["accelerate", "launch"], ["python", "-m", "accelerate.commands.launch"]])
def test_accumulation_is_read_off_the_launchers_command_line(option: list[str], start: list[str]) -> None:
    command = [*start, "--multi_gpu", *option, "-m", "stepkd", "fit"]
    with pytest.raises(ConfigError, match=r"gradient accumulation over 4 batches .*data\.init_args\.global_batch_size"):
        check_launch({**ELASTIC, **ACCELERATE}, {}, parent_command=command)
    neutral = [*start, "--gradient_accumulation_steps", "1", "x.py"]
    for other in (["bash", *option], neutral, [*start, "-m", "x", *option]):
        check_launch({**ELASTIC, **ACCELERATE}, {}, parent_command=other)


def test_several_problems_are_all_told() -> None:
    environ = {**ELASTIC, "ACCELERATE_MIXED_PRECISION": "fp16", "ACCELERATE_USE_FSDP": "true"}
    with pytest.raises(ConfigError) as caught:
        check_launch(environ, {"devices": 3})
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert all(line.startswith("- ") for line in lines)


@pytest.mark.parametrize("devices", ["auto", -1, "-1", None, 4, "4", [0, 1, 2, 3], "0,1,2,3"])
@pytest.mark.parametrize("num_nodes", [None, 1, 2])
def test_agreeing_devices_and_nodes_pass(devices: object, num_nodes: int | None) -> None:
    for environ in (ELASTIC, SLURM):
        settings = {"devices": devices, "num_nodes": num_nodes}
        derived = trainer_defaults(check_launch(environ, settings), settings)
        # What the user left open is derived, what was said stays.
        assert derived.get("devices", 4) == 4
        assert ("devices" in derived) == (devices in ("auto", -1, "-1", None))
        assert ("num_nodes" in derived) == (num_nodes != 2)


def test_contradicting_devices_and_nodes_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"`trainer.devices: 2` .* started 4 process"):
        check_launch(ELASTIC, {"devices": 2})
    with pytest.raises(ConfigError, match=r"`trainer.devices: \[0\]` .* the SLURM job started 4"):
        check_launch(SLURM, {"devices": [0]})
    with pytest.raises(ConfigError, match=r"`trainer.num_nodes: 3` .* started 2 node"):
        check_launch(ELASTIC, {"devices": "auto", "num_nodes": 3})
    with pytest.raises(ConfigError, match=r"`trainer.devices: all` .* started 4 process"):
        check_launch(ELASTIC, {"devices": "all"})


def test_a_plain_launch_leaves_devices_to_the_recipe() -> None:
    settings = {"devices": 2, "num_nodes": 1, "accelerator": "cpu"}
    assert trainer_defaults(check_launch({}, settings), settings) == {"num_nodes": 1}


def test_cpu_flag_reaches_the_accelerator() -> None:
    environ = {**ACCELERATE, "ACCELERATE_USE_CPU": "True"}
    assert trainer_defaults(check_launch(environ, {}))["accelerator"] == "cpu"
    with pytest.raises(ConfigError, match=r"`accelerate launch --cpu` contradicts `trainer.accelerator: gpu`"):
        check_launch(environ, {"accelerator": "gpu"})


COMMAND = ("/usr/bin/python3", "/usr/bin/accelerate", "launch", "--cpu")


@pytest.mark.parametrize(
    ("environ", "command", "count"),
    [
        ({}, (), None),
        ({"ACCELERATE_USE_CPU": "True"}, (), 1),
        ({"ACCELERATE_USE_CPU": "True", **MASTER}, (), 0),
        ({"ACCELERATE_USE_CPU": "True", **MASTER}, (*COMMAND, "--num_processes", "2", "x.py"), 2),
        ({"ACCELERATE_USE_CPU": "True", **MASTER}, (*COMMAND, "--num-processes=3", "x.py"), 3),
        ({"ACCELERATE_USE_CPU": "True", **MASTER}, (*COMMAND, "--num_processes", "1", "x.py"), 1),
        ({"ACCELERATE_USE_CPU": "True", **MASTER}, (*COMMAND, "x.py"), 0),
        ({"ACCELERATE_USE_CPU": "True", **MASTER}, ("bash", "launch", "--num_processes", "1"), 0),
        ({"ACCELERATE_USE_CPU": "True", **ELASTIC}, (*COMMAND, "--num_processes", "2"), None),
        ({"ACCELERATE_USE_CPU": "True", "LOCAL_RANK": "1", **MASTER}, (), None),
    ],
)
def test_single_child_count(environ: dict[str, str], command: tuple[str, ...], count: int | None) -> None:
    assert single_child_count(environ, command) == count


def test_single_child_for_several_processes_is_refused() -> None:
    environ = {**ACCELERATE, "ACCELERATE_USE_CPU": "True", **MASTER}
    with pytest.raises(ConfigError, match=r"asked for several processes .* left over in your shell"):
        check_launch(environ, {})
    with pytest.raises(ConfigError, match=r"--multi_gpu --num_processes 3 .*`trainer.devices: 3` in the recipe\.$"):
        check_launch(environ, {}, parent_command=(*COMMAND, "--num_processes", "3", "x.py"))
    assert check_launch(environ, {}, parent_command=(*COMMAND, "--num_processes", "1", "x.py")).world_size == 1


def test_one_accelerate_per_slurm_task_passes() -> None:
    environ = {**SLURM, **ACCELERATE, "ACCELERATE_USE_CPU": "False", **MASTER}
    assert check_launch(environ, {}).world_size == 8
    with pytest.raises(ConfigError, match="asked for 2 processes but starts one"):
        check_launch(environ, {}, parent_command=(*COMMAND, "--num_processes", "2"))


# --- real launchers ---

SCRIPT = """
import json, os, sys
from stepkd.errors import ConfigError
from stepkd.runs.launcher import check_launch, trainer_defaults
try:
    info = check_launch(os.environ, json.loads(sys.argv[2]))
    result = {"launcher": info.launcher, "rank": info.rank, "world": info.world_size, **trainer_defaults(info)}
except ConfigError as error:
    result = {"error": str(error)}
result["heavy"] = sorted({"torch", "lightning", "transformers"} & set(sys.modules))
with open(os.path.join(sys.argv[1], f"{os.getpid()}.json"), "w") as stream:
    json.dump(result, stream)
"""


def launch(
    command: list[str],
    folder: Path,
    root: Path,
    settings: dict[str, object] | None = None,
    nodes: Sequence[list[str]] = ([],),
) -> list[dict]:
    """What the guard says in every process of a launch; ``nodes``: further options of every machine's launcher."""
    script, out = folder / "script.py", folder / "out"
    script.write_text(SCRIPT, encoding="utf-8")
    out.mkdir()
    dirty = ("ACCELERATE_", "SLURM_", "TORCHELASTIC_", "FSDP_", "MASTER_", "OMPI_", "PMI_")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(dirty)}
    environ["PYTHONPATH"] = str(root)
    # No accelerate config file of the machine may leak in.
    environ["HF_HOME"] = str(folder)
    started = [
        subprocess.Popen(
            [sys.executable, "-m", *command, *node, str(script), str(out), json.dumps(settings or {})],
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in nodes
    ]
    texts = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0] * len(started), texts[0][-2000:]
    results = [json.loads(path.read_text(encoding="utf-8")) for path in out.iterdir()]
    assert all(result.pop("heavy") == [] for result in results), "the guard must not import torch"
    return sorted(results, key=lambda result: result.get("rank", 0))


@pytest.mark.slow
def test_real_torchrun(tmp_path: Path, repo_root: Path) -> None:
    results = launch(["torch.distributed.run", "--nproc_per_node", "2"], tmp_path, repo_root)
    expected = {"launcher": "elastic", "world": 2, "devices": 2, "num_nodes": 1, "accelerator": "auto"}
    assert results == [{"rank": rank, **expected} for rank in (0, 1)]


@pytest.mark.slow
def test_real_accelerate_multi_gpu(tmp_path: Path, repo_root: Path) -> None:
    pytest.importorskip("accelerate")
    command = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    accumulation = ["--gradient_accumulation_steps", "3"]
    results = launch([*command, "--mixed_precision", "fp16", *accumulation], tmp_path, repo_root, {"devices": "auto"})
    assert len(results) == 2
    for result in results:
        assert "mixed precision 'fp16'" in result["error"]
        assert "gradient accumulation over 3 batches" in result["error"]


CLUSTER = Path(__file__).resolve().parents[2] / "recipes" / "cluster"


@pytest.mark.slow
@pytest.mark.parametrize("machines", [1, 2])
def test_the_files_for_accelerate_start_two_processes_on_cpus(machines: int, tmp_path: Path, repo_root: Path) -> None:
    """Two processes in place of eight or sixteen, on one machine; two agents stand in for two machines."""
    pytest.importorskip("accelerate")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = ["--main_process_ip", "localhost", "--main_process_port", str(free.getsockname()[1])]
    file = CLUSTER / ("accelerate_8gpu.yaml" if machines == 1 else "accelerate_2nodes.yaml")
    command = ["accelerate.commands.launch", "--config_file", str(file), "--num_processes", "2", *address]
    nodes = [["--machine_rank", str(rank)] for rank in range(machines)]
    results = launch(command, tmp_path, repo_root, {"precision": None}, nodes)
    expected = {"launcher": "elastic", "world": 2, "devices": 2 // machines, "num_nodes": machines}
    expected |= {"accelerator": "auto", "precision": "bf16-mixed"}
    assert results == [{"rank": rank, **expected} for rank in (0, 1)]


@pytest.mark.slow
def test_real_accelerate_cpu_with_two_processes(tmp_path: Path, repo_root: Path) -> None:
    pytest.importorskip("accelerate")
    results = launch(["accelerate.commands.launch", "--cpu", "--num_processes", "2"], tmp_path, repo_root)
    assert len(results) == 1
    assert "asked for 2 processes but starts one plain process" in results[0]["error"]


@pytest.mark.slow
def test_real_accelerate_cpu_with_one_process(tmp_path: Path, repo_root: Path) -> None:
    pytest.importorskip("accelerate")
    command = ["accelerate.commands.launch", "--config_file", str(CLUSTER / "accelerate_1gpu.yaml"), "--cpu"]
    expected = {"launcher": "plain", "rank": 0, "world": 1, "devices": "auto", "num_nodes": 1, "accelerator": "cpu"}
    assert launch(command, tmp_path, repo_root) == [expected | {"precision": "bf16-mixed"}]
