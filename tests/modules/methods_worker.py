"""Every method, for the tests that hold for all of them: one line of :data:`METHODS` each, and one run.

As a script it is one rank of a data-parallel run of all methods: the argument is the output file.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer

from stepkd.data.batching import BatchPlan, StepLoader
from stepkd.data.collate import collate
from stepkd.data.encode import Encoder, LabelRule
from stepkd.data.step_encode import StepEncoder
from stepkd.data.templates import get_template
from stepkd.models.checkpoint import save_policy
from stepkd.models.policy import Policy
from stepkd.models.sharding import whole_tensor
from stepkd.models.spec import Classifier, LabelTokens, PolicyConfig, StepHeadConfig, tiny_tokenizer
from stepkd.models.step_head import resolve_ids
from stepkd.modules.base import StepModule
from stepkd.modules.dpo import IPO, DPOModule
from stepkd.modules.gkd import GKDModule
from stepkd.modules.gkd_settings import Beside, LearnedTemperature
from stepkd.modules.kdrl import KDRLModule
from stepkd.modules.kto import ImplicitPRMModule, KTOModule, ReferencePointConfig, StepKTOModule
from stepkd.modules.prm import (
    PQM,
    LanguageModelling,
    MultilevelRanking,
    PRMModule,
    StepCrossEntropy,
    StepDecisions,
    StepRegression,
)
from stepkd.modules.prm_teachers import MCMI, StepDistillation
from stepkd.modules.sft import SFTModule
from stepkd.runs.launcher import check_launch, trainer_defaults
from stepkd.steps.segment import get_segmenter
from stepkd.tasks.rows import Noise, make_rows
from stepkd.training.sharded import FSDP2Strategy


def beside(name: str) -> Any:
    """A worker module of this folder."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


preference, gkd, kdrl = (beside(f"{name}_worker") for name in ("preference", "gkd", "kdrl"))
TOKENS, CLASSIFIER, SUBCLASSES = LabelTokens(), Classifier(), Classifier(subclasses=3)
_HELD: list[Any] = []
RATINGS, OUTCOME = LabelTokens(labels=("-", "0", "+")), Classifier(meaning="outcome")
APART = MultilevelRanking(lower=0.9, upper=0.0)


def solutions() -> list[Any]:
    """Of very different lengths, and more than two ranks can share evenly."""
    rows = make_rows("modular:terms=2-9", 7, seed=5)
    return Encoder(tiny_tokenizer(), get_template("task"), get_segmenter("newline")).examples(rows)


def labelled(head: StepHeadConfig) -> list[Any]:
    """Solutions with correct and incorrect steps; under three classes some correct ones are neutral."""
    rows = make_rows("modular:terms=2-6", 7, seed=5, noise=Noise(rate=0.3))
    if head.num_classes == 3:
        for row in rows:
            row["step_labels"] = [(i + 1) % 2 if good else -1 for i, good in enumerate(row["step_labels"])]
    marker = resolve_ids(head, tiny_tokenizer()).marker
    rule = LabelRule(after_error="keep", scope="outcome" if head.meaning == "outcome" else "steps")
    layout = {"format": head.format, "marker_id": marker, "num_classes": head.num_classes, "labels": rule}
    return StepEncoder(tiny_tokenizer(), get_template("task"), **layout).examples(rows)  # type: ignore[arg-type]


@cache
def reward_model() -> str:
    """Folder of an untrained one, wider than the student, whose last layer varies."""
    folder = tempfile.TemporaryDirectory()
    _HELD.append(folder)
    teacher = Policy.load(PolicyConfig(path="tiny-0.5m", dtype="float64", init_seed=3))
    head = teacher.attach_step_head(CLASSIFIER, seed=1)
    with torch.no_grad():
        for weight in head.parameters():
            weight.mul_(4)
    save_policy(teacher, Path(folder.name))
    return folder.name


class Method(NamedTuple):
    """A method with settings under which everything in it counts."""

    kind: type[StepModule]
    examples: Callable[[], list[Any]]
    settings: dict[str, Any] = {}  # noqa: RUF012
    """Values, or what gives one when the method is run."""


