"""Scoring N solutions of one prompt: its cache shared by all against every solution read with its own prompt.

Run: ``python tests/benchmarks/bench_scoring.py [--model tiny-2m] [--solutions 16] [--tokens 128] [--repeats 5]``.
Both ways alternate in one process, so that other jobs on the machine disturb them alike; the ratio of the medians is
what counts. Prints one line per length of the prompt; asserts nothing but equal scores.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from stepkd.models.checkpoint import load_trained
from stepkd.models.spec import Classifier
from stepkd.scorers.judge import PromptedJudge
from stepkd.scorers.prm import PRMScorer
from stepkd.scorers.scorer import Solutions
from stepkd.steps.format import StepFormat


def text_of(tokenizer: object, tokens: int, seed: int) -> str:
    """Digits and operators that make about this many tokens."""
    text = "".join(f"{(seed * 7919 + i * 31) % 97}+" for i in range(tokens))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][:tokens]  # type: ignore[operator]
    return str(tokenizer.decode(ids))  # type: ignore[attr-defined]


def problem_of(tokenizer: object, prompt: int, solution: int, count: int, steps: int = 4) -> Solutions:
    """One problem with solutions of four steps."""
    part = max(1, solution // steps - 2)
    return Solutions(
        {"id": "0", "prompt": text_of(tokenizer, prompt, 0)},
        [[text_of(tokenizer, part, 10 * s + k + 1) for k in range(steps)] for s in range(count)],
    )


def compare(shared: PRMScorer | PromptedJudge, apart: PRMScorer | PromptedJudge, problem: Solutions, n: int) -> str:
    """Times of both, alternating."""
    times: dict[str, list[float]] = {"shared": [], "apart": []}
    results = {}
    for _ in range(n + 1):
        for name, scorer in (("shared", shared), ("apart", apart)):
            start = time.perf_counter()
            results[name] = torch.tensor(scorer.score([problem])[0])
            times[name].append(time.perf_counter() - start)
    assert torch.allclose(results["shared"], results["apart"], atol=1e-3)
    one, other = (statistics.median(times[name][1:]) for name in ("shared", "apart"))  # the first round warms up
    pairs = sorted(b / a for a, b in zip(times["shared"][1:], times["apart"][1:], strict=True))
    return (
        f"{one * 1e3:8.1f} ms shared, {other * 1e3:8.1f} ms apart: {other / one:5.2f}x faster "
        f"(rounds {pairs[0]:.2f} to {pairs[-1]:.2f})"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny-2m")
    parser.add_argument("--solutions", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128, help="length of a solution")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--judge", action="store_true", help="the prompted judge in place of a reward model")
    arguments = parser.parse_args()
    policy = load_trained(arguments.model, dtype="float32")
    policy.attach_step_head(Classifier(format=StepFormat(marker=None)))
    policy.to(arguments.device)
    print(
        f"{arguments.model} on {policy.device}, {torch.get_num_threads()} threads, {arguments.solutions} solutions of"
    )
    print(f"about {arguments.tokens} tokens; prompts of 0.5 to 4 times that length")
    for ratio in (0.5, 1, 2, 4):
        problem = problem_of(policy.tokenizer, int(ratio * arguments.tokens), arguments.tokens, arguments.solutions)
        pair: list[PRMScorer | PromptedJudge] = []
        for shared in (True, False):
            if arguments.judge:
                forms = {"answers": [("Y", "N")]}
                pair.append(PromptedJudge(policy, shared_prefix=shared, max_rows=arguments.solutions, **forms))
            else:
                pair.append(PRMScorer(policy, template="task", shared_prefix=shared, max_rows=arguments.solutions))
        print(f"prompt = {ratio} x solution: {compare(pair[0], pair[1], problem, arguments.repeats)}", flush=True)


if __name__ == "__main__":
    main()
