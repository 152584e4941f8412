"""Distillation is what plain logits of separate rows give, on given and on sampled completions; TRL's step too."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forked
import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from stepkd.data.batching import BatchPlan, StepLoader
from stepkd.data.config import DataConfig
from stepkd.data.datamodule import StepData
from stepkd.errors import ConfigError, ModelError, TrainingError
from stepkd.losses import forward_kl, generalized_jsd, nkd, reverse_kl, temperature_slope, top_k_buckets
from stepkd.models.policy import Policy
from stepkd.models.spec import LabelTokens, PolicyConfig, build_tiny
from stepkd.modules.fidelity import ANSWERS, FidelityConfig, _kind
from stepkd.modules.gkd import GKDModule
from stepkd.modules.gkd_settings import (
    JSD,
    NKD,
    BalancedKL,
    Beside,
    ForwardKL,
    LearnedTemperature,
    ReverseKL,
    SkewForwardKL,
    SourceConfig,
)
from stepkd.modules.step_scores import FocusConfig
from stepkd.sampling.engine import SamplingConfig
from stepkd.scorers.load import PRM
from stepkd.teachers.config import Local, TopK

WORKER = Path(__file__).with_name("gkd_worker.py")
_SPEC = importlib.util.spec_from_file_location("gkd_worker", WORKER)
assert _SPEC is not None
worker = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(worker)  # type: ignore[union-attr]

TOLERANCE = 1e-10
LAYOUTS: list[dict[str, Any]] = [
    {},
    {"layout": {"padding_side": "left"}},
    {"layout": {"padding_side": "left", "pad_to": 91}},
    {"micro_batch_tokens": 60},
    {"micro_batch_tokens": 200, "chunk_size": 1},
    {"chunk_size": 7},
]


@pytest.fixture(scope="module")
def rows() -> list[Any]:
    return list(worker.examples())


@pytest.fixture(scope="module")
def views() -> tuple[Policy, Policy]:
    """Student and teacher."""
    teacher = Policy.load(PolicyConfig(path="tiny-0.5m", dtype="float64"))
    return Policy.load(PolicyConfig(**worker.POLICY)), teacher


Rows = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Logits of student and teacher, and targets, to one number per position."""


