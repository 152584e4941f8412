"""Monte-Carlo continuations of every step: one reading of a solution against reading every prefix anew.

Run: ``python tests/benchmarks/bench_monte_carlo.py [--model tiny-0.5m] [--rounds 3]``; ``--model`` takes whatever
``policy.path`` takes, a ``.gguf`` file for instance. Prints, for short and long prompts, the tokens read and drawn and
the ratio of the wall times, both ways alternating in one run; asserts nothing.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter

from stepkd.models.policy import Policy
from stepkd.models.spec import PolicyConfig
from stepkd.randomness import generator
from stepkd.sampling.engine import Branch, SamplingConfig
from stepkd.sampling.transformers_engine import TransformersEngine


def main() -> None:
    """Time both ways on random ids: what is read does not matter for the cost."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="tiny-0.5m", help="what policy.path takes")
    parser.add_argument("--dtype", default="float32", help="bfloat16 suits real models")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--solutions", type=int, default=4, help="solutions per call")
    parser.add_argument("--steps", type=int, default=6, help="steps per solution, 20 tokens each")
    parser.add_argument("--samples", type=int, default=8, help="J, continuations per step")
    parser.add_argument("--new-tokens", type=int, default=32, help="longest continuation")
    parser.add_argument("--prompts", type=int, nargs="+", default=[20, 100, 400, 800], help="prompt lengths")
    parser.add_argument("--max-rows", type=int, default=64, help="continuations decoded at once")
    parser.add_argument("--rounds", type=int, default=3, help="timings of each way")
    given = parser.parse_args()
    policy = Policy.load(PolicyConfig(path=given.model, dtype=given.dtype))
    policy.to(given.device)
    spec = SamplingConfig(n=given.samples, max_new_tokens=given.new_tokens)
    print(
        f"{given.model} in {given.dtype} on {given.device}: {given.solutions} solutions of {given.steps} steps of 20 "
        f"tokens, {given.samples} continuations of at most {given.new_tokens} tokens; median of {given.rounds} rounds"
    )
    for prompt in given.prompts:
        branches = []
        for index in range(given.solutions):
            ids = generator(0, "benchmark", prompt, index).integers(5, policy.vocab_size, prompt + 20 * given.steps)
            branches.append(Branch(ids.tolist(), [prompt + 20 * (step + 1) for step in range(given.steps)], index))
        _compare(policy, branches, spec, max_rows=given.max_rows, rounds=given.rounds, prompt=prompt)


def _compare(
    policy: Policy, branches: list[Branch], spec: SamplingConfig, *, max_rows: int, rounds: int, prompt: int
) -> None:
    engines = {shared: TransformersEngine(policy, max_rows=max_rows) for shared in (True, False)}
    engines[False]._gap_limit = 0  # as if the model could skip no part of its cache
    read, drawn = Counter[bool](), Counter[bool]()
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for number in range(rounds + 1):
        for shared, engine in engines.items():
            start = time.perf_counter()
            found = engine.continue_branches(branches, spec, step=number)
            if number:  # round 0 warms up
                seconds[shared].append(time.perf_counter() - start)
            read[shared] += sum(each.prefill_tokens for each in found)
            drawn[shared] += sum(len(row.token_ids) for each in found for cut in each.continuations for row in cut)
    ratios = [a / b for a, b in zip(seconds[False], seconds[True], strict=True)]
    print(
        f"prompt of {prompt} tokens: tokens read per call {read[True] // (rounds + 1):,} once, "
        f"{read[False] // (rounds + 1):,} anew (x{read[False] / read[True]:.2f}); drawn "
        f"{drawn[True] // (rounds + 1):,} and {drawn[False] // (rounds + 1):,}; "
        f"{statistics.median(seconds[True]):.2f} s and {statistics.median(seconds[False]):.2f} s, "
        f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    )


if __name__ == "__main__":
    main()
