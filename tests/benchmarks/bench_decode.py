"""Tokens per second of sampling in process: our decoder, ``transformers.generate``, another checkout's decoder.

Run: ``python tests/benchmarks/bench_decode.py --model MODEL --problems gsm8k/test.jsonl [--against CHECKOUT]``, with
``OMP_NUM_THREADS=1`` on a machine that others use too. Every contestant is a process of its own that has the model
loaded and one batch behind it; they take turns. Completions have a fixed length (no token ends one), prompts are the
same and sorted by length, and only sampling is timed. Prints tokens per second of wall time and of CPU time, medians
and best, and ratios of the rounds; asserts nothing. Another checkout may be as old as commit deb7e86.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module, util
from pathlib import Path
from typing import Any

import torch


def imported(*places: tuple[str, str]) -> Any:
    """The first of some names, of this version and older ones, that is there."""
    for module, name in places:
        known = util.find_spec(module.rpartition(".")[0]) and util.find_spec(module)
        if known and hasattr(import_module(module), name):
            return getattr(import_module(module), name)
    raise ImportError(f"none of {places}")


def contestant(kind: str, given: argparse.Namespace) -> Callable[[int], int]:
    """A function from new tokens per completion to the number of tokens sampled."""
    policy_class = import_module("stepkd.models.policy").Policy
    settings = imported(("stepkd.models.spec", "PolicyConfig"), ("stepkd.models.spec", "PolicySpec"))
    policy = policy_class.load(settings(path=given.model, dtype=given.dtype))
    questions = [json.loads(line)["question"] for line in Path(given.problems).read_text("utf-8").splitlines()]
    texts = [f"Question: {question}\nAnswer:" for question in questions[: given.prompts]]
    prompts = sorted((policy.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts), key=len)[::-1]
    if kind in ("static", "dynamic"):
        return lambda new: sum(
            _generate(policy, prompts[first : first + given.rows], new, kind)
            for first in range(0, len(prompts), given.rows)
        )
    policy_class.eos_ids = property(lambda _: frozenset())
    sampling = imported(("stepkd.sampling.engine", "SamplingConfig"), ("stepkd.rollout.sampler", "SamplingSpec"))
    engine = imported(
        ("stepkd.sampling.transformers_engine", "TransformersEngine"),
        ("stepkd.rollout.transformers_sampler", "TransformersSampler"),
    )(policy, max_rows=given.rows)
    draw = getattr(engine, "generate", None) or engine.sample
    return lambda new: sum(len(own[0].token_ids) for own in draw(prompts, sampling(max_new_tokens=new)))


@torch.no_grad()
def _generate(policy: Any, prompts: list[list[int]], new: int, cache: str) -> int:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    policy.causal_lm.eval()
    found = policy.causal_lm.generate(
        input_ids=ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0,
        max_new_tokens=new, min_new_tokens=new, cache_implementation=cache if cache == "static" else None,
    )  # fmt: skip
    return int(found[:, width:].numel())


def serve(kind: str, given: argparse.Namespace) -> None:
    """Answer every number of new tokens read with tokens, wall and CPU seconds."""
    run = contestant(kind, given)
    run(4)
    print("ready", flush=True)
    for line in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        tokens = run(int(line))
        print(json.dumps([tokens, time.perf_counter() - wall, time.process_time() - cpu]), flush=True)


def main() -> None:
    """Let the contestants take turns and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="what policy.path takes")
    parser.add_argument("--problems", required=True, help="JSON Lines with a question each (GSM8K)")
    parser.add_argument("--dtype", default="bfloat16", help="float32 where the CPU only emulates bfloat16")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--rows", type=int, default=64, help="completions decoded at once")
    parser.add_argument("--new-tokens", type=int, default=128, help="tokens of every completion")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--against", help="another checkout of this project")
    parser.add_argument("--no-generate", action="store_true", help="leave transformers.generate out")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(given.serve, given)
        return
    here = str(Path(__file__).parents[2])
    wanted = {"ours": here, **({"against": given.against} if given.against else {})}
    wanted |= {} if given.no_generate else {"dynamic": here, "static": here}
    running = {}
    for kind, checkout in wanted.items():
        command = [sys.executable, __file__, *sys.argv[1:], "--serve", kind]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        running[kind] = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": checkout}, **pipes)
        assert running[kind].stdout.readline() == "ready\n", kind
    rates: dict[str, list[tuple[float, float]]] = {kind: [] for kind in running}
    for _ in range(given.rounds):
        for kind, process in running.items():
            process.stdin.write(f"{given.new_tokens}\n")
            process.stdin.flush()
            tokens, wall, cpu = json.loads(process.stdout.readline())
            rates[kind].append((tokens / wall, tokens / cpu))
    for process in running.values():
        process.stdin.close()
        process.wait()
    print(
        f"{given.prompts} prompts, {given.new_tokens} new tokens, {given.dtype}, {torch.get_num_threads()} threads; "
        "tokens per second"
    )
    best = max(cpu for _, cpu in rates["ours"])
    for kind, found in rates.items():
        walls, cpus = zip(*found, strict=True)
        ratios = [a[1] / b[1] for a, b in zip(rates["ours"], found, strict=True)]
        print(
            f"{kind:8} wall {statistics.median(walls):6.1f} (best {max(walls):6.1f}), "
            f"CPU {statistics.median(cpus):6.1f} (best {max(cpus):6.1f}); ours by CPU: {best / max(cpus):.2f} times as "
            f"fast, rounds {min(ratios):.2f} to {max(ratios):.2f}"
        )


if __name__ == "__main__":
    main()
