"""Solutions to continue by Monte-Carlo labellers, and what continues them: a lively tiny model, or a script."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from stepkd.data.completion import Completion
from stepkd.labels.labellers import Solution
from stepkd.models.policy import Policy
from stepkd.models.spec import build_tiny, tiny_tokenizer
from stepkd.sampling.engine import Branch, BranchContinuations, SamplingConfig

TOKENIZER = tiny_tokenizer()
SPEC = SamplingConfig(n=8, max_new_tokens=12, seed=3)


def encode(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER(text, add_special_tokens=False)["input_ids"])


def solution(steps: Sequence[str], answer: str, *, index: int = 0, prompt: str = "Q\n", **given: Any) -> Solution:
    """A solution whose steps are these texts; one token per character."""
    ids = encode("".join(steps))
    ends = [len(encode("".join(steps[: i + 1]))) for i in range(len(steps))]
    settings: dict[str, Any] = {
        "id": f"p{index}/0",
        "index": index,
        "row": {"id": f"p{index}", "prompt": prompt, "answer": answer},
        "prompt_ids": np.asarray(encode(prompt)),
        "token_ids": np.asarray(ids),
        "step_ends": np.asarray(ends),
        "steps": tuple(steps),
        "correct": f"#### {answer}" in "".join(steps),
    }
    return Solution(**(settings | given))


def lively_policy() -> Policy:
    """An untrained model that often writes digits, so that some continuations come out correct."""
    model, tokenizer = build_tiny("tiny-0.1m", seed=1, dtype="float64")
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(3)
        embedding = model.get_input_embeddings().weight
        embedding[list(encode("01234567"))] *= 4  # tied: their logits vary more
    return Policy(model, tokenizer)


def some_solutions() -> list[Solution]:
    return [
        solution(["a=1\n", "b=2\n", "c=3\n", "#### 3<eos>"], "3", index=4),
        solution(["x is 12 ", "and y is 7 ", "#### 5"], "7", index=0, prompt="another, longer question 3+4?\n"),
        solution(["one ", "two ", "thr"], "2", index=9, finish="length"),
        solution(["#### 1<eos>"], "1", index=2),
        solution(list("2+2=4"), "4", index=7, correct=True),
    ]


class Scripted:
    """An engine that continues a prefix's text as it is told."""

    def __init__(self, script: Callable[[str, int], str]) -> None:
        self.script = script
        self.prefixes: list[str] = []

    def continue_branches(
        self, branches: Sequence[Branch], spec: SamplingConfig, **given: Any
    ) -> list[BranchContinuations]:
        results = []
        for branch in branches:
            continuations = []
            for cut in branch.cuts:
                prefix = TOKENIZER.decode(branch.token_ids[:cut])
                self.prefixes.append(prefix)
                texts = [self.script(prefix, j) for j in range(spec.n)]
                ids = [encode(text) for text in texts]
                drawn = tuple(
                    Completion([], ids[j], raw_logprobs=(0.0,) * len(ids[j]), text=texts[j], sample=j)
                    for j in range(spec.n)
                )
                continuations.append(drawn)
            results.append(BranchContinuations(tuple(continuations), 0))
        return results
