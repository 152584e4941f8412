"""vLLM's engine in one process with the policy: ``python vllm_worker.py FOLDER`` prints what is true of it as JSON."""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import torch

from stepkd.errors import ModelError
from stepkd.models.checkpoint import load_trained
from stepkd.models.policy import Policy
from stepkd.models.spec import PolicyConfig
from stepkd.sampling.annotate import sampled_logps
from stepkd.sampling.config import VLLM, Transformers
from stepkd.sampling.engine import Branch, Engine, SamplingConfig

PROMPTS = [[5, 17, 33, 8], [7, 9], [40, 41, 42, 43, 44]]
GREEDY = SamplingConfig(temperature=0.0, max_new_tokens=12)
DRAWN = SamplingConfig(n=3, temperature=0.7, max_new_tokens=12, seed=2)


def texts(engine: Engine, spec: SamplingConfig, **options: Any) -> list[Any]:
    """Tokens, text and end of every completion."""
    drawn = engine.generate(PROMPTS, spec, **options)
    return [(each.token_ids.tolist(), each.text, each.finish) for row in drawn for each in row]


def continuations(engine: Engine) -> list[Any]:
    """Of three prefixes."""
    (found,) = engine.continue_branches([Branch([5, 17, 33, 8, 9, 10], [2, 4, 6], 3)], GREEDY)
    return [[each.key for each in cut] for cut in found.continuations]


def move(policy: Policy, size: float) -> None:
    """Change all weights."""
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))


def found(folder: str) -> dict[str, Any]:
    """What is true of the engine with the model of a folder."""
    policy = Policy.load(PolicyConfig(path=folder, dtype="float32"))
    own, engine = Transformers().build(policy, GREEDY), VLLM().build(policy, GREEDY)
    gaps, equal = [], []
    for version in range(3):
        engine.update(version)
        equal.append(texts(engine, GREEDY) == texts(own, GREEDY))
        drawn = [each for row in engine.generate(PROMPTS, DRAWN, step=version) for each in row]
        theirs = np.concatenate([each.logprobs for each in drawn])
        gaps.append(float(np.abs(sampled_logps(policy, drawn, DRAWN.temperature) - theirs).max()))
        move(policy, 0.02)
    engine.update(3)
    turned = engine.generate(PROMPTS[::-1], DRAWN, indices=[2, 1, 0])[::-1]
    plain = engine.generate(PROMPTS, DRAWN)
    stop = (str(texts(own, GREEDY)[0][1])[2:4],)
    job = VLLM().build(load_trained(folder, dtype="float32", weights=False), GREEDY)
    untouched = Transformers().build(Policy.load(PolicyConfig(path=folder, dtype="float32")), GREEDY)
    facts = {
        "gaps": gaps,
        "greedy": equal,
        "keyed": [[c.key for c in row] for row in turned] == [[c.key for c in row] for row in plain],
        "branches": continuations(engine) == continuations(own),
        "stop": texts(engine, SamplingConfig(temperature=0.0, max_new_tokens=12, stop=stop))
        == texts(own, SamplingConfig(temperature=0.0, max_new_tokens=12, stop=stop)),
        "job": texts(job, GREEDY) == texts(untouched, GREEDY),
        "facts": job.facts(),
    }  # fmt: skip
    setattr(engine, "_send", lambda version: None)  # noqa: B010 - a sync that does nothing, in silence
    move(policy, 0.3)
    engine.update(4)
    try:
        engine.generate(PROMPTS, DRAWN)
        facts["caught"] = ""
    except ModelError as error:
        facts["caught"] = str(error)
    return facts


if __name__ == "__main__":
    print("\n" + json.dumps(found(sys.argv[1])))
