"""One GKD training step (no sampling) against TRL's two distillation losses: time, and peak memory.

Run: ``python tests/benchmarks/bench_gkd.py [--rounds 5] [--threads 2] [--dtype bfloat16] [--small]``. Student and
teacher are random models of the shapes of SmolLM2-135M and SmolLM2-360M (``--small``: much smaller ones, to see that it
runs), batch 4, prompts of 96 and completions of up to 160 tokens. On a CPU without bfloat16 units take ``--dtype
float32``.

Times alternate between the methods in one process; peak memory comes from one process per method, as the growth of its
resident set over the two loaded models (Linux). A step is forward, loss and backward of the student and forward of the
teacher, with all weights trained; the optimiser's own step is the same for all and left out. Asserts only that the
losses of stepkd and DistillationTrainer agree: GKDTrainer's takes softmax and sum in the logits' own bfloat16 and comes
out otherwise.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

SHAPES = {
    "student": {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "intermediate_size": 1536},
    "teacher": {"hidden_size": 960, "num_hidden_layers": 32, "num_attention_heads": 15, "intermediate_size": 2560},
}
BATCH, PROMPT, COMPLETION, VOCABULARY = 4, 96, 160, 49_152
METHODS = ("stepkd", "trl_gkd", "trl_distillation")


def model(kind: str, *, small: bool, dtype: str) -> Any:
    """A random model of a SmolLM2 shape."""
    shape = dict(SHAPES[kind])
    shape["num_key_value_heads"] = shape["num_attention_heads"] // 3
    if small:
        shape |= {"num_hidden_layers": 2}
    torch.manual_seed(len(kind))
    config = LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=True, max_position_embeddings=2048, **shape)
    return LlamaForCausalLM(config).to(getattr(torch, dtype))


def rows() -> list[tuple[list[int], list[int]]]:
    """Prompts and completions of random ids; completions of different lengths, as sampled ones have."""
    draw = torch.Generator().manual_seed(0)
    return [
        tuple(torch.randint(VOCABULARY, (n,), generator=draw).tolist() for n in (PROMPT, COMPLETION - 24 * i))
        for i in range(BATCH)
    ]  # type: ignore[misc]


def stepkd_step(student: Any, teacher: Any) -> Callable[[], Tensor]:
    """Hidden states of the needed positions and :func:`stepkd.losses.fused_sum`, as GKDModule has them."""
    from stepkd.data.collate import collate
    from stepkd.data.completion import Completion
    from stepkd.losses import fused_sum, generalized_jsd, tempered
    from stepkd.models.head import vocab_head
    from stepkd.models.packed import check_unpadded, unpadded_hidden
    from stepkd.teachers.signals import HiddenSignals

    examples = [Completion(p, c, id=str(i)) for i, (p, c) in enumerate(rows())]
    batch = collate(examples, 0)

    assert all(check_unpadded(each) for each in (student, teacher))

    def hidden(of: Any) -> Tensor:
        return unpadded_hidden(of, batch.input_ids_BT, batch.attention_mask_BT).flatten(0, 1)[batch.needed_N]

    def step() -> Tensor:
        with torch.no_grad():
            signals = HiddenSignals(vocab_head(teacher), hidden(teacher))

        def position(logits_CV: Tensor, *chunk: Tensor) -> Tensor:
            own, other, argmax_C = signals.compare(tempered(logits_CV), *chunk)
            value_C = generalized_jsd(own, other, beta=0.5)
            return torch.stack([value_C, (logits_CV.argmax(-1) == argmax_C).to(value_C)], dim=-1)

        weights_N = torch.full(batch.targets_N.shape, 1 / len(batch.targets_N))
        total, _ = fused_sum(
            position, vocab_head(student), hidden(student), weights_N, *signals.tensors, chunk_size=128
        )
        return total

    return step


def trl_inputs() -> dict[str, Tensor]:
    """One right-padded batch."""
    length = PROMPT + COMPLETION
    inputs = {name: torch.full((BATCH, length), fill) for name, fill in (("input_ids", 0), ("labels", -100))}
    inputs["attention_mask"] = torch.zeros(BATCH, length, dtype=torch.int64)
    for i, (prompt, completion) in enumerate(rows()):
        end = PROMPT + len(completion)
        inputs["input_ids"][i, :end] = torch.tensor([*prompt, *completion])
        inputs["labels"][i, PROMPT:end] = torch.tensor(completion)
        inputs["attention_mask"][i, :end] = 1
    return inputs


def trl_gkd_step(student: Any, teacher: Any) -> Callable[[], Tensor]:
    """The loss of TRL's GKDTrainer: logits of every position of both models."""
    from trl.experimental.gkd import GKDTrainer

    peer = SimpleNamespace(teacher_model=teacher, beta=0.5, generalized_jsd_loss=GKDTrainer.generalized_jsd_loss)
    inputs = trl_inputs()
    return lambda: GKDTrainer.compute_loss(peer, student, inputs)


