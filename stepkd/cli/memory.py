"""The memory of a recipe on each device: a lower bound from its shapes, and the peak of measured optimiser steps.

The lower bound is what no run of the recipe can do without: weights, gradients, optimiser state, a chunk of logits and
the cache of sampled rows, counted on a model without storage. Activations and what allocators and libraries hold come
on top; they are measured where the device is there, by real steps on the largest batch of the data.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from stepkd.errors import MachineError, StepkdError
from stepkd.models.adapter import adapter_folder, add_empty_adapter, add_lora
from stepkd.models.checkpoint import trained_spec
from stepkd.models.load import model_config, training_spec
from stepkd.models.machine import memory_peak
from stepkd.models.source import as_trained
from stepkd.models.spec import PolicyConfig
from stepkd.safe import enter, is_safe
from stepkd.teachers.config import Local, SelfAverage, SelfBase, SelfSnapshot
from stepkd.training.failures import explained
from stepkd.training.fit import check_fit

ADVICE = (
    "take a smaller model.init_args.micro_batch_tokens or chunk_size, policy.gradient_checkpointing: true, or LoRA "
    "with policy.dtype bfloat16"
)
"""What to do about a recipe that takes too much."""


@dataclass
class Bound:
    """Bytes on one device that a recipe takes at least."""

    held: dict[str, int] = field(default_factory=dict)
    """What is there all the time."""
    phases: dict[str, dict[str, int]] = field(default_factory=dict)
    """What a phase needs beside it; phases follow each other."""
    facts: dict[str, str] = field(default_factory=dict)
    """What the figures are made of, for people."""

    @property
    def at_least(self) -> int:
        """The largest sum."""
        return sum(self.held.values()) + max((sum(parts.values()) for parts in self.phases.values()), default=0)


def lower_bound(module: Any, data: Any, *, precision: str = "32-true", shards: int = 1) -> Bound:
    """What a recipe takes at least on each device. Nothing is loaded but configurations, and no data are read.

    Args:
        module: a :class:`~stepkd.modules.StepModule` that has loaded nothing.
        data: its data module, not set up yet.
        precision: the Trainer's.
        shards: ranks that the model is sharded over (FSDP2); 1: it is whole.

    Raises:
        StepkdError: a model whose settings cannot be read.
    """
    found = Bound()
    spec = as_trained(training_spec(module.policy_spec))
    model = skeleton(spec)
    trained = [p for p in model.parameters() if p.requires_grad]
    trained_bytes = sum(p.numel() * p.element_size() for p in trained)
    found.held = {
        "weights": weight_bytes(model, spec),
        "gradients": trained_bytes,
        "optimiser (AdamW)": 2 * trained_bytes,
    } | ({} if module.ema_decay is None else {"running average": trained_bytes})
    total = sum(p.numel() for p in model.parameters())
    found.facts["parameters"] = f"{total:,}, trained {sum(p.numel() for p in trained):,}"
    divided = list(found.held)
    _other_models(found, module, spec, trained_bytes)
    if not module.scores_steps:  # a step head makes logits of its labels only
        targets = min(module.chunk_size, module.micro_batch_tokens, data.global_batch_size * data.max_length)
        found.phases["training"] = {"chunk of logits": 4 * targets * int(model.get_output_embeddings().weight.shape[0])}
    for name in ("rollout_spec", "source"):
        how = getattr(module, name, None)
        if how is not None and getattr(how, "lmbda", 1.0) > 0 and hasattr(module.engine, "max_rows"):
            rows = min(module.engine.max_rows, data.global_batch_size * how.sampling.n)
            found.phases["sampling"] = {"key-value cache": rows * cache_bytes(spec, how.sampling.longest)}
            found.facts["sampling"] = f"{rows} rows of {how.sampling.longest:,} new tokens"
    if shards > 1:
        gathered = {"gathered weights": found.held["weights"]}
        if "bf16-mixed" in precision:
            gathered["gathered weights"] = sum(p.numel() * min(p.element_size(), 2) for p in model.parameters())
        if getattr(module.arguments.get("teacher"), "sharded", False) and "teacher" in found.held:
            divided.append("teacher")
            gathered["gathered teacher"] = found.held["teacher"]
        found.held |= {name: -(-found.held[name] // shards) for name in divided}
        found.facts["sharded"] = f"over {shards} ranks"
        phases = ["sampling"] * ("sampling" in found.phases) + ["before a step"] * module.prepares_with_model
        for phase in phases + ["validation"] * (getattr(data, "specs", {}).get("validation") is not None):
            found.phases[phase] = found.phases.get(phase, {}) | gathered
    return found


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


def cache_bytes(spec: PolicyConfig, tokens: int) -> int:
    """Bytes of a row's keys and values."""
    config = model_config(spec).get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * size * tokens * _dtype(spec, config).itemsize)


