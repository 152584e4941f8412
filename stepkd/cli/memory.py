"""The memory of a recipe on each device: a lower bound from its shapes, and the peak of measured optimiser steps.

The lower bound is what a run holds all the time: weights, gradients, optimiser state and the models beside the policy,
counted on a model without storage. Activations, logits, caches of samples and what allocators and libraries hold come
on top; they are measured where the device is there, by real steps on the largest batch of the data.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing import get_context
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from stepkd.errors import MachineError
from stepkd.models.adapter import adapter_folder, add_empty_adapter, add_lora
from stepkd.models.load import model_config, training_spec
from stepkd.models.machine import memory_peak
from stepkd.models.source import as_trained
from stepkd.models.spec import PolicyConfig
from stepkd.safe import enter, is_safe
from stepkd.teachers.config import Local, Routed, SelfAverage, SelfBase, SelfSnapshot
from stepkd.training.failures import explained
from stepkd.training.fit import check_fit

ADVICE = (
    "take a smaller model.init_args.micro_batch_tokens or chunk_size, policy.gradient_checkpointing: true, or LoRA "
    "with policy.dtype bfloat16"
)
"""What to do about a recipe that takes too much."""


def lower_bound(module: Any, shards: int = 1) -> dict[str, int]:
    """What a recipe takes at least on each device. Nothing is loaded but configurations, and no data are read.

    Args:
        module: a :class:`~stepkd.modules.StepModule` that has loaded nothing.
        shards: ranks that the model is sharded over (FSDP2); 1: it is whole.

    Returns:
        Bytes of each part; the bound is their sum.

    Raises:
        StepkdError: a model whose settings cannot be read.
    """
    spec = as_trained(training_spec(module.policy_spec))
    model = skeleton(spec)
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    sharded = {"weights": weight_bytes(model, spec), "gradients": trained, "optimiser (AdamW)": 2 * trained}
    whole: dict[str, int] = {}
    teacher = module.arguments.get("teacher")
    several = teacher.teachers if isinstance(teacher, Routed) else {"": teacher}
    for name, each in several.items():
        if isinstance(each, Local):
            own = as_trained(PolicyConfig(path=each.path, dtype=each.dtype))
            kept = PolicyConfig(quantization=each.quantization)
            part = f"teacher {name}".strip()
            (sharded if each.sharded else whole)[part] = weight_bytes(skeleton(own), kept)
    if isinstance(teacher, SelfSnapshot | SelfAverage) or (isinstance(teacher, SelfBase) and spec.lora is None):
        whole["self-teacher"] = trained * (2 if isinstance(teacher, SelfAverage) else 1)  # the average and its copy
    reference = getattr(module, "reference_spec", None)
    adapts = spec.lora is not None or adapter_folder(spec.path) is not None  # the reference is the adapter-off view
    if reference is not None and not adapts and not reference.cache:  # a cache lets the copy go before the first step
        whole["reference"] = sharded["weights"]
    return {name: -(-size // shards) for name, size in sharded.items()} | whole


def skeleton(spec: PolicyConfig) -> Any:
    """A policy without storage: shapes, dtypes, and what is trained; not quantised, which needs real weights."""
    from transformers import AutoModelForCausalLM

    config = model_config(spec)
    folder = adapter_folder(spec.path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=spec.trust_remote_code)
        model = model.to(_dtype(spec, config))
        if folder is not None:
            return add_empty_adapter(model, folder)
        return model if spec.lora is None else add_lora(model, replace(spec, quantization="none"))


def weight_bytes(model: nn.Module, spec: PolicyConfig) -> int:
    """Bytes of the weights as they are kept."""
    packed = {"int8": 1.0, "nf4": 0.53}.get(spec.quantization)  # 4 bits and the scales of their blocks

    def size(name: str, each: Any) -> float:
        kept = packed is None or each.dim() != 2 or "lora_" in name or "embed" in name
        return float(each.element_size()) if kept or packed is None else packed

    return int(sum(each.numel() * size(name, each) for name, each in model.named_parameters()))


def _dtype(spec: PolicyConfig, config: Any) -> torch.dtype:
    stored = getattr(config, "dtype", None) if spec.dtype is None else getattr(torch, spec.dtype)
    return stored if isinstance(stored, torch.dtype) else torch.float32


def in_own_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns or raises in another process, which the system may kill for its memory (MachineError)."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(work, *arguments).result()
        except BrokenProcessPool as error:
            raise MachineError(f"the process was killed, as a system does that is out of memory: {ADVICE}") from error


def two_steps(words: list[str], device: str) -> int:
    """Bytes that two optimiser steps of a recipe take at their peak; the second one holds the optimiser's state.

    Args:
        words: the recipe, as words of ``stepkd fit``.
        device: ``cpu``, for which the whole process counts, or ``cuda``: what torch's allocator held.

    Raises:
        MachineError: the memory ran out.
        StepkdError: what would stop the run itself.
    """
    if is_safe():
        enter()  # this process did not come through the command line
    with contextlib.redirect_stdout(sys.stderr), TemporaryDirectory() as folder:
        module, data, settings = check_fit(words=words)
        data.overlap_ngram = 0
        trainer = Trainer(
            accelerator=device,
            devices=1,
            precision=settings.get("precision"),
            max_steps=2,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[_LargestBatch()],
        )
        try:
            trainer.fit(module, data)
        except Exception as error:
            raise explained(error, module) or error from None
    return torch.cuda.max_memory_reserved() if device == "cuda" else memory_peak() or 0


class _LargestBatch(Callback):
    """Leaves the data module one training batch: the one with most tokens in the first epoch."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Once the data are read."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        examples = data.examples["train"]
        batches = data.train_dataloader().plan.batches(0)
        largest = max(batches, key=lambda batch: sum(examples[i].size for i in batch))
        data.examples["train"] = [examples[i] for i in largest]
