"""Memory of a divergence over the vocabulary: `fused_sum` in chunks against logits of all positions at once.

Run: ``python tests/benchmarks/bench_head_memory.py [--chunk 128]``. Hidden states of width 576 of student and teacher,
bfloat16, generalised JSD, heads of both, the student's trained and the teacher's frozen; vocabularies of 8k, 49k, 152k
tokens, 256 to 4,096 positions. One process per cell; what is printed is the growth of its resident set (Linux) over
hidden states, heads and the gradients of both, in MiB, the student head's sum of gradients in float32 included. Plain
logits are left out where they would need more than ``--most`` GiB.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

WIDTH = 576
VOCABULARIES = (8_192, 49_152, 151_936)
POSITIONS = (256, 1_024, 4_096)
PLAIN_COPIES = 9  # float32 tensors over the vocabulary that plain autograd holds at once, about


def resident(name: str) -> float:
    """A line of this process's memory status, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def measure(method: str, vocabulary: int, positions: int, chunk: int) -> None:
    """Print by how many MiB one forward and backward pass raises the peak."""
    from stepkd.losses import VocabHead, fused_sum, generalized_jsd, tempered
    from stepkd.teachers.signals import HiddenSignals

    torch.set_num_threads(2)
    torch.manual_seed(0)
    heads = [nn.Linear(WIDTH, vocabulary, bias=False, dtype=torch.bfloat16) for _ in range(2)]
    heads[1].requires_grad_(False)
    hidden, other = (torch.randn(positions, WIDTH, dtype=torch.bfloat16) for _ in range(2))
    hidden.requires_grad_()
    hidden.grad, heads[0].weight.grad = torch.zeros_like(hidden), torch.zeros_like(heads[0].weight)
    signals = HiddenSignals(VocabHead(heads[1]), other)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    if method == "fused":

        def position(logits: torch.Tensor, *part: torch.Tensor) -> torch.Tensor:
            own, teacher, _ = signals.compare(tempered(logits), *part)
            return generalized_jsd(own, teacher)

        weights = torch.full((positions,), 1 / positions)
        total, _ = fused_sum(position, VocabHead(heads[0]), hidden, weights, *signals.tensors, chunk_size=chunk)
    else:
        with torch.no_grad():
            teacher = tempered(heads[1](other))
        total = generalized_jsd(tempered(heads[0](hidden)), teacher).mean()
    total.backward()
    print(resident("VmHWM") - before)


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunk", type=int, default=128)
    parser.add_argument("--most", type=float, default=12.0, metavar="GIB")
    parser.add_argument("--cell", nargs=3, metavar=("METHOD", "VOCABULARY", "POSITIONS"))
    arguments = parser.parse_args()
    if arguments.cell:
        measure(arguments.cell[0], *(int(each) for each in arguments.cell[1:]), arguments.chunk)
        return
    print(f"{'vocabulary':>10} {'positions':>10} {'fused':>10} {'plain':>10}   MiB, chunks of {arguments.chunk}")
    for vocabulary in VOCABULARIES:
        for positions in POSITIONS:
            found = []
            for method in ("fused", "plain"):
                if method == "plain" and PLAIN_COPIES * 4 * vocabulary * positions > arguments.most * 2**30:
                    found.append("-")
                    continue
                cell = [method, str(vocabulary), str(positions)]
                command = [sys.executable, __file__, "--chunk", str(arguments.chunk), "--cell", *cell]
                run = subprocess.run(command, capture_output=True, text=True, check=True)
                found.append(f"{float(run.stdout):,.0f}")
            print(f"{vocabulary:>10,} {positions:>10,} {found[0]:>10} {found[1]:>10}", flush=True)


if __name__ == "__main__":
    main()
