"""Tiny models, trained on the spot on the CPU: what the quick start and the experiments of the claims share.

:func:`train_tiny` trains what a builder makes: :func:`tiny_sft`, :func:`tiny_gkd`, :func:`tiny_kdrl`,
:func:`tiny_preference` or :func:`tiny_prm`. Every builder takes ``start`` (tiny model preset, or the folder of a model
to go on from), ``lr`` (peak learning rate) and ``seed`` (of data, order, sampling and new weights).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, TypeAlias

from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from stepkd.data.datamodule import StepData
from stepkd.data.spec import DataConfig
from stepkd.data.step_labels import LabelRule
from stepkd.models.checkpoint import export_model
from stepkd.models.load import load_tokenizer
from stepkd.models.spec import PolicyConfig
from stepkd.models.step_head_config import LabelTokens
from stepkd.modules.distillation_settings import DivergenceConfig, SourceConfig
from stepkd.modules.dpo import DPOModule
from stepkd.modules.fidelity import FidelityConfig
from stepkd.modules.gkd import GKDModule
from stepkd.modules.kdrl import KDRLModule
from stepkd.modules.kto import KTOModule, StepKTOModule
from stepkd.modules.optim import OptimizerConfig
from stepkd.modules.prm import LanguageModelling, PRMModule, StepCrossEntropy
from stepkd.modules.settings import (
    KDConfig,
    PolicyLossConfig,
    RolloutConfig,
    StepCreditConfig,
)
from stepkd.modules.sft import SFTModule
from stepkd.runs.logger import JsonlLogger
from stepkd.sampling.engines import InProcess
from stepkd.sampling.sampler import SamplingConfig
from stepkd.steps.format import StepFormat
from stepkd.teachers.cache import write_cache
from stepkd.teachers.config import Cached, Local, TopK
from stepkd.teachers.local import LocalTeacher
from stepkd.training.checkpoints import AtomicCheckpointIO
from stepkd.training.progress import StepProgress

GLOBAL_BATCH = 64
"""Solutions per optimiser step."""
PROMPTS, GROUP = 32, 8
"""Prompts per optimiser step of :func:`tiny_kdrl`, and completions of each."""
NEW_TOKENS = 64
"""Longest sampled completion, where nothing else is said."""
DEMONSTRATIONS = 20_000
"""Different problems in a training set, where nothing else is said; a small task has fewer."""
Built: TypeAlias = tuple[LightningModule, LightningDataModule]


def train_tiny(
    folder: Path, build: Callable[..., Built], *, steps: int, progress: bool = False, **settings: Any
) -> Path:
    """Train a tiny model, on the CPU, and export it.

    Args:
        folder: where the run's metrics (``metrics.jsonl``) and model go; made when missing. It belongs to these
            settings: a model that an earlier call exported there is returned as it is.
        build: makes the module and its data.
        steps: optimiser steps, at least 1.
        progress: print the loss while training.
        **settings: arguments of ``build``.

    Returns:
        The exported model folder, ``folder/model``.
    """
    model = folder / "model"
    if model.is_dir():
        return model
    module, data = build(**settings)
    folder.mkdir(parents=True, exist_ok=True)
    trainer = _trainer(
        max_steps=steps,
        logger=JsonlLogger(folder),
        callbacks=[StepProgress(every_n_steps=100)] if progress else [],
        enable_progress_bar=progress,
        log_every_n_steps=1,
        default_root_dir=str(folder),
    )
    trainer.fit(module, data)
    checkpoint = folder / "last.ckpt"
    trainer.strategy.checkpoint_io = AtomicCheckpointIO()
    trainer.save_checkpoint(checkpoint)
    return export_model(checkpoint, model, overwrite=True)


def tiny_data(
    task: str,
    n: int,
    seed: int,
    *,
    noise: Mapping[str, Any] | None = None,
    batch: int = GLOBAL_BATCH,
    split: str = "train",
) -> StepData:
    """Generated solutions as a data module: for training, or for validation when the split is another one.

    Args:
        task: tiny-world task with its settings, for example ``modular:terms=4,modulus=10``.
        n: different problems.
        seed: of problems and order.
        noise: slips (fields of :class:`stepkd.tasks.Noise`), None for none.
        batch: rows per optimiser step.
        split: ``train``, ``validation`` or ``test``.
    """
    options: dict[str, Any] = {"task": task, "n": n, "seed": seed}
    if noise is not None:
        options["noise"] = dict(noise)
    spec = DataConfig(source="task", split=split, options=options)
    used: dict[str, Any] = {"train" if split == "train" else "validation": spec}
    return StepData(**used, template="task", global_batch_size=batch, max_length=128, seed=seed)


def tiny_sft(
    *,
    start: str | Path,
    lr: float,
    seed: int,
    task: str,
    demonstrations: int = DEMONSTRATIONS,
    noise: Mapping[str, Any] | None = None,
) -> Built:
    """Fine-tuning on generated solutions; cosine schedule, 5% warm-up.

    Args:
        start, lr, seed: see the module's text.
        task: tiny-world task with its settings.
        demonstrations: different problems in the training set.
        noise: slips in the demonstrations (fields of :class:`stepkd.tasks.Noise`), None for clean ones.
    """
    module = SFTModule(PolicyConfig(path=str(start), init_seed=seed), **_common(lr, seed))
    return module, tiny_data(task, demonstrations, seed, noise=noise)


def tiny_gkd(
    *,
    start: str | Path,
    lr: float,
    seed: int,
    task: str,
    teacher: str | Path,
    demonstrations: int = DEMONSTRATIONS,
    divergence: DivergenceConfig,
    student: float = 1.0,
    of_teacher: float = 0.0,
    cache: Path | None = None,
    top_k: TopK | None = None,
) -> Built:
    """Distillation from a tiny teacher; cosine schedule, 5% warm-up.

    Args:
        start, lr, seed: see the module's text.
        task: tiny-world task with its settings.
        teacher: folder of the model to learn from.
        demonstrations: different problems in the training set.
        divergence: how far the student is from it.
        student, of_teacher: share of batches sampled by the student, and of the others by the teacher; the rest are
            the data's solutions.
        cache: learn from a cache of the teacher's ``top_k`` likeliest tokens, written here first.
        top_k: compare only these; None: the whole vocabulary.
    """
    if cache is not None:
        assert top_k is not None, "a cache holds so many tokens"
        _write_cache(cache, teacher, start, tiny_data(task, demonstrations, seed), top_k.k)
    module = GKDModule(
        PolicyConfig(path=str(start)),
        Local(str(teacher), top_k=top_k) if cache is None else Cached(str(cache), top_k=top_k),
        divergence=divergence,
        source=SourceConfig(lmbda=student, teacher=of_teacher, sampling=SamplingConfig(max_new_tokens=NEW_TOKENS)),
        **_common(lr, seed),
    )
    return module, tiny_data(task, demonstrations, seed)


def tiny_kdrl(
    *,
    start: str | Path,
    lr: float,
    seed: int,
    task: str,
    teacher: str | Path | None,
    demonstrations: int = DEMONSTRATIONS,
    kd: KDConfig | None = None,
    policy_loss: PolicyLossConfig | None = None,
    step_credit: StepCreditConfig | None = None,
    max_new_tokens: int = NEW_TOKENS,
) -> Built:
    """GRPO, on-policy distillation or both, 32 prompts with 8 completions each a step; constant after 10% warm-up.

    Args:
        start, lr, seed: see the module's text.
        task: tiny-world task with its settings.
        teacher: folder of the teacher; None: rewards alone.
        demonstrations: different problems in the training set.
        kd, policy_loss, step_credit: as for :class:`~stepkd.modules.kdrl.KDRLModule`.
        max_new_tokens: longest sampled completion.
    """
    module = KDRLModule(
        PolicyConfig(path=str(start)),
        teacher=None if teacher is None else Local(str(teacher)),
        rollout=RolloutConfig(sampling=SamplingConfig(n=GROUP, max_new_tokens=max_new_tokens)),
        engine=InProcess(max_rows=PROMPTS * GROUP),
        policy_loss=policy_loss,
        kd=kd,
        step_credit=step_credit,
        **_common(lr, seed, schedule="constant", warmup=0.1),
    )
    return module, tiny_data(task, demonstrations, seed, batch=PROMPTS)


def tiny_preference(
    *,
    start: str | Path,
    lr: float,
    seed: int,
    method: Literal["kto", "step_kto", "dpo"],
    rows: Path,
    global_batch_size: int,
    allow_one_class: bool = False,
    **settings: Any,
) -> Built:
    """KTO, Step-KTO or DPO; cosine schedule, 10% warm-up.

    Args:
        start, lr, seed: see the module's text.
        method: ``kto`` and ``step_kto`` read labelled rollouts, ``dpo`` pairs (of steps too).
        rows: file of labelled rollouts or pairs.
        global_batch_size: solutions or pairs per step.
        allow_one_class: train although all labels agree (scaled-down runs).
        **settings: further arguments of the module (beta, reduction, ...).
    """
    common = _rows_data(rows, seed, global_batch_size)
    data = StepData(**common, allow_one_class=allow_one_class and method != "dpo")
    module = {"kto": KTOModule, "step_kto": StepKTOModule, "dpo": DPOModule}[method](
        PolicyConfig(path=str(start)), **_common(lr, seed, warmup=0.1), **settings
    )
    return module, data


def tiny_prm(
    *,
    start: str | Path,
    lr: float,
    seed: int,
    labels: Path,
    meaning: Literal["correctness", "value", "outcome"] = "correctness",
    separator: str = "\n",
    after_error: Literal["keep", "truncate", "mask"] = "truncate",
    allow_one_class: bool = False,
) -> Built:
    """A reward model from labelled solutions, with the language-model loss on them beside the labels (weight 1; Cobbe
    et al. 2021); cosine schedule, 5% warm-up.

    Args:
        start, lr, seed: see the module's text.
        labels: labelled rollouts (``stepkd label``); for ``meaning="outcome"`` their ``correct`` is the label.
        meaning: what the scores estimate; ``outcome`` trains an outcome reward model.
        separator: text between steps; empty for steps that are cuts of one text.
        after_error: what to do with labels after the first incorrect step.
        allow_one_class: train although all labels agree (scaled-down runs).
    """
    data = StepData(
        **_rows_data(labels, seed, GLOBAL_BATCH),
        labels=LabelRule(after_error=after_error, scope="outcome" if meaning == "outcome" else "steps"),
        allow_one_class=allow_one_class,
    )
    module = PRMModule(
        PolicyConfig(path=str(start), init_seed=seed),
        LabelTokens(meaning=meaning, format=StepFormat(separator=separator)),
        losses=[StepCrossEntropy(), LanguageModelling()],
        **_common(lr, seed),
    )
    return module, data


def tiny_fidelity(model: str | Path, teacher: str | Path, *, task: str, problems: int, seed: int) -> dict[str, float]:
    """How like its teacher a model is on held-out problems (:mod:`stepkd.modules.fidelity`), names without a prefix."""
    module = GKDModule(
        PolicyConfig(path=str(model)),
        Local(str(teacher)),
        source=SourceConfig(lmbda=0.0),
        fidelity=FidelityConfig(SamplingConfig(max_new_tokens=NEW_TOKENS)),
        micro_batch_tokens=16_384,
        seed=seed,
    )
    trainer = _trainer(logger=False, enable_progress_bar=False)
    (found,) = trainer.validate(module, tiny_data(task, problems, seed, split="test"), verbose=False)
    prefix = "val/fidelity/"
    return {name.removeprefix(prefix): float(value) for name, value in found.items() if name.startswith(prefix)}


def _trainer(**options: Any) -> Trainer:
    return Trainer(accelerator="cpu", enable_checkpointing=False, enable_model_summary=False, **options)


def _common(lr: float, seed: int, *, schedule: Any = "cosine", warmup: float = 0.05) -> dict[str, Any]:
    optimizer = OptimizerConfig(lr=lr, schedule=schedule, warmup=warmup)
    return {"optimizer": optimizer, "micro_batch_tokens": 16_384, "seed": seed}


def _rows_data(rows: Path, seed: int, batch: int) -> dict[str, Any]:
    train = DataConfig(source="rows", path=str(rows))
    return {"train": train, "template": "task", "global_batch_size": batch, "max_length": 128, "seed": seed}


def _write_cache(folder: Path, teacher: str | Path, student: str | Path, data: StepData, top_k: int) -> None:
    """The teacher's likeliest tokens for all of the data's solutions."""
    tokenizer = load_tokenizer(PolicyConfig(path=str(student)))
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        lightning_module=SimpleNamespace(tokenizer=tokenizer), global_rank=0, world_size=1
    )
    data.setup("fit")
    local = LocalTeacher(Local(str(teacher)))
    local.bind(tokenizer)
    write_cache(folder, local, data.examples["train"], top_k=top_k)
