"""vLLM's engine in one process with the policy: ``python vllm_worker.py FOLDER`` holds it to the contract.

In a job and in training; it prints the engine's facts, and what a run says whose sync fails in silence.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from engine_contract import DRAWN, SAMPLES, SCORES, every_version_is_sampled_from, move, prompts

from stepkd.errors import ModelError
from stepkd.models.checkpoint import load_trained
from stepkd.models.policy import Policy
from stepkd.models.spec import PolicyConfig
from stepkd.sampling.config import VLLM


def found(folder: str) -> dict[str, Any]:
    """What is printed of the engine with the model of a folder."""
    policy = Policy.load(PolicyConfig(path=folder, dtype="float32"))
    job = VLLM().build(load_trained(folder, dtype="float32", weights=False))
    for rule in [*SAMPLES, *SCORES]:
        rule(job, policy)
    engine = VLLM().build(policy)
    every_version_is_sampled_from(engine, policy)
    for rule in [*SAMPLES, *SCORES]:
        rule(engine, policy)
    setattr(engine, "_send", lambda version: None)  # noqa: B010 - a sync that does nothing, in silence
    move(policy, 1, by=0.3)
    engine.update(9)
    try:
        for step in range(3):
            engine.generate(prompts(policy), DRAWN, step=step)
    except ModelError as error:
        return {"facts": job.facts(), "caught": str(error)}
    return {"caught": ""}


if __name__ == "__main__":
    print("\n" + json.dumps(found(sys.argv[1])))
