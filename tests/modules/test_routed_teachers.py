"""Rows routed to several teachers are each distilled from its own, whoever shares a batch with whom."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forked
import pytest
import torch
import vllm_standin as standin

from stepkd.data.collate import collate
from stepkd.data.datamodule import StepData
from stepkd.errors import ConfigError, DataError
from stepkd.models.policy import Policy
from stepkd.models.spec import PolicyConfig, tiny_tokenizer
from stepkd.modules.fidelity import _confidence
from stepkd.modules.gkd import GKDModule
from stepkd.modules.gkd_settings import JSD, NKD, SourceConfig
from stepkd.modules.kdrl import KDRLModule
from stepkd.modules.kdrl_settings import ExactKL, RolloutConfig, SampledKL
from stepkd.sampling.engine import SamplingConfig
from stepkd.teachers.cache import write_cache
from stepkd.teachers.config import Cached, Local, Routed, SelfBase, Served, TopK
from stepkd.teachers.local import LocalTeacher
from stepkd.teachers.routed import NOTHING
from stepkd.teachers.signals import Compared

TESTS = Path(__file__).parents[1]
WORKER = TESTS / "modules/routed_worker.py"


def script(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


worker = script(WORKER)
gkd, kdrl = worker.gkd, worker.kdrl
WIDE, NARROW = worker.WIDE, worker.NARROW


@pytest.fixture(scope="module", autouse=True)
def norms_in_full_precision() -> Iterator[None]:
    """Parts of a batch are summed by the test, which float32 within the model would show."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaRMSNorm, "forward", kdrl.full_precision_norm)
        yield


@pytest.fixture(scope="module")
def rows() -> list[Any]:
    return list(worker.routed_examples(6, ("math", "code", "math", "code", "code", "math")))