def plain(
    views: tuple[Policy, Policy], rows: list[Any], row_values: Rows, *, average: str = "tokens", ce_weight: float = 0.0
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients from plain logits, one unpadded row at a time."""
    student, teacher = views
    student.zero_grad()
    per_row = []
    for row in rows:
        ids = torch.tensor([[*row.prompt_ids, *row.token_ids]])
        start = len(row.prompt_ids)
        targets = ids[0, start:]
        own, other = (
            view.model(input_ids=ids).logits[0, start - 1 : -1, : view.vocab_size] for view in (student, teacher)
        )
        value = row_values(own, other.detach(), targets)
        if ce_weight:
            value = value - ce_weight * own.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
        per_row.append(value)
    if average == "sequences":
        loss = torch.stack([value.mean() for value in per_row]).mean()
    else:
        loss = torch.cat(per_row).mean()
    loss.backward()
    return float(loss.detach()), {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}


def at(temperature: float, divergence: Callable[..., Tensor], **settings: Any) -> Rows:
    def apply(own: Tensor, other: Tensor, targets: Tensor) -> Tensor:
        student, teacher = ((z / temperature).log_softmax(-1) for z in (own, other))
        return divergence(student, teacher, **settings)

    return apply


@pytest.mark.parametrize("changes", LAYOUTS)
def test_whatever_the_layout(
    changes: dict[str, Any], views: Any, rows: list[Any], distance: Callable[..., float]
) -> None:
    loss, expected = plain(views, rows, at(1.5, generalized_jsd, beta=0.3))
    module = worker.run(rows, divergence=JSD(beta=0.3, temperature=1.5), **changes)
    assert distance(module.gradients, expected) < TOLERANCE
    assert float(module.trainer.callback_metrics["train/loss"]) == pytest.approx(loss, rel=1e-6)
    assert (len(module.shapes) > 1) == ("micro_batch_tokens" in changes)


def buckets(own: Tensor, other: Tensor, targets: Tensor) -> Tensor:
    student, teacher = own.log_softmax(-1), other.log_softmax(-1)
    ids = teacher.topk(4).indices
    return reverse_kl(top_k_buckets(student, ids), top_k_buckets(teacher, ids))


def whole_nkd(own: Tensor, other: Tensor, targets: Tensor) -> Tensor:
    return nkd(own.log_softmax(-1), other.log_softmax(-1), targets, gamma=0.7, temperature=2.0)


@pytest.mark.parametrize(
    ("settings", "divergence"),
    [
        ({"divergence": ReverseKL(), "average": "sequences"}, at(1.0, reverse_kl)),
        ({"divergence": ReverseKL(temperature=0.7), "cross_entropy": Beside(0.4)}, at(0.7, reverse_kl)),
        ({"divergence": ReverseKL(), "teacher": replace(worker.TEACHER, top_k=TopK(4))}, buckets),
        ({"divergence": NKD(gamma=0.7, temperature=2.0)}, whole_nkd),
    ],
)
def test_settings(
    settings: dict[str, Any], divergence: Any, views: Any, rows: list[Any], distance: Callable[..., float]
) -> None:
    ce_weight = settings["cross_entropy"].weight if "cross_entropy" in settings else 0.0
    average = settings.get("average", "tokens")
    loss, expected = plain(views, rows, divergence, average=average, ce_weight=ce_weight)
    module = worker.run(rows, **settings, micro_batch_tokens=150, chunk_size=11)
    assert distance(module.gradients, expected) < TOLERANCE
    logged = {name: float(value) for name, value in module.trainer.callback_metrics.items()}
    assert logged["train/loss"] == pytest.approx(loss, rel=1e-6)
    assert 0 <= logged["train/agreement"] <= 1
    assert ("train/ce" in logged) == ("cross_entropy" in settings)


@pytest.mark.parametrize(
    "layout",
    [pytest.param({}, marks=pytest.mark.slow), {"micro_batch_tokens": 150, "chunk_size": 11}],
    ids=["whole", "split"],
)
def test_a_learnt_temperature(
    layout: dict[str, Any],
    views: Any,
    rows: list[Any],
    distance: Callable[..., float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The student's gradients are those of the tempered teacher; the temperature takes its own step by plain logits."""
    slopes = []

    def softened(student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
        logs = student.log_softmax(-1), teacher.log_softmax(-1)
        slopes.append(temperature_slope(logs[0].detach(), logs[1], targets, temperature=1.5))
        return forward_kl(logs[0], (teacher / 1.5).log_softmax(-1))

    _, expected = plain(views, rows, softened)
    soften = LearnedTemperature(lr=0.2)
    monkeypatch.setattr(
        worker.GKD, "begin", lambda module: module.adopt_method_state({"log_temperature": math.log(1.5)})
    )
    module = worker.run(rows, divergence=ForwardKL(), soften=soften, **layout)
    assert distance(module.gradients, expected) < TOLERANCE
    learnt = 1.5 * math.exp(-0.2 * float(torch.cat(slopes).mean()))
    logged = {name: float(value) for name, value in module.trainer.callback_metrics.items()}
    assert logged["train/teacher_temperature"] == pytest.approx(learnt, rel=1e-6)
    assert "train/temperature_slope" not in logged
    assert module.method_state()["log_temperature"] == pytest.approx(math.log(learnt), rel=1e-10)
    other = worker.GKD(PolicyConfig(**worker.POLICY), worker.TEACHER, source=worker.DATA, soften=soften)
    other.adopt_method_state(module.method_state())
    assert other.method_state() == module.method_state()


def test_validation_neither_softens_the_teacher_nor_moves_its_temperature(rows: list[Any], trainer: Any) -> None:
    soften = LearnedTemperature()
    module = worker.GKD(PolicyConfig(**worker.POLICY), worker.TEACHER, source=worker.DATA, soften=soften)
    plan, found = BatchPlan([row.size for row in rows[:3]], size=3, shuffle=False), []
    for temperature in (1.0, 3.0):
        module.adopt_method_state({"log_temperature": math.log(temperature)})
        found += trainer().validate(module, StepLoader(rows[:3], plan), verbose=False)
        assert module.method_state() == {"log_temperature": math.log(temperature)}
        assert found[-1].pop("val/teacher_temperature") == pytest.approx(temperature)
    assert found[0] == pytest.approx(found[1])
    assert found[0]["val/entropy_gap"] != 0


def trl_loss(
    views: tuple[Policy, Policy], rows: list[Any], *, beta: float, items: int | None = None, **own: Any
) -> Tensor:
    """TRL's loss of one padded batch; ``items`` is what its trainer counted beforehand, ``own`` are its attributes."""
    trl: Any = pytest.importorskip("trl.experimental.gkd").GKDTrainer
    student, teacher = views
    length = max(row.length for row in rows)
    inputs = {name: torch.full((len(rows), length), fill) for name, fill in (("input_ids", 0), ("labels", -100))}
    inputs["attention_mask"] = torch.zeros(len(rows), length, dtype=torch.int64)
    for i, row in enumerate(rows):
        inputs["input_ids"][i, : row.length] = torch.tensor([*row.prompt_ids, *row.token_ids])
        inputs["labels"][i, len(row.prompt_ids) : row.length] = torch.tensor(row.token_ids)
        inputs["attention_mask"][i, : row.length] = 1
    shared = {"teacher_model": teacher.model, "generalized_jsd_loss": trl.generalized_jsd_loss}
    loss: Tensor = trl.compute_loss(
        SimpleNamespace(beta=beta, **shared, **own), student.model, inputs, num_items_in_batch=items
    )
    return loss


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
def test_a_step_is_trls(beta: float, views: Any, rows: list[Any], distance: Callable[..., float]) -> None:
    """Parameter gradients of TRL's own loss on the same padded batch."""
    student, _ = views
    student.zero_grad()
    loss = trl_loss(views, rows, beta=beta)
    loss.backward()
    expected = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    module = worker.run(rows, divergence=JSD(beta=beta), micro_batch_tokens=100, chunk_size=9)
    assert distance(module.gradients, expected) < TOLERANCE
    assert float(module.trainer.callback_metrics["train/loss"]) == pytest.approx(loss.item(), rel=1e-6)


def test_where_trls_step_is_another_one(views: Any, rows: list[Any]) -> None:
    """Its trainer samples at a temperature that its loss never sees, and counts a batch's tokens before it samples."""
    warm, cold = (float(trl_loss(views, rows, beta=0.5, temperature=t).detach()) for t in (2.0, 1.0))
    assert warm == cold, "TRL's loss path has a temperature now: compare it in test_a_step_is_trls"
    ours = {
        t: float(worker.run(rows, divergence=JSD(temperature=t)).trainer.callback_metrics["train/loss"])
        for t in (1.0, 2.0)
    }
    assert ours[1.0] == pytest.approx(cold, rel=1e-6)
    assert abs(ours[2.0] - ours[1.0]) > 0.1 * ours[1.0]
    # The count comes with the loader's batch; training_step then puts sampled completions in its place.
    module = worker.run(rows, source=worker.OWN)
    sampled = [replace(row, token_ids=module.written[0][row.id]) for row in rows]
    before, after = (sum(len(row.token_ids) for row in batch) for batch in (rows, sampled))
    assert before != after
    counted = float(trl_loss(views, sampled, beta=0.5, items=before).detach())
    correct = float(trl_loss(views, sampled, beta=0.5).detach())
    assert counted == pytest.approx(correct * after / before, rel=1e-6)
    assert float(module.trainer.callback_metrics["train/loss"]) == pytest.approx(correct, rel=1e-6)


# ---- samples ---------------------------------------------------------------------------------------------------------


def test_own_samples(views: Any, rows: list[Any], distance: Callable[..., float]) -> None:
    """What is learnt from is what the student wrote before the step, and is counted after it was written."""
    from stepkd.sampling.transformers_engine import TransformersEngine

    module = worker.run(rows, source=worker.OWN, divergence=ReverseKL(), micro_batch_tokens=90)
    engine = TransformersEngine(views[0])
    drawn = engine.generate([row.prompt_ids for row in rows], SamplingConfig(max_new_tokens=12), purpose="gkd student")
    written = {row.id: tuple(rollout[0].token_ids) for row, rollout in zip(rows, drawn, strict=True)}
    assert module.written == [written]
    assert len({len(ids) for ids in written.values()}) > 1
    sampled = [replace(row, token_ids=written[row.id]) for row in rows]
    _, expected = plain(views, sampled, at(1.0, reverse_kl))
    assert distance(module.gradients, expected) < TOLERANCE


def test_samples_differ_from_step_to_step_and_are_used_again_on_request(rows: list[Any]) -> None:
    module = worker.run(rows, steps=4, source=worker.OWN)
    assert len(module.written) == 4
    assert module.written[0] != module.written[1]
    again = worker.run(rows, steps=4, source=worker.OWN)
    assert again.written == module.written


def test_the_sources_share(rows: list[Any]) -> None:
    module = worker.run(
        rows[:2], steps=40, source=SourceConfig(lmbda=0.3, teacher=0.5, sampling=SamplingConfig(max_new_tokens=2))
    )
    counts = {name: module.drawn.count(name) for name in ("student", "teacher", "data")}
    assert sum(counts.values()) == 40
    assert 5 <= counts["student"] <= 20
    assert min(counts.values()) >= 5
    assert len(module.written) == counts["student"] + counts["teacher"]


def test_the_teachers_samples_are_the_teachers(views: Any, rows: list[Any]) -> None:
    from stepkd.sampling.transformers_engine import TransformersEngine

    module = worker.run(rows, source=SourceConfig(lmbda=0.0, teacher=1.0, sampling=SamplingConfig(max_new_tokens=9)))
    drawn = TransformersEngine(views[1]).generate(
        [row.prompt_ids for row in rows], SamplingConfig(max_new_tokens=9), purpose="gkd teacher"
    )
    assert module.written == [{row.id: tuple(r[0].token_ids) for row, r in zip(rows, drawn, strict=True)}]


def test_prompts_without_solutions(rows: list[Any]) -> None:
    bare = [replace(row, token_ids=(), step_ends=()) for row in rows]
    assert worker.run(bare, source=worker.OWN).gradients
    with pytest.raises(TrainingError, match=r"no example of 1 batch.* has a single target"):
        worker.run(bare)


def launch(out: Path, rows: int, ranks: int) -> list[dict[str, Any]]:
    done = forked.run([str(out), str(rows)], ranks=ranks, script=WORKER, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(f"{out}.{rank}", weights_only=True) for rank in range(ranks)]


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path, distance: Callable[..., float]) -> None:
    """The same samples, whoever draws them; then the same losses and gradients, with an odd number of rows."""
    (one,) = launch(tmp_path / "1.pt", 7, 1)
    two = launch(tmp_path / "2.pt", 7, 2)
    for name in ("data", "own"):
        assert (one[name]["world"], two[0][name]["world"]) == (1, 2)
        for step, written in enumerate(one[name]["written"]):
            shares = [rank[name]["written"][step] for rank in two]
            assert not set(shares[0]) & set(shares[1])
            assert shares[0] | shares[1] == written
        assert distance(two[0][name]["gradients"], one[name]["gradients"]) < TOLERANCE
        assert one[name]["metrics"] == pytest.approx(two[0][name]["metrics"], rel=1e-6)
    assert len(one["own"]["written"]) == 2


# ---- focus -----------------------------------------------------------------------------------------------------------


def test_weights_by_scores() -> None:
    nan = float("nan")
    scores = [0.9, 0.2, 0.8, 0.1, nan]
    assert FocusConfig("checker").weights(scores) == (0.0, 1.0, 0.0, 1.0, 0.0)
    assert FocusConfig("checker", threshold=0.95, correct=0.1).weights([0.9, nan]) == (1.0, 0.1)


@pytest.mark.parametrize("average", ["tokens", "sequences"])
def test_only_incorrect_steps(average: Any, views: Any, distance: Callable[..., float]) -> None:
    """Gradients of the tokens of incorrect steps alone, averaged over those tokens, or within each flawed solution."""
    rows = worker.noisy_examples()
    module = worker.run(
        rows,
        focus=FocusConfig("checker"),
        divergence=ReverseKL(),
        average=average,
        micro_batch_tokens=100,
        chunk_size=5,
    )
    student = views[0]
    student.zero_grad()
    per_row, counted, everything = [], 0, 0
    for row in rows:
        ids = torch.tensor([[*row.prompt_ids, *row.token_ids]])
        logps = [v.model(input_ids=ids).logits[0, len(row.prompt_ids) - 1 : -1].log_softmax(-1) for v in views]
        values = reverse_kl(logps[0], logps[1].detach())
        incorrect = [
            i for span, ok in zip(row.spans, row.row["step_labels"], strict=True) if not ok for i in range(*span)
        ]
        everything += len(values)
        if incorrect:
            counted += len(incorrect)
            per_row.append(values[incorrect].sum() if average == "tokens" else values[incorrect].mean())
    assert 0 < len(per_row) < len(rows)
    (torch.stack(per_row).sum() / (counted if average == "tokens" else len(per_row))).backward()
    expected = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    assert distance(module.gradients, expected) < TOLERANCE
    assert float(module.trainer.callback_metrics["train/focus"]) == pytest.approx(counted / everything, rel=1e-6)


def test_a_divergence_without_a_function_is_refused_by_name() -> None:
    class Own(ReverseKL):
        pass

    with pytest.raises(ConfigError, match=r"divergence Own has no function in .*DIVERGENCES \(JSD, ForwardKL"):
        GKDModule(PolicyConfig(path="tiny-0.1m"), teacher=Local("tiny-0.1m"), divergence=Own())


def test_batches_in_which_nothing_counts_are_skipped(rows: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from stepkd.errors import TrainingError
    from stepkd.modules import base

    monkeypatch.setattr(base, "MOST_SKIPPED", 3)
    with pytest.raises(
        TrainingError, match=r"step 0: no example of 3 batch\(es\) in a row has a single target \(kd all 0\)"
    ):
        worker.run(rows[:2], focus=FocusConfig("checker"))
    weighted = worker.run(rows, focus=FocusConfig("checker", correct=1.0))
    plainly = worker.run(rows)
    assert all(torch.equal(weighted.gradients[name], plainly.gradients[name]) for name in plainly.gradients)


def test_focus_on_own_samples_by_a_reward_model(tmp_path: Path, rows: list[Any]) -> None:
    from stepkd.models.checkpoint import save_policy

    scorer = Policy.load(PolicyConfig(path="tiny-0.1m"))
    scorer.attach_step_head(LabelTokens())
    save_policy(scorer, tmp_path / "prm")
    focus = FocusConfig(PRM(str(tmp_path / "prm"), template="task"), correct=0.5)
    assert worker.run(rows, source=worker.OWN, focus=focus).gradients
    scorer = Policy.load(PolicyConfig(path="tiny-0.1m"))
    scorer.attach_step_head(LabelTokens(meaning="outcome"))
    save_policy(scorer, tmp_path / "orm")
    with pytest.raises(ConfigError, match="knows nothing of steps"):
        worker.run(rows, focus=FocusConfig(PRM(str(tmp_path / "orm"), template="task")))


# ---- fidelity --------------------------------------------------------------------------------------------------------


def measure(rows: list[Any], views: Any, **settings: Any) -> dict[str, float]:
    """Validation of an untrained student on rows."""
    from lightning.pytorch import Trainer

    module = worker.GKD(
        PolicyConfig(**worker.POLICY),
        **{
            "teacher": worker.TEACHER,
            "source": worker.DATA,
            "fidelity": FidelityConfig(SamplingConfig(max_new_tokens=16)),
            **settings,
        },
    )
    plan = BatchPlan([row.size for row in rows], size=4, shuffle=False)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator="cpu", enable_model_summary=False, **quiet)
    (found,) = trainer.validate(module, StepLoader(rows, plan), verbose=False)
    return {name.removeprefix("val/fidelity/"): value for name, value in found.items() if "fidelity" in name}


def test_fidelity_is_what_plain_logits_give(views: Any, rows: list[Any]) -> None:
    from stepkd.sampling.transformers_engine import TransformersEngine

    found = measure(rows, views, micro_batch_tokens=90, chunk_size=4)
    student = views[0]
    drawn = TransformersEngine(student).generate(
        [row.prompt_ids for row in rows], SamplingConfig(max_new_tokens=16), purpose="fidelity"
    )
    forward, reverse, agree, gap = [], [], [], []
    for row, (rollout,) in zip(rows, drawn, strict=True):
        ids = torch.tensor([[*row.prompt_ids, *rollout.token_ids]])
        start = len(row.prompt_ids)
        with torch.no_grad():
            logits = [v.model(input_ids=ids).logits[0, start - 1 : -1] for v in views]
        s, t = (each.log_softmax(-1) for each in logits)
        forward.append((t.exp() * (t - s)).sum(-1))
        reverse.append((s.exp() * (s - t)).sum(-1))
        agree.append((s.argmax(-1) == t.argmax(-1)).double())
        gap.append((t.exp() * t).sum(-1) - (s.exp() * s).sum(-1))
    expected = {"forward_kl": forward, "reverse_kl": reverse, "agreement": agree, "entropy_gap": gap}
    for name, values in expected.items():
        assert found[name] == pytest.approx(float(torch.cat(values).mean()), rel=1e-5, abs=1e-7), name
    assert sum(found[f"answers_{name}"] for name in ANSWERS) == pytest.approx(1.0)


def calibration_error(policy: Policy, rows: list[Any]) -> float:
    """ECE of 15 bins over all given tokens, from plain logits: weighted mean of |accuracy - confidence|."""
    pairs: list[tuple[float, bool]] = []
    for row in rows:
        ids = torch.tensor([[*row.prompt_ids, *row.token_ids]])
        start = len(row.prompt_ids)
        with torch.no_grad():
            top = policy.model(input_ids=ids).logits[0, start - 1 : -1].softmax(-1).max(-1)
        pairs += list(zip(top.values.tolist(), (top.indices == ids[0, start:]).tolist(), strict=True))
    error = 0.0
    for number in range(15):
        inside = [pair for pair in pairs if number / 15 <= pair[0] < (number + 1) / 15]
        if inside:
            sure, right = (sum(values) / len(inside) for values in zip(*inside, strict=True))
            error += len(inside) / len(pairs) * abs(sure - right)
    return error


def test_calibration_on_given_tokens(views: Any, rows: list[Any]) -> None:
    found = measure(rows, views, micro_batch_tokens=90, chunk_size=4, fidelity=FidelityConfig(answers=False))
    assert found["ece"] == pytest.approx(calibration_error(views[0], rows), rel=1e-5)
    assert found["teacher_ece"] == pytest.approx(calibration_error(views[1], rows), rel=1e-5)
    assert not [name for name in found if name.startswith("ece/")]
    few_tokens = replace(worker.TEACHER, top_k=TopK(3))
    few = measure(rows, views, teacher=few_tokens, fidelity=FidelityConfig(answers=False))
    assert few["teacher_ece"] == pytest.approx(found["teacher_ece"], rel=1e-5), "its most likely token is in no tail"
    bare = [replace(row, token_ids=(), step_ends=()) for row in rows]
    assert "ece" not in measure(bare, views, fidelity=FidelityConfig(answers=False))


def test_a_student_that_is_its_teacher(views: Any, rows: list[Any], tmp_path: Path) -> None:
    from stepkd.models.checkpoint import save_policy

    save_policy(Policy.load(PolicyConfig(**worker.POLICY)), tmp_path / "same")
    found = measure(rows, views, teacher=Local(str(tmp_path / "same")))
    assert abs(found["forward_kl"]) < 1e-9
    assert abs(found["reverse_kl"]) < 1e-9
    assert (found["agreement"], found["answers_teacher_correct"], found["answers_student_correct"]) == (1.0, 0.0, 0.0)


def test_fidelity_to_a_teacher_of_few_tokens(views: Any, rows: list[Any]) -> None:
    found = measure(
        rows[:4], views, teacher=replace(worker.TEACHER, top_k=TopK(3)), fidelity=FidelityConfig(answers=False)
    )
    assert not [name for name in found if name.startswith("answers")]
    assert found["reverse_kl"] > 0


def test_kinds_of_answers() -> None:
    kinds = {
        ((True, "5"), (True, "5")): "both_correct",
        ((True, "5"), (False, "4")): "student_correct",
        ((False, "4"), (True, "5")): "teacher_correct",
        ((False, "4"), (False, "4")): "same_incorrect",
        ((False, "4"), (False, "3")): "different_incorrect",
        ((False, None), (False, None)): "different_incorrect",
    }
    assert {pair: _kind(*pair) for pair in kinds} == kinds


# ---- teachers --------------------------------------------------------------------------------------------------------


def test_the_teacher_is_no_part_of_the_student(rows: list[Any]) -> None:
    module = worker.run(rows)
    names = set(module.state_dict())
    assert names == {f"policy.{name}" for name in module.model.state_dict()}
    assert all(not p.requires_grad for p in module.teacher.policy.parameters())
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    assert not [name for name in checkpoint["state_dict"] if "teacher" in name]
    loop = {"total": {"started": 0, "processed": 0}, "current": {"started": 0, "processed": 0}}
    checkpoint["loops"] = {"fit_loop": {"epoch_loop.batch_progress": loop, "epoch_progress": loop}}
    module.on_load_checkpoint(checkpoint)
    checkpoint["stepkd"]["frozen"]["teacher"] = "other"
    with pytest.raises(ModelError, match=r"begun with another teacher model \(weights other then"):
        module.on_load_checkpoint(checkpoint)


def test_a_teacher_reads_under_its_own_template(views: Any, rows: list[Any], distance: Callable[..., float]) -> None:
    from stepkd.data.templates import PromptTemplate

    template = PromptTemplate(style="plain", plain="7+{prompt}")
    module = worker.run(
        rows,
        teacher=replace(worker.TEACHER, template=template),
        divergence=ReverseKL(),
        micro_batch_tokens=100,
    )
    student, teacher = views
    own_prompts = replace(worker.TEACHER, template=template).build()
    own_prompts.bind(student.tokenizer)
    prompts = own_prompts.prompts(rows)
    assert all(len(prompt) == len(row.prompt_ids) + 2 for prompt, row in zip(prompts, rows, strict=True))
    student.zero_grad()
    values = []
    for row, prompt in zip(rows, prompts, strict=True):
        logits = []
        for view, start in ((student, row.prompt_ids), (teacher, prompt)):
            ids = torch.tensor([[*start, *row.token_ids]])
            logits.append(view.model(input_ids=ids).logits[0, len(start) - 1 : -1].log_softmax(-1))
        values.append(reverse_kl(logits[0], logits[1].detach()))
    torch.cat(values).mean().backward()
    expected = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    assert distance(module.gradients, expected) < TOLERANCE


def test_a_teacher_without_the_students_special_tokens(tmp_path: Path, rows: list[Any]) -> None:
    from stepkd.models.checkpoint import save_policy

    student = Policy.load(PolicyConfig(path="tiny-0.1m"))
    student.tokenizer.add_special_tokens({"extra_special_tokens": ["<wait>", "<done>"]})
    student.causal_lm.resize_token_embeddings(len(student.tokenizer))
    save_policy(student, tmp_path / "student")
    message = r"vocabulary is not the model's \(\d+ and \d+ tokens; '<(wait|done)>' has id"
    with pytest.raises(ModelError, match=message):
        worker.run(rows, policy={"path": str(tmp_path / "student")}, teacher=Local("tiny-0.5m"))


def test_unfit_teachers(tmp_path: Path, rows: list[Any]) -> None:
    from stepkd.models.checkpoint import save_policy

    teacher = Policy.load(PolicyConfig(path="tiny-0.1m"))
    teacher.tokenizer.add_tokens(["zwölf"])
    teacher.causal_lm.resize_token_embeddings(len(teacher.tokenizer))
    save_policy(teacher, tmp_path / "other")
    with pytest.raises(ModelError, match=r"the teacher's vocabulary is not the model's .*'zwölf'"):
        worker.run(rows, teacher=Local(str(tmp_path / "other")))
    scorer = Policy.load(PolicyConfig(path="tiny-0.1m"))
    scorer.attach_step_head(LabelTokens())
    save_policy(scorer, tmp_path / "prm")
    with pytest.raises(ModelError, match="is a reward model: a teacher is a language model"):
        worker.run(rows, teacher=Local(str(tmp_path / "prm")))


@pytest.mark.parametrize(
    ("max_length", "new", "message"),
    [
        (128, 0, r"data\.max_length=128 exceeds the teacher's context of 64 tokens"),
        (64, 80, r"a prompt with 80 new tokens exceeds the teacher's context of 64 tokens \(\d\d\)"),
        (64, 4, None),
    ],
)
def test_the_teachers_context_is_checked(max_length: int, new: int, message: str | None, tmp_path: Path) -> None:
    for part in build_tiny("tiny-0.1m", seed=1):
        part.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    source = SourceConfig(lmbda=1.0, sampling=SamplingConfig(max_new_tokens=new)) if new else SourceConfig(lmbda=0.0)
    module = GKDModule(PolicyConfig(path="tiny-0.1m"), Local(str(tmp_path)), source=source)
    spec = DataConfig(source="task", options={"task": "modular:terms=2-4", "n": 8})
    data = StepData(spec, template="task", max_length=max_length, global_batch_size=4)
    settings: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator="cpu", max_steps=1, enable_model_summary=False, **settings)
    with pytest.raises(ConfigError, match=message) if message else nullcontext():
        trainer.fit(module, data)


