"""A student that teaches itself: whose weights it reads, what it keeps twice, and that a resumed run keeps them."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from stepkd.cli import main
from stepkd.errors import ConfigError
from stepkd.models.checkpoint import load_trained
from stepkd.models.policy import Policy
from stepkd.models.spec import LoRAConfig, PolicyConfig
from stepkd.modules.fidelity import FidelityConfig
from stepkd.modules.gkd import GKDModule
from stepkd.modules.gkd_settings import Beside, ForwardKL, Mixed, SourceConfig
from stepkd.teachers.config import Local, SelfAverage, SelfBase, SelfSnapshot

WORKER = Path(__file__).with_name("gkd_worker.py")
_SPEC = importlib.util.spec_from_file_location("gkd_worker", WORKER)
assert _SPEC is not None
worker = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(worker)  # type: ignore[union-attr]

MIX = Mixed(start=0.25, end=0.75, steps=3)
SETTINGS: dict[str, Any] = {"divergence": ForwardKL(), "cross_entropy": MIX}
LORA = {"lora": LoRAConfig(r=2, alpha=4.0)}


@pytest.fixture(scope="module")
def rows() -> list[Any]:
    return list(worker.examples(4))


class Recorded(worker.GKD):  # type: ignore[misc,name-defined]
    """Keeps the student's weights before every optimiser step, and the teacher's logits during it."""

    def prepare(self, batch: Any) -> Any:
        for prepared in super().prepare(batch):
            self.history.append({n: p.detach().clone() for n, p in self.model.trainable_parameters()})
            micro = prepared[0]
            signals = self.teacher.signals(micro, temperature=1.0)
            self.seen.append(signals.head(signals.hidden_NH).detach().clone())
            self.first = micro
            self.batches.append(micro)
            yield prepared


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch, rows: list[Any]) -> Any:
    def run(**settings: Any) -> Any:
        monkeypatch.setattr(worker, "GKD", Recorded)
        Recorded.history, Recorded.seen, Recorded.batches = [], [], []
        return worker.run(rows, **{**SETTINGS, **settings})

    return run


def logits_with(module: Any, weights: dict[str, torch.Tensor], policy: dict[str, Any] | None = None) -> torch.Tensor:
    """Logits at the targets of the last micro-batch with these weights, by a model of its own."""
    other = Policy.load(PolicyConfig(**{**worker.POLICY, **(policy or {})}))
    for name, parameter in other.trainable_parameters():
        parameter.data.copy_(weights[name])
    hidden = other.hidden(module.first.input_ids_BT, module.first.attention_mask_BT)
    return other.head(hidden.flatten(0, 1)[module.first.needed_N]).detach()


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).norm() < 1e-10 * b.norm())


@pytest.mark.parametrize("policy", [{}, LORA])
def test_epoch_is_the_student_as_the_pass_began(recorded: Any, policy: dict[str, Any]) -> None:
    # All rows are one batch, so that every step is a pass.
    module = recorded(teacher=SelfSnapshot(), policy=policy, steps=3)
    history, seen = module.history, module.seen
    assert same(seen[1], logits_with(module, history[1], policy))
    assert same(seen[2], logits_with(module, history[2], policy))
    assert not same(seen[2], logits_with(module, history[0], policy))


def test_within_a_pass_of_several_batches_it_stands_still(recorded: Any) -> None:
    module = recorded(teacher=SelfSnapshot(), steps=5, size=2)  # two batches a pass
    seen, history = module.seen, module.history
    for step, then in ((0, 0), (1, 0), (2, 2), (3, 2), (4, 4)):
        module.first = module.batches[step]
        assert same(seen[step], logits_with(module, history[then])), step


def test_every_so_many_steps(recorded: Any) -> None:
    module = recorded(teacher=SelfSnapshot(every=2), steps=4)
    for step, then in ((0, 0), (1, 0), (2, 2), (3, 2)):
        assert same(module.seen[step], logits_with(module, module.history[then])), step


def test_ema_is_the_running_average(recorded: Any) -> None:
    module = recorded(teacher=SelfAverage(decay=0.5), steps=4)
    average = {name: value.float() for name, value in module.history[0].items()}
    for step in range(4):
        if step:
            for name, value in module.history[step].items():
                average[name] = 0.5 * average[name] + 0.5 * value.float()
        found, expected = module.seen[step], logits_with(module, average)
        assert (found - expected).norm() < 1e-6 * expected.norm(), step  # averages are float32


@pytest.mark.parametrize("policy", [{}, LORA, {"lora": LoRAConfig(r=2, modules_to_save=["lm_head"])}])
def test_base_is_the_student_before_training(recorded: Any, policy: dict[str, Any]) -> None:
    module = recorded(teacher=SelfBase(), policy=policy, steps=3)
    for seen in module.seen:
        assert same(seen, logits_with(module, module.history[0], policy))


def test_frozen_weights_are_not_kept_twice() -> None:
    student = Policy.load(PolicyConfig(path="tiny-0.1m", lora=LoRAConfig(r=2)))
    teacher = SelfAverage().build()
    teacher.follow(student)
    assert teacher._copy is not None
    twins = dict(teacher._copy.named_parameters())
    for name, parameter in student.named_parameters():
        assert (twins[name] is parameter) == (not parameter.requires_grad), name
        assert not twins[name].requires_grad
    kept = teacher.state()["weights"]
    assert set(kept) == {name for name, _ in student.trainable_parameters()}


def test_the_mix_is_a_cross_entropy_with_a_soft_target(recorded: Any, distance: Any) -> None:
    module = recorded(teacher=worker.TEACHER, steps=1)
    student, teacher = (Policy.load(PolicyConfig(**worker.POLICY)), load_trained("tiny-0.5m", dtype="float64"))
    loss = torch.zeros((), dtype=torch.float64)
    for row in module.first.examples:
        ids, start = torch.tensor([[*row.prompt_ids, *row.token_ids]]), len(row.prompt_ids)
        own, other = (m.model(input_ids=ids).logits[0, start - 1 : -1, : m.vocab_size] for m in (student, teacher))
        hard = torch.nn.functional.one_hot(ids[0, start:], own.shape[-1])
        soft = 0.75 * hard + 0.25 * other.detach().softmax(-1)
        loss = loss - (soft * own.log_softmax(-1)).sum()
    (loss / len(module.first.targets_N)).backward()
    expected = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    assert distance(module.gradients, expected) < 1e-10


def test_shares() -> None:
    assert [MIX.term_weights(step, None)[0] for step in range(5)] == [0.25, 0.5, 0.75, 0.75, 0.75]
    assert MIX.term_weights(None, None) == (0.75, 0.25), "in validation"
    assert Mixed().term_weights(99, 100)[0] == 0.8
    assert Mixed(start=0.3, steps=1).term_weights(0, None) == (0.3, 0.7)
    assert Beside(0.4).term_weights(3, 10) == Beside(0.4).term_weights(None, None) == (1.0, 0.4)
    with pytest.raises(ConfigError, match=r"cross_entropy.steps is null and the run has no planned end"):
        Mixed().term_weights(0, None)


@pytest.mark.parametrize(
    "teacher",
    [
        pytest.param(["SelfSnapshot"], marks=pytest.mark.slow),
        ["SelfSnapshot", "every", "2"],
        pytest.param(["SelfAverage", "decay", "0.6"], marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_ends_alike(teacher: list[str], tmp_path: Path) -> None:
    def fit(out: str, steps: int, *more: str) -> dict[str, torch.Tensor]:
        arguments = [
            *("fit", "--config", "recipes/tiny/self_distill.yaml", "--config", "recipes/base/tiny.yaml"),
            *("--model.init_args.policy.path", "tiny-0.1m", "--model.teacher", teacher[0]),
            *(["--model.teacher." + teacher[1], teacher[2]] if teacher[1:] else []),
            *("--model.cross_entropy.steps", "6", "--model.init_args.optimizer.schedule", "constant"),
            *("--model.init_args.optimizer.warmup", "0"),
            *("--data.init_args.train.options.n", "24", "--data.init_args.global_batch_size", "8"),
            *("--data.init_args.validation", "null", "--trainer.val_check_interval", "null"),
            *("--checkpoint.every_n_steps", "1", "--checkpoint.monitor", "null"),
            *("--trainer.max_steps", str(steps), "--out", str(tmp_path / out), *more),
        ]
        assert main(arguments) == 0
        found = torch.load(tmp_path / out / "checkpoints" / "last.ckpt", weights_only=True)
        return {**found["state_dict"], **{f"t.{k}": v for k, v in _weights(found).items()}}

    def _weights(checkpoint: dict[str, Any]) -> dict[str, torch.Tensor]:
        return dict(checkpoint["stepkd"]["method_state"]["teacher"]["weights"])

    whole = fit("whole", 7)
    fit("parts", 4)
    parts = fit("parts", 7, "--resume", "true")
    assert set(whole) == set(parts)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    trained = [name for name in whole if name.startswith("policy.")]
    assert any(not torch.equal(whole[name], whole[f"t.{name.removeprefix('policy.')}"]) for name in trained)


@pytest.mark.slow
def test_validation_reads_the_teacher_of_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        *("--config", "recipes/tiny/self_distill.yaml", "--config", "recipes/base/tiny.yaml"),
        *("--model.init_args.policy.path", "tiny-0.1m", "--data.init_args.train.options.n", "24"),
        *("--data.init_args.global_batch_size", "8", "--model.init_args.validation", "null"),
        *("--trainer.max_steps", "5", "--trainer.val_check_interval", "5", "--checkpoint.every_n_steps", "5"),
        *("--data.init_args.validation.options.n", "8"),
    ]
    assert main(["fit", *arguments, "--out", str(tmp_path / "run")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (during,) = [line["val/divergence"] for line in lines if "val/divergence" in line]
    checkpoint = str(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert main(["validate", *arguments, "--ckpt_path", checkpoint, "--out", str(tmp_path / "after")]) == 0
    (after,) = re.findall(r"val/divergence\s*│\s*([\d.e-]+)", capsys.readouterr().out)
    assert float(after) == pytest.approx(during, rel=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SelfSnapshot(every=0), "teacher.every=0"),
        (lambda: SelfAverage(decay=1.0), "teacher.decay=1.0"),
        (
            lambda: GKDModule(PolicyConfig(), SelfAverage(), fidelity=FidelityConfig()),
            "fidelity.answers compares the answers of two models, and the teacher SelfAverage is the student itself",
        ),
        (lambda: Local("x", sharded=True, device="cpu"), "set teacher.device to null"),
        (lambda: Local("x", quantization="nf3"), "unknown teacher.quantization 'nf3'"),
        (lambda: Mixed(end=1.5), r"cross_entropy.end=1.5: must lie in \[0, 1\]"),
        (lambda: Mixed(steps=0), "cross_entropy.steps=0"),
        (
            lambda: GKDModule(PolicyConfig(), SelfAverage(), source=SourceConfig(lmbda=0.0, teacher=0.5)),
            "source.teacher=0.5 .* the teacher SelfAverage is the student itself: set source.lmbda",
        ),
    ],
)
def test_bad_settings(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_quantised_teacher_needs_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stepkd.models.load.find_spec", lambda name: None)
    student = Policy.load(PolicyConfig(path="tiny-0.1m"))
    folder = "tiny-0.1m"
    with pytest.raises(ConfigError, match=r"quantization=.nf4. needs bitsandbytes"):
        Local(folder, quantization="nf4").build().bind(student.tokenizer, student.vocab_size)
