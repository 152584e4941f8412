"""Who started this process, does the recipe agree with it, and which of accelerate's settings would have no effect.

The rules are Lightning 2.6's own (``AcceleratorConnector._choose_and_init_cluster_environment``): a torch elastic
agent wins over SLURM, SLURM counts when ``SLURM_NTASKS`` is set and the job is not called ``bash`` or ``interactive``,
and otherwise Lightning is the launcher. What Lightning would meet with a hang, a bare traceback or silence stops here
with a :class:`~stepkd.errors.ConfigError` that says what to change. Lightning's classes for these environments say the
same of ranks and sizes (a test compares them); they are not used, because this runs before torch and refuses what they
only warn of.

What ``accelerate launch`` tells a process, read off accelerate 1.15 (``accelerate/utils/launch.py``) and its children:

- ``--multi_gpu``, FSDP, Megatron and single-node DeepSpeed start a torch elastic agent: the child sees
  ``TORCHELASTIC_RUN_ID``, ``RANK``, ``LOCAL_RANK``, ``WORLD_SIZE``, ``LOCAL_WORLD_SIZE``.
- Every other mode starts *one* child and always sets ``ACCELERATE_USE_CPU`` (``True`` or ``False``), which the
  elastic modes never set. The process count itself is not passed on. Its only trace is that ``MASTER_ADDR`` and
  ``MASTER_PORT`` are set when more than one process or machine was asked for. Both can also be inherited from the
  user's shell, so where the parent's command line is readable (Linux, ``/proc``) and names a count, that one decides.
- ``ACCELERATE_MIXED_PRECISION=no`` and ``ACCELERATE_DYNAMO_BACKEND=NO`` are always set: the defaults, which pass.
- ``--gradient_accumulation_steps`` reaches the environment only with DeepSpeed, or when users export it by hand; in
  every mode the parent of the process is accelerate's own, so the option is read off its command line.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import psutil  # type: ignore[import-untyped]

from stepkd.errors import ConfigError

logger = logging.getLogger(__name__)
Launcher = Literal["plain", "elastic", "slurm"]

_MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "JSM_NAMESPACE_SIZE")
_STEP_MARKS = ("SLURM_STEP_ID", "SLURM_STEPID", "SLURM_STEP_NUM_TASKS")
_LEFT_OPEN: dict[str, tuple[Any, ...]] = {
    "devices": (None, "auto", -1, "-1"),
    "num_nodes": (None, 1, "1", "auto"),  # 1 cannot be told from Lightning's default
    "accelerator": (None, "auto"),
    "precision": (None,),
}
"""Values by which the user leaves a setting to us."""
_SHARDED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}
"""Ways of accelerate to shard a model, by their switches; their other settings do nothing without."""
_IGNORED = {
    "MIXED_PRECISION": (
        ("", "no", "bf16"),
        "accelerate asks for mixed precision {!r} (ACCELERATE_MIXED_PRECISION), which is not supported: it needs loss "
        "scaling. Launch with `--mixed_precision bf16`, or with `no` and `trainer.precision: bf16-mixed` in the "
        "recipe.",
    ),
    "GRADIENT_ACCUMULATION_STEPS": (
        ("", "1", "auto"),
        "accelerate asks for gradient accumulation over {} batches (--gradient_accumulation_steps or "
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS), which Lightning ignores. Drop it, and set "
        "`data.init_args.global_batch_size` in the recipe: one batch is one optimiser step over all processes, and "
        "stepkd splits it into micro-batches that fit in memory.",
    ),
    "DYNAMO_BACKEND": (
        ("", "no"),
        "accelerate asks for compilation with the dynamo backend {!r} (ACCELERATE_DYNAMO_BACKEND), which Lightning "
        "ignores. Launch with `--dynamo_backend no`; nothing in the recipe needs to change.",
    ),
}
"""Settings that are single values, by the names that follow ``ACCELERATE_``: which are neutral, and what to say of
others."""


@dataclass(frozen=True, kw_only=True)
class LaunchInfo:
    """Where this process stands among the processes of the launch."""

    launcher: Launcher = "plain"
    """"elastic" (torchrun, ``accelerate launch --multi_gpu``), "slurm" (srun), "plain" (Lightning starts the rest)."""
    rank: int = 0
    """Index of this process over all nodes, 0 to world_size - 1."""
    local_rank: int = 0
    """Index of this process on its node, 0 to local_world_size - 1."""
    world_size: int = 1
    """Number of processes over all nodes, as far as the environment tells ("plain": those started so far)."""
    local_world_size: int = 1
    """Number of processes on each node; the same on all nodes."""
    num_nodes: int = 1
    """Number of nodes; world_size = num_nodes * local_world_size."""
    cpu_only: bool = False
    """Whether the launcher was told to use the CPU (``accelerate launch --cpu``)."""
    bf16: bool = False
    """Whether the launcher was told to train in mixed precision (``accelerate launch --mixed_precision bf16``)."""

    def __post_init__(self) -> None:
        if self.num_nodes * self.local_world_size != self.world_size:
            raise ConfigError(
                f"the {self.launcher} launcher started {self.world_size} processes, but {self.num_nodes} node(s) with "
                f"{self.local_world_size} process(es) each make {self.num_nodes * self.local_world_size}; "
                "start the same number of processes on every node"
            )

    @property
    def is_rank_zero(self) -> bool:
        """Whether this process writes the run's files."""
        return self.rank == 0


