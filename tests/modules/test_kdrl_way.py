"""KDRL's way: a completion stays one object with arrays from the sampler to the loss, and becomes a row at the end."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stepkd.data import collate as collating
from stepkd.data.collate import Batch
from stepkd.data.completion import Completion
from stepkd.losses import LossTerms
from stepkd.models.policy import Policy
from stepkd.models.spec import tiny_tokenizer
from stepkd.modules import rollouts as sampling
from stepkd.modules.kdrl import KDRLModule
from stepkd.modules.kdrl_objective import KDRLObjective
from stepkd.modules.kdrl_settings import SampledKL, StepCreditConfig
from stepkd.modules.rollouts import GroupSampler, Rollout
from stepkd.sampling.transformers_engine import TransformersEngine

WORKER = Path(__file__).with_name("kdrl_worker.py")
_SPEC = importlib.util.spec_from_file_location("kdrl_worker", WORKER)
assert _SPEC is not None
worker = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(worker)  # type: ignore[union-attr]


@pytest.fixture(scope="module", autouse=True)
def norms_in_full_precision() -> Iterator[None]:
    """See :func:`worker.full_precision_norm`."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaRMSNorm, "forward", worker.full_precision_norm)
        yield


@pytest.fixture
def met(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """What every station of the way gives, in the order of the stations."""
    found: dict[str, list[Any]] = {}

    def watch(owner: Any, name: str, station: str) -> None:
        original = getattr(owner, name)

        def watched(*args: Any, **options: Any) -> Any:
            given = original(*args, **options)
            flat = given if isinstance(given, list) else [given]
            flat = [each for part in flat for each in (part if isinstance(part, list) else [part])]
            found.setdefault(station, []).extend(flat)
            return given

        monkeypatch.setattr(owner, name, watched)

    watch(TransformersEngine, "generate", "engine")
    watch(GroupSampler, "__call__", "grades")
    watch(KDRLModule, "credit", "credit")
    watch(collating, "collate", "batch")
    monkeypatch.setattr("stepkd.modules.base.collate", collating.collate)
    watch(KDRLObjective, "terms", "loss")
    watch(sampling, "sample_row", "row")
    return found


def test_the_classes_on_the_way(met: dict[str, list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Completion, graded completion, batch, loss terms, row: no other class, and nothing is tokenised again."""
    rows = worker.examples()

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a text was tokenised")

    sample = TransformersEngine.generate

    def sampled(*arguments: Any, **options: Any) -> Any:
        drawn = sample(*arguments, **options)
        for name in ("__call__", "encode", "_encode_plus"):
            monkeypatch.setattr(type(tiny_tokenizer()), name, refuse)
        return drawn

    monkeypatch.setattr(TransformersEngine, "generate", sampled)
    module = worker.run(rows, kd=SampledKL(beta=0.3), step_credit=StepCreditConfig("arithmetic"), folder=tmp_path)
    assert {station: {type(each) for each in given} for station, given in met.items()} == {
        "engine": {Completion},
        "grades": {Rollout},
        "credit": {Rollout},
        "batch": {Batch},
        "loss": {LossTerms},
        "row": {dict},
    }
    for drawn, graded, credited in zip(met["engine"], met["grades"], met["credit"], strict=True):
        for name in ("prompt_ids", "token_ids", "logprobs", "raw_logprobs"):
            values = getattr(drawn, name)
            assert isinstance(values, np.ndarray)
            assert getattr(graded, name) is getattr(credited, name) is values, "the array itself"
        assert credited.step_ends is graded.step_ends
        assert isinstance(credited.advantages, np.ndarray)
        assert len(credited.advantages) == len(credited.token_ids)
    examples = [example for batch in met["batch"] if not batch.is_dummy for example in batch.examples]
    assert {id(example) for example in examples} == {id(rollout) for rollout in met["credit"]}
    assert len(met["row"]) == module.samples.number


def test_a_rollout_is_its_own_example() -> None:
    """Two with the same tokens are different, and their key is one."""
    one, other = (Rollout(prompt_ids=[1, 2], token_ids=[3], step_ends=[1]) for _ in range(2))  # type: ignore[arg-type]
    assert one.completions == (one,)
    assert one != other
    assert one.key == other.key
    assert (one.spans, one.length, one.cut_off) == (((0, 1),), 3, False)


def test_a_prompt_is_read_once_by_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """The micro-batches say which rows begin alike, and gradients are those of rows apart."""
    rows = worker.examples()
    hidden, embed = Policy.hidden, torch.nn.Embedding.forward
    computed: list[int] = []

    def seen(self: Policy, *arguments: Any) -> Any:
        def counted(layer: Any, ids: Any) -> Any:
            computed.append(ids.numel())
            return embed(layer, ids)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.nn.Embedding, "forward", counted)
            return hidden(self, *arguments)

    monkeypatch.setattr(Policy, "hidden", seen)
    together = worker.run(rows, teacher=None)
    drawn, prompts = together.kept[0], {r.group: len(r.prompt_ids) for r in together.kept[0]}
    assert sum(computed) <= sum(prompts.values()) + sum(len(r.token_ids) for r in drawn)
    monkeypatch.setattr(worker.KDRL, "shares", False)
    computed.clear()
    apart = worker.run(rows, teacher=None)
    assert sum(computed) == sum(r.length for r in drawn)
    for name, gradient in apart.gradients[0].items():
        assert (together.gradients[0][name] - gradient).norm() <= 1e-10 * max(float(gradient.norm()), 1e-30)
