"""Going on from kept prefixes against reading them anew, and trials drawn at once against one by one.

Run: ``python tests/benchmarks/bench_search.py [--prompts 100 300 600] [--rounds 3] [--threads 2] [--dtype float32]
[--small]``. The model is random, of the shape of SmolLM2-135M (``--small``: two layers, to see that it runs). Both ways
alternate in one process and draw the same tokens, which is checked; a round is a whole search. Asserts nothing else.

*Prefixes*: 8 steps of 30 tokens of 16 solutions of one problem, each step a call that goes on from all 16. *Trials*: 16
continuations of one solution so far, 20 tokens each, as entropy-triggered branching draws them; the reference loops.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from bench_gkd import VOCABULARY, model

from stepkd.models.policy import Policy
from stepkd.models.spec import tiny_tokenizer
from stepkd.randomness import generator
from stepkd.sampling.engine import SamplingConfig
from stepkd.sampling.transformers_engine import TransformersEngine


class _Policy(Policy):
    """One whose completions have a fixed length: no token ends one."""

    eos_ids = frozenset()  # type: ignore[assignment]


def main() -> None:
    """Time both pairs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompts", type=int, nargs="+", default=[100, 300, 600], help="prompt lengths in tokens")
    parser.add_argument("--prefixes", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=30, help="of a step")
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="float32", help="bfloat16 where the machine has units for it")
    parser.add_argument("--small", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<{number}>" for number in range(VOCABULARY - len(tokenizer))])
    policy = _Policy(model("student", small=given.small, dtype=given.dtype).eval(), tokenizer, verify_head=False)
    print(f"SmolLM2-135M shape{' of two layers' if given.small else ''}, {given.dtype}, {given.threads} threads")
    print("| | prompt | tokens read | anew (s) | ours (s) | ratio |")
    print("| --- | --- | --- | --- | --- | --- |")
    for length in given.prompts:
        prompt = generator(0, "benchmark", length).integers(200, VOCABULARY, length).tolist()
        engines = [TransformersEngine(policy), TransformersEngine(policy)]
        engines[1].keeps_prefixes = True
        sides = [partial(_search, engine, prompt, given) for engine in engines]
        again = sum(given.prefixes * (length + step * given.new_tokens) for step in range(given.steps))
        once = length + given.prefixes * given.steps
        _compare("kept prefixes", length, f"{again:,} / about {once:,}", sides, given.rounds)
    for length in given.prompts:
        prompt = generator(0, "benchmark", length).integers(200, VOCABULARY, length).tolist()
        engine = TransformersEngine(policy)
        engine.keeps_prefixes = True
        sides = [partial(_trials, engine, prompt, given.trials, size) for size in (1, given.trials)]
        _compare(f"{given.trials} trials", length, "", sides, given.rounds)


def _search(engine: TransformersEngine, prompt: list[int], given: Any) -> list[list[int]]:
    """Step after step of several solutions."""
    engine.forget()
    spec = SamplingConfig(max_new_tokens=given.new_tokens)
    texts = [list(prompt) for _ in range(given.prefixes)]
    for step in range(given.steps):
        drawn = engine.generate(texts, spec, step=step)
        texts = [[*text, *each.token_ids.tolist()] for text, (each,) in zip(texts, drawn, strict=True)]
    return texts


def _trials(engine: TransformersEngine, prompt: list[int], number: int, size: int) -> list[list[int]]:
    """Continuations of a solution that has been read, so many at once."""
    engine.forget()
    engine.generate([prompt], SamplingConfig(max_new_tokens=1))
    found = []
    for start in range(0, number, size):
        drawn = engine.generate([prompt] * size, SamplingConfig(max_new_tokens=20), indices=range(start, start + size))
        found += [each.token_ids.tolist() for (each,) in drawn]
    return found


def _compare(name: str, length: int, read: str, sides: list[Callable[[], Any]], rounds: int) -> None:
    seconds: list[list[float]] = [[], []]
    for number in range(rounds + 1):
        found = []
        for side, own in zip(sides, seconds, strict=True):
            start = time.perf_counter()
            found.append(side())
            if number:  # round 0 warms up
                own.append(time.perf_counter() - start)
        assert found[0] == found[1], "both ways draw the same"
    ratios = [a / b for a, b in zip(*seconds, strict=True)]
    anew, ours = map(statistics.median, seconds)
    print(
        f"| {name} | {length} | {read} | {anew:.2f} | {ours:.2f} | {statistics.median(ratios):.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f}) |"
    )


if __name__ == "__main__":
    main()