def detect_launch(environ: Mapping[str, str] = os.environ) -> LaunchInfo:
    """Read the launcher, the ranks and the sizes off the environment.

    Args:
        environ: environment variables.

    Returns:
        The launch. For "plain" the sizes are 1 until Lightning has started more processes; over several nodes they
        are then lower bounds, and only :attr:`LaunchInfo.is_rank_zero` is exact.

    Raises:
        ConfigError: the variables contradict each other, or belong to a launch that Lightning cannot join.
    """
    launcher: Launcher = "plain"
    if "TORCHELASTIC_RUN_ID" in environ:
        launcher = "elastic"
        rank, local_rank = _integer(environ, "RANK"), _integer(environ, "LOCAL_RANK")
        world_size, local_size = _integer(environ, "WORLD_SIZE"), _integer(environ, "LOCAL_WORLD_SIZE")
    elif "SLURM_NTASKS" in environ and environ.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        launcher = "slurm"
        rank, local_rank = _integer(environ, "SLURM_PROCID", 0), _integer(environ, "SLURM_LOCALID", 0)
        world_size, local_size = _integer(environ, "SLURM_NTASKS"), _integer(environ, "SLURM_NTASKS_PER_NODE", 1)
        if world_size > 1:
            _check_slurm(environ, world_size)
    else:
        _check_mpi(environ)
        # Lightning exports LOCAL_RANK, NODE_RANK and WORLD_SIZE to itself and to the processes that it starts, but not
        # how many run on each node: over several nodes the sizes are lower bounds, and only "rank is 0" is exact.
        local_rank = _integer(environ, "LOCAL_RANK", 0)
        node_rank = _integer(environ, "NODE_RANK", _integer(environ, "GROUP_RANK", 0))
        local_size = max(_integer(environ, "WORLD_SIZE", 1) if node_rank == 0 else 1, local_rank + 1)
        rank, world_size = node_rank * local_size + local_rank, (node_rank + 1) * local_size
    nodes = max(world_size // max(local_size, 1), 1)
    return LaunchInfo(
        launcher=launcher,
        rank=rank,
        local_rank=local_rank,
        world_size=world_size,
        local_world_size=local_size,
        num_nodes=_integer(environ, "SLURM_NNODES", nodes) if launcher == "slurm" else nodes,
        cpu_only=launcher != "elastic" and _is_true(environ.get("ACCELERATE_USE_CPU")),
        bf16=environ.get("ACCELERATE_MIXED_PRECISION", "").strip().lower() == "bf16",
    )


def rank_device(name: str, launch: LaunchInfo) -> str:
    """The name of the device of one process of a launch: ``auto`` is a GPU for each where there are several of both."""
    if name == "auto" and launch.local_world_size > 1:
        import torch

        if torch.cuda.is_available():
            return f"cuda:{launch.local_rank % torch.cuda.device_count()}"
    return name


def _check_slurm(environ: Mapping[str, str], tasks: int) -> None:
    if not any(name in environ for name in _STEP_MARKS):
        raise ConfigError(
            f"SLURM gave this job {tasks} tasks (SLURM_NTASKS), but this process was not started by srun, so it "
            "would wait for the other tasks for ever. Put `srun` before the command in the batch script; to run one "
            "process by hand, unset SLURM_NTASKS or name the job `interactive`"
        )
    if "SLURM_NTASKS_PER_NODE" not in environ:
        raise ConfigError(
            f"the SLURM job asks for --ntasks={tasks}, which Lightning does not support; ask for "
            "--nodes=N and --ntasks-per-node=G (one task per GPU) instead"
        )


def _check_mpi(environ: Mapping[str, str]) -> None:
    for name in () if "LOCAL_RANK" in environ else _MPI_SIZES:
        if environ.get(name, "1") not in ("", "0", "1"):
            raise ConfigError(
                f"MPI started {environ[name]} processes ({name}), which stepkd does not support; start them with "
                "torchrun, srun or `accelerate launch --multi_gpu` (it works on CPU machines too)"
            )


def _integer(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name, default)
    if text is None:
        raise ConfigError(
            f"the launcher set no {name}; start the run with torchrun, srun, `accelerate launch --multi_gpu` or "
            "plainly, and unset the variables left over from another launch"
        )
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"the environment variable {name} is {text!r}, which is not a whole number") from None