def _other_models(found: Bound, module: Any, spec: PolicyConfig, trained_bytes: int) -> None:
    """Teacher and frozen reference: with adapters that is their adapter-off view."""
    teacher = module.arguments.get("teacher")
    if isinstance(teacher, Local):
        try:
            own = trained_spec(teacher.path)
            model = skeleton(replace(own, dtype=teacher.dtype or ("auto" if own.path == teacher.path else own.dtype)))
            found.held["teacher"] = weight_bytes(model, PolicyConfig(quantization=teacher.quantization))
            found.facts["teacher"] = f"{sum(p.numel() for p in model.parameters()):,} parameters"
        except StepkdError as error:
            found.facts["teacher"] = f"not counted, its settings cannot be read: {error}"
    if isinstance(teacher, SelfSnapshot | SelfAverage) or (isinstance(teacher, SelfBase) and spec.lora is None):
        copies = 2 if isinstance(teacher, SelfAverage) else 1  # the average and its copy
        found.held["self-teacher"] = copies * trained_bytes
    reference = getattr(module, "reference_spec", None)
    adapts = spec.lora is not None or adapter_folder(spec.path) is not None
    if reference is not None and not adapts and not reference.cache:  # a cache lets the copy go before the first step
        found.held["reference"] = found.held["weights"]


def _dtype(spec: PolicyConfig, config: Any) -> torch.dtype:
    stored = getattr(config, "dtype", None) if spec.dtype == "auto" else getattr(torch, spec.dtype)
    return stored if isinstance(stored, torch.dtype) else torch.float32


def measured_peak(words: Sequence[str], device: str) -> int:
    """Bytes that two optimiser steps of a recipe take at their peak; the second one holds the optimiser's state.

    They run in a process of their own, which the system may kill for its memory.

    Args:
        words: the recipe, as words of ``stepkd fit``.
        device: ``cpu`` or ``cuda``.

    Raises:
        MachineError: the memory ran out.
        StepkdError: what would stop the run itself.
    """
    return int(in_own_process(two_steps, list(words), device))


def in_own_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns or raises in another process; MachineError where that is killed."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(work, *arguments).result()
        except BrokenProcessPool as error:
            raise MachineError(f"the process was killed, as a system does that is out of memory: {ADVICE}") from error


def two_steps(words: list[str], device: str) -> int:
    """See :func:`measured_peak`; counts the whole process (``cpu``), or what torch's allocator held (``cuda``)."""
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
            callbacks=[LargestBatch()],
        )
        try:
            trainer.fit(module, data)
        except Exception as error:
            raise explained(error, module) or error from None
    return torch.cuda.max_memory_reserved() if device == "cuda" else memory_peak() or 0


class LargestBatch(Callback):
    """Leaves the data module one training batch: the one with most tokens in the first epoch."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Once the data are read."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        examples = data.examples["train"]
        batches = data.train_dataloader().plan.batches(0)
        largest = max(batches, key=lambda batch: sum(examples[i].size for i in batch))
        data.examples["train"] = [examples[i] for i in largest]