def test_a_teacher_that_is_not_finite_stops_the_run(tmp_path: Path, rows: list[Any]) -> None:
    from stepkd.errors import TrainingError
    from stepkd.models.checkpoint import save_policy

    teacher = Policy.load(PolicyConfig(path="tiny-0.1m"))
    with torch.no_grad():
        teacher.causal_lm.get_output_embeddings().weight[5] = float("nan")
    save_policy(teacher, tmp_path / "broken")
    with pytest.raises((TrainingError, ModelError), match="finite"):
        worker.run(rows, teacher=Local(str(tmp_path / "broken")))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: JSD(beta=1.5), r"divergence.beta=1.5: must lie in \[0, 1\]"),
        (lambda: JSD(temperature=0.0), "divergence.temperature=0.0: must be positive"),
        (lambda: TopK(0), "top_k.k=0: must be at least 1"),
        (lambda: SkewForwardKL(skew=-0.1), r"divergence.skew=-0.1: must lie in \[0, 1\]"),
        (lambda: BalancedKL(delta=0.5), "divergence.delta=0.5: must be at least 1"),
        (lambda: Beside(0.0), "cross_entropy.weight=0.0: must be positive"),
        (
            lambda: GKDModule(PolicyConfig(), Local("x", top_k=TopK(4)), NKD()),
            "divergence NKD reads the whole distribution, and the teacher Local is compared in its most likely tokens",
        ),
        (lambda: SourceConfig(lmbda=-0.1), r"source.lmbda=-0.1: must lie in \[0, 1\]"),
        (lambda: SourceConfig(sampling=SamplingConfig(temperature=0.0)), "greedy samples are no samples"),
        (
            lambda: FidelityConfig(SamplingConfig(temperature=0.0)),
            "fidelity.sampling: n=1, temperature=0.0: one sample",
        ),
        (lambda: FidelityConfig(SamplingConfig(n=2)), "fidelity.sampling: n=2"),
        (lambda: FocusConfig("checker", correct=-1.0), r"focus.correct=-1.0: must lie in \[0, 1\]"),
        (lambda: FocusConfig("checker", threshold=1.0), "focus.threshold=1.0"),
        (lambda: LearnedTemperature(lr=0.0), "soften.lr=0.0: must be positive"),
        (
            lambda: GKDModule(PolicyConfig(), Local("x"), soften=LearnedTemperature()),
            "soften learns a temperature by the completions' tokens, and source.lmbda=0.5 has the student sample",
        ),
        (
            lambda: GKDModule(
                PolicyConfig(), Local("x", top_k=TopK(4)), source=worker.DATA, soften=LearnedTemperature()
            ),
            "soften tempers the whole distribution, and the teacher Local is compared in its most likely tokens",
        ),
        (lambda: Local(""), "teacher.path is empty"),
        (lambda: Local("x", dtype="bf16"), "unknown teacher.dtype 'bf16'"),  # type: ignore[arg-type]
    ],
)
def test_mistakes(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