def _is_true(value: str | None) -> bool:
    """Whether accelerate reads the text of a variable as true."""
    return value is not None and value.strip().lower() in ("1", "true", "t", "yes", "y", "on")


def check_launch(
    environ: Mapping[str, str] = os.environ,
    trainer_settings: Mapping[str, Any] | None = None,
    *,
    parent_command: Sequence[str] | None = None,
) -> LaunchInfo:
    """Stop when the launcher promises something that Lightning would ignore or contradict.

    Args:
        environ: environment variables.
        trainer_settings: Trainer arguments of the recipe, of which ``devices``, ``num_nodes`` and ``accelerator`` are
            read; None for a command that trains nothing.
        parent_command: words of the parent's command line; read when None and ``environ`` is real.

    Returns:
        The launch, for :func:`trainer_defaults`.

    Raises:
        ConfigError: one line per contradiction, each with what to put in the recipe or on the command line instead.
    """
    if parent_command is None:
        parent_command = _parent_command() if environ is os.environ else ()
    info = detect_launch(environ)
    problems = ignored_settings(environ, parent_command)
    asked = single_child_count(environ, parent_command)
    # Under srun every task may run its own single-child `accelerate launch`; then SLURM holds the processes together.
    if asked not in (None, 1, info.world_size) and not (asked == 0 and info.launcher == "slurm"):
        problems.append(_one_process_only(environ, asked or 0))
    problems += _contradictions(info, trainer_settings or {})
    if trainer_settings is None and info.bf16 and info.is_rank_zero:
        logger.warning("accelerate's mixed precision bf16 is for training; this command computes in the model's dtype")
    if problems:
        raise ConfigError(problems[0] if len(problems) == 1 else "\n".join(f"- {problem}" for problem in problems))
    return info


def check_alone(command: str, instead: str = "start it without a launcher") -> None:
    """Stop a command that runs in one process where a launcher started several.

    Raises:
        ConfigError: as :func:`check_launch`, or there are several processes.
    """
    if check_launch().world_size > 1:
        raise ConfigError(f"{command} runs in one process: {instead}")


def ignored_settings(environ: Mapping[str, str], parent_command: Sequence[str] = ()) -> list[str]:
    """List the accelerate settings in force that Lightning would ignore, each with what to do instead.

    Args:
        environ: environment variables of this process.
        parent_command: words of the parent's command line, empty when it cannot be read.

    Returns:
        One sentence or two per setting, empty when all are at their neutral value.
    """
    found = []
    for name, (neutral, text) in _IGNORED.items():
        asked = environ.get(f"ACCELERATE_{name}", "").strip() or _options(parent_command).get(name.lower(), "")
        if asked.lower() not in neutral:
            found.append(text.format(asked))
    for switch, what in _SHARDED.items():
        if _is_true(environ.get(switch)):
            untested = " (recipes/strategy/deepspeed_zero2.yaml and deepspeed_zero3.yaml are untested)"
            found.append(
                f"accelerate asks for {what} ({switch}), which Lightning ignores, while transformers obeys parts of it "
                "when it loads weights. Launch with `accelerate launch --multi_gpu --num_processes N -m stepkd ...` "
                "(or torchrun), and to shard weights, gradients and optimiser state add `--config "
                f"recipes/strategy/fsdp2.yaml`{untested if what == 'DeepSpeed' else ''}."
            )
    return found