NO_POINTS = ReferencePointConfig(outcome="zero", step="zero")
FEEDBACK = {"reference": preference.OTHER, "class_weights": [1.5, 1.0]}
STEPS = {**FEEDBACK, "beta": 0.3, "loss_weights": {"step": 0.7}}
METHODS: dict[str, Method] = {
    "sft": Method(SFTModule, solutions),
    "sft by weight": Method(SFTModule, solutions, {"token_weights": {"=": 2.5, "####": 0.0, "1": 0.5}}),
    "prm": Method(PRMModule, lambda: labelled(TOKENS), {"losses": [StepCrossEntropy([2.0, 1.0])]}),
    "prm classifier": Method(PRMModule, lambda: labelled(CLASSIFIER), {"head": replace(CLASSIFIER, members=2)}),
    "prm language": Method(PRMModule, lambda: labelled(TOKENS), {"losses": [StepRegression(), LanguageModelling()]}),
    "prm pqm": Method(PRMModule, lambda: labelled(TOKENS), {"losses": [StepCrossEntropy(), PQM()]}),
    "prm mcmi": Method(
        PRMModule, lambda: labelled(TOKENS), {"losses": [StepCrossEntropy(), MCMI()], "loss_weights": {"mcmi": 0.5}}
    ),
    "prm distilled": Method(
        PRMModule,
        lambda: labelled(SUBCLASSES),
        {"head": SUBCLASSES, "losses": lambda: [StepDistillation(reward_model())]},
    ),
    "prm ratings": Method(PRMModule, lambda: labelled(RATINGS), {"head": RATINGS, "losses": [StepDecisions(), APART]}),
    "orm": Method(PRMModule, lambda: labelled(OUTCOME), {"head": OUTCOME, "losses": [StepRegression(form="bce")]}),
    "dpo": Method(DPOModule, lambda: preference.pair_examples(7), {"reference": preference.OTHER}),
    "dpo ipo": Method(DPOModule, lambda: preference.pair_examples(7), {"reference": preference.OTHER, "loss": IPO()}),
    "kto": Method(KTOModule, lambda: preference.feedback_examples(7)[:13], FEEDBACK),
    "implicit prm": Method(
        ImplicitPRMModule,
        lambda: preference.feedback_examples(7)[:13],
        {"reference": preference.OTHER, "beta": 0.3},
    ),
    "step kto": Method(StepKTOModule, lambda: preference.feedback_examples(7)[:13], STEPS),
    "step kto by index": Method(
        StepKTOModule,
        lambda: preference.feedback_examples(7)[:13],
        {**STEPS, "reference_point": ReferencePointConfig(step="per_index")},
    ),
    "step kto of the batch": Method(
        StepKTOModule,
        lambda: preference.feedback_examples(7)[:13],
        {**STEPS, "reference_point": ReferencePointConfig(outcome="batch", step="batch"), "reduction": "mean_steps"},
    ),
    "gkd": Method(GKDModule, solutions, {"teacher": gkd.TEACHER, "source": gkd.DATA}),
    "gkd soften": Method(
        GKDModule,
        solutions,
        {
            "teacher": gkd.TEACHER,
            "source": gkd.DATA,
            "soften": LearnedTemperature(),
            "cross_entropy": Beside(0.5),
        },
    ),
    "kdrl": Method(
        KDRLModule,
        lambda: kdrl.examples(3),
        {"teacher": kdrl.TEACHER, "rollout": kdrl.ROLLOUT, "rewards": kdrl.REWARDS},
    ),
}
VARIANTS = ("sft by weight", "prm mcmi", "prm distilled", "prm ratings", "orm", "implicit prm", "gkd soften")
"""Methods whose loss alone is another than that of one before: the default tests run one layout of each and every row
twice, slow ones each layout by itself and two processes."""
MAIN = tuple(name for name in METHODS if name not in VARIANTS)


class Recording(StepModule):
    """Keeps the gradients of the last optimiser step (before clipping), and how many micro-batches it had."""

    layout: dict[str, Any] = {}  # noqa: RUF012
    gradients: dict[str, torch.Tensor]
    split = 0
    taken_over = 0
    """Positions that have their states from another row."""

    def _collate(self, examples: Any, *, is_dummy: bool = False) -> Any:
        return collate(examples, 0, share=getattr(self, "shares_prompts", False), is_dummy=is_dummy, **self.layout)

    def prepare_examples(self, examples: Any) -> Any:
        batches = super().prepare_examples(examples)
        self.split = len(batches)
        own = [torch.arange(batch.input_ids_BT.numel()).view_as(batch.input_ids_BT) for batch in batches]
        shared = [
            place if batch.shared_BT is None else batch.shared_BT for place, batch in zip(own, batches, strict=True)
        ]
        self.taken_over = sum(int((a != b).sum()) for a, b in zip(own, shared, strict=True))
        return batches

    def _clip(self) -> float:
        named = self.model.trainable_parameters()
        self.gradients = {n: whole_tensor(p.grad.detach()).clone() for n, p in named if p.grad is not None}
        return super()._clip()


def run(
    name: str,
    *,
    steps: int = 1,
    copies: int = 1,
    layout: dict[str, Any] | None = None,
    shares: bool = True,
    **settings: Any,
) -> Any:
    """Optimiser steps of a method, all its examples (several times over) in every batch."""
    method = METHODS[name]
    rows = method.examples() * copies
    seen = SimpleNamespace(examples={"train": rows})
    kind: Any = type(
        "Recorded", (Recording, method.kind), {"layout": layout or {}, "shares": shares, "datamodule": seen}
    )
    own = {name: value() if callable(value) else value for name, value in method.settings.items()}
    module = kind(PolicyConfig(**preference.POLICY), **{"optimizer": preference.STEADY, **own, **settings})
    info = check_launch(os.environ, {})
    trainer = Trainer(
        **{**trainer_defaults(info), "accelerator": "cpu"},
        strategy=FSDP2Strategy() if os.environ.get("STRATEGY") == "fsdp2" else "auto",
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    plan = BatchPlan([each.size for each in rows], size=len(rows), shuffle=False)
    loader = StepLoader(rows, plan, rank=info.rank, world_size=info.world_size, position=lambda: module.position)
    trainer.fit(module, train_dataloaders=loader)
    return module


def facts(module: Any) -> dict[str, Any]:
    """What a run left: losses (float32, as they are logged), gradients, and how many ranks there were."""
    metrics = module.trainer.callback_metrics
    names = ("loss", *module.loss_names)
    return {
        "world": module.trainer.world_size,
        "losses": {name: float(metrics[f"train/{name}"]) for name in names},
        "gradients": module.gradients,
    }


def main(out: str, *names: str) -> None:
    """Two steps of each of these methods over the ranks of this launch."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    LlamaRMSNorm.forward = preference.full_precision_norm
    reward_model()  # while there is one rank: among several, transformers has the first alone write
    results = {name: facts(run(name, steps=2, micro_batch_tokens=150)) for name in names}
    if int(os.environ.get("RANK", 0)) == 0:
        torch.save(results, out)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