def trl_distillation_step(student: Any, teacher: Any) -> Callable[[], Tensor]:
    """The loss of TRL's DistillationTrainer: hidden states of the completion's columns, a chunked divergence."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    inputs = trl_inputs()
    mask = (inputs["labels"][:, PROMPT:] != -100).long()

    def hidden(of: Any) -> Tensor:
        states = of.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        return states.last_hidden_state[:, PROMPT - 1 : -1]

    def step() -> Tensor:
        with torch.no_grad():
            of_teacher = hidden(teacher)
        heads = (student.lm_head.weight, teacher.lm_head.weight)
        return _chunked_divergence_loss(hidden(student), of_teacher, *heads, mask, 0.5)[0]

    return step


STEPS = {"stepkd": stepkd_step, "trl_gkd": trl_gkd_step, "trl_distillation": trl_distillation_step}


def timed(step: Callable[[], Tensor], student: Any) -> tuple[float, float]:
    """Seconds of one step, and its loss."""
    student.zero_grad(set_to_none=True)
    start = time.perf_counter()
    loss = step()
    loss.backward()
    return time.perf_counter() - start, loss.item()


def peak(method: str, **how: Any) -> None:
    """Print by how many MiB the resident set grows in two steps of one method."""
    student, teacher = model("student", **how), model("teacher", **how)
    step = STEPS[method](student, teacher)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is resident now
    before = resident("VmRSS")
    for _ in range(2):
        timed(step, student)
    print(resident("VmHWM") - before)


def resident(name: str) -> float:
    """A line of this process's memory status, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--peak", choices=METHODS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.peak:
        peak(arguments.peak, small=arguments.small, dtype=arguments.dtype)
        return
    how: dict[str, Any] = {"small": arguments.small, "dtype": arguments.dtype}
    student, teacher = model("student", **how), model("teacher", **how)
    steps = {name: make(student, teacher) for name, make in STEPS.items()}
    losses = {name: timed(step, student)[1] for name, step in steps.items()}  # also warms up
    assert abs(losses["stepkd"] - losses["trl_distillation"]) < 1e-3 * losses["stepkd"], losses
    times: dict[str, list[float]] = {name: [] for name in METHODS}
    for _ in range(arguments.rounds):
        for name, step in steps.items():
            times[name].append(timed(step, student)[0])
    more = ["--dtype", arguments.dtype, *(["--small"] if arguments.small else [])]
    base = None
    for name in METHODS:
        command = [sys.executable, __file__, "--peak", name, "--threads", str(arguments.threads), *more]
        memory = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        median = sorted(times[name])[len(times[name]) // 2]
        base = base or (median, memory)
        print(
            f"{name:<17} {median:6.2f} s a step (fastest {min(times[name]):.2f}), {memory:7,.0f} MiB more at the peak, "
            f"loss {losses[name]:.4f}; stepkd takes {base[0] / median:.2f} of its time, {base[1] / memory:.2f} of its "
            "memory"
        )


if __name__ == "__main__":
    main()