def single_child_count(environ: Mapping[str, str], parent_command: Sequence[str] = ()) -> int | None:
    """How many processes the user asked of an ``accelerate launch`` mode that starts only one.

    Args:
        environ: environment variables of this process.
        parent_command: words of the parent's command line, empty when it cannot be read.

    Returns:
        None when this process was not started by accelerate's single-child launcher; 1 when one process was asked
        for; the number asked for when it is known; 0 when it is more than one but the number cannot be seen.
    """
    if "ACCELERATE_USE_CPU" not in environ or "TORCHELASTIC_RUN_ID" in environ or "LOCAL_RANK" in environ:
        return None
    options = _options(parent_command)
    if options.get("num_processes", "").isdigit():
        machines = options.get("num_machines", "")
        return max(int(options["num_processes"]), int(machines) if machines.isdigit() else 1, 1)
    return 0 if "MASTER_ADDR" in environ and "MASTER_PORT" in environ else 1


def _options(command: Sequence[str]) -> dict[str, str]:
    """Values of the options of an ``accelerate launch`` command line, by name; empty for any other command."""
    found = re.search(r"(?:accelerate launch|accelerate\.commands\.launch|accelerate-launch)( .*)", " ".join(command))
    if found is None:
        return {}
    own = re.split(r" (?:-m|--module) ", found[1])[0]  # what follows belongs to the script
    values = re.findall(r" --([\w-]+)[= ](?!--)(\S+)", own)
    return {name.replace("-", "_"): value for name, value in reversed(values)}  # the first of one name counts


def _parent_command() -> Sequence[str]:
    """Words of the parent's command line; empty where they cannot be read."""
    try:
        return psutil.Process().parent().cmdline()
    except (psutil.Error, AttributeError):
        return ()


def _one_process_only(environ: Mapping[str, str], asked: int) -> str:
    flag = "--cpu " if _is_true(environ.get("ACCELERATE_USE_CPU")) else ""
    number = str(asked or "N")
    text = (
        f"`accelerate launch {flag}--num_processes {number}` was asked for {asked or 'several'} processes but starts "
        f"one plain process. Use `accelerate launch --multi_gpu --num_processes {number} -m stepkd ...` or "
        f"`torchrun --nproc_per_node {number} -m stepkd ...` (both work on CPU machines over gloo), or "
        f"`--num_processes 1` with `trainer.devices: {number}` in the recipe."
    )
    left_over = " If it was asked for one process, MASTER_ADDR and MASTER_PORT are left over in your shell: unset them."
    return text if asked else text + left_over


def _contradictions(info: LaunchInfo, settings: Mapping[str, Any]) -> list[str]:
    problems: list[str] = []
    if info.cpu_only and settings.get("accelerator") not in (*_LEFT_OPEN["accelerator"], "cpu"):
        problems.append(
            f"`accelerate launch --cpu` contradicts `trainer.accelerator: {settings['accelerator']}` in the recipe; "
            "drop `--cpu` or put `trainer.accelerator: cpu` in the recipe"
        )
    if info.launcher == "plain":
        return problems
    where = "the SLURM job" if info.launcher == "slurm" else "the launcher (torchrun or accelerate)"
    started = {"devices": (info.local_world_size, "process(es) per node"), "num_nodes": (info.num_nodes, "node(s)")}
    for name, (number, what) in started.items():
        asked = settings.get(name)
        listed = asked.strip(",").split(",") if isinstance(asked, str) and "," in asked else asked
        count = len(listed) if isinstance(listed, list | tuple) else listed
        if asked not in _LEFT_OPEN[name] and str(count) != str(number):
            problems.append(
                f"`trainer.{name}: {asked}` in the recipe, but {where} started {number} {what}; remove `trainer.{name}`"
                " (it follows the launcher) or change what is started"
            )
    return problems


def trainer_defaults(info: LaunchInfo, settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Give the Trainer arguments that follow from the launch.

    Args:
        info: the launch, from :func:`check_launch`.
        settings: Trainer arguments of the recipe; those set there are left out of the result.

    Returns:
        ``devices``, ``num_nodes`` and ``accelerator``, and ``precision`` where the launcher asks for one. Under "plain"
        the devices stay with Lightning ("auto": all GPUs, or one CPU process). On CPU Lightning's "auto" strategy then
        runs DDP over gloo.
    """
    derived: dict[str, Any] = {
        "devices": "auto" if info.launcher == "plain" else info.local_world_size,
        "num_nodes": 1 if info.launcher == "plain" else info.num_nodes,
        "accelerator": "cpu" if info.cpu_only else "auto",
    }
    if info.bf16:
        derived["precision"] = "bf16-mixed"
    return {name: value for name, value in derived.items() if (settings or {}).get(name) in _LEFT_OPEN[name]}