@pytest.fixture(scope="module")
def teachers(rows: list[Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Of every kind, all the same model."""
    local = LocalTeacher(NARROW)
    local.bind(tiny_tokenizer())
    folder = tmp_path_factory.mktemp("cache")
    write_cache(folder, local, rows, top_k=4)
    server = standin.StandIn(Policy.load(PolicyConfig(path=NARROW.path, dtype="float64")), "teacher")
    yield {
        "local": NARROW,
        "few": replace(NARROW, top_k=TopK(4)),
        "cached": Cached(str(folder)),
        "served": Served(server.address, NARROW.path, TopK(4)),
    }
    server.close()


@pytest.mark.parametrize("kind", ["local", "few", "cached", "served"])
def test_gradients_are_those_of_each_row_with_its_teacher_alone(
    kind: str, teachers: dict[str, Any], rows: list[Any], distance: Callable[..., float]
) -> None:
    """Of two models, one compared in its whole vocabulary, the other as it may be; also cut up otherwise."""
    settings: dict[str, Any] = {"divergence": JSD(beta=0.3), "policy": {"dtype": "float64"}}
    both = Routed({"math": WIDE, "code": teachers[kind]})
    total: dict[str, torch.Tensor] = {}
    tokens = sum(len(row.token_ids) for row in rows)
    for name, teacher in both.teachers.items():
        own = [row for row in rows if row.row["teacher"] == name]
        share = sum(len(row.token_ids) for row in own) / tokens
        for key, gradient in gkd.run(own, teacher=teacher, **settings).gradients.items():
            total[key] = total.get(key, 0) + share * gradient
    for layout in ({}, {"micro_batch_tokens": 100, "chunk_size": 5}):
        module = gkd.run(rows, teacher=both, **settings, **layout)
        assert distance(module.gradients, total) < 1e-10


def test_log_probabilities_of_targets_are_those_of_each_rows_teacher(teachers: dict[str, Any], rows: list[Any]) -> None:
    batch = collate(rows, 0, share=True)
    found = {}
    both = Routed({"math": WIDE, "code": teachers["served"]})
    for name, spec in {"both": both, **both.teachers}.items():
        teacher = spec.build()
        teacher.bind(tiny_tokenizer())
        found[name] = teacher.target_logps(batch, temperature=1.0)
    own = [row.row["teacher"] for row in rows]
    expected = torch.stack([found[own[r]][n] for n, r in enumerate(batch.completion_N.tolist())])
    assert torch.allclose(found["both"], expected, atol=1e-10)
    assert not torch.allclose(found["math"], found["code"], atol=0.1)


@pytest.mark.parametrize("kd", [SampledKL(beta=0.3), ExactKL(beta=0.3)])
def test_one_teacher_under_two_names_is_that_teacher(kd: Any, rows: list[Any], distance: Callable[..., float]) -> None:
    settings: dict[str, Any] = {"kd": kd, "rollout": RolloutConfig(SamplingConfig(n=2, max_new_tokens=12))}
    alone = kdrl.run(rows[:3], teacher=WIDE, **settings)
    routed = kdrl.run(rows[:3], teacher=Routed({"math": WIDE, "code": replace(WIDE)}), **settings)
    assert distance(routed.gradients[0], alone.gradients[0]) < 1e-9
    assert routed.logged[0]["kl_to_teacher"] == pytest.approx(alone.logged[0]["kl_to_teacher"], rel=1e-6)


def test_confidence_is_the_most_likely_tokens_and_no_tails() -> None:
    whole, few = torch.tensor([0.1, 0.2, 0.6, 0.1]).log(), torch.tensor([0.3, 0.7]).log()
    both = torch.stack([whole, torch.cat([few, torch.full((2,), NOTHING)])])
    argmax = torch.tensor([2, 3])
    found = _confidence(torch.zeros(2, 4), argmax, Compared(both, both, argmax))
    assert found[2].tolist() == pytest.approx([0.6, 0.3])


def test_a_run_is_not_resumed_with_rows_of_other_teachers(tmp_path: Path) -> None:
    prints = []
    for names in (["math", "code"], ["code", "code"]):
        rows = [{"prompt": f"{i}+1=\n", "answer": "1", "teacher": name} for i, name in enumerate(names)]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        teacher = Routed({"math": Local("tiny-0.1m"), "code": Local("tiny-0.1m")})
        module = GKDModule(PolicyConfig(path="tiny-0.1m"), teacher, source=SourceConfig(lmbda=1.0))
        data = StepData(train=str(tmp_path / "rows.jsonl"), template="task")
        data.trainer = SimpleNamespace(lightning_module=module, global_rank=0, world_size=1)  # type: ignore[assignment]
        data.setup("fit")
        prints.append(data.fingerprint())
    assert prints[0] != prints[1]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["auto", "fsdp2"])
def test_a_rank_may_have_no_row_of_a_teacher(strategy: str, tmp_path: Path, distance: Callable[..., float]) -> None:
    """Of two ranks each has the rows of one of two teachers, sharded over both under FSDP2."""
    done = forked.run([str(tmp_path / "out")], ranks=2, script=WORKER, STRATEGY=strategy)
    assert done.returncode == 0, done.stderr[-3000:]
    alone = worker.run()
    for rank in range(2):
        found = torch.load(f"{tmp_path / 'out'}.{rank}", weights_only=True)
        assert len(found["teachers"]) == 1, "the test needs ranks of one teacher each"
        assert distance(found["gradients"], alone.gradients) < 1e-10


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            ["math", "maths"],
            r"line 2, column 'teacher': .*must name one of code, math .*found str 'maths'",
        ),
        (["math", None], r"line 2, column 'teacher': .* found no such column\. The row has 'prompt'"),
        (["code", 3], r"line 2, column 'teacher': .* found int 3"),
        (["code", ["code"]], r"line 2, column 'teacher': .* found list \['code'\]"),
    ],
)
def test_a_row_that_names_no_teacher_is_told_with_its_place(values: list[Any], message: str, tmp_path: Path) -> None:
    rows = [
        {"prompt": f"{i}+1=\n", "answer": "1"} | ({} if v is None else {"teacher": v}) for i, v in enumerate(values)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    teacher = Routed({"math": Local("tiny-0.1m"), "code": Local("tiny-0.1m")})
    for module in (
        GKDModule(PolicyConfig(path="tiny-0.1m"), teacher, source=SourceConfig(lmbda=1.0)),
        KDRLModule(PolicyConfig(path="tiny-0.1m"), teacher=teacher),
    ):
        data = StepData(train=str(path), template="task")
        data.trainer = SimpleNamespace(lightning_module=module, global_rank=0, world_size=1)  # type: ignore[assignment]
        with pytest.raises(DataError, match=rf"data\.train: .*rows\.jsonl, {message}"):
            data.setup("fit")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Routed({}), "teacher.teachers is empty"),
        (lambda: Routed({"a": SelfBase()}), "teacher.teachers.a is SelfBase: rows are routed to the teachers Local"),
        (
            lambda: GKDModule(
                PolicyConfig(path="x"), Routed({"a": Local("x"), "b": Served("http://x")}), divergence=NKD()
            ),
            "divergence NKD reads the whole distribution, and the teacher Served gives its most likely",
        ),
        (
            lambda: GKDModule(
                PolicyConfig(path="x"), Routed({"a": Local("x")}), source=SourceConfig(lmbda=0.0, teacher=1.0)
            ),
            "samples from the teacher, and the teacher Routed is several",
        ),
    ],
)
def test_what_cannot_be_routed(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
