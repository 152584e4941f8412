"""How much memory a recipe takes on each device, before anything is loaded.

Weights, gradients and optimiser state are counted on a model without storage. What a layer keeps for the backward pass
is not guessed from a formula: copies of the model of its real width and few layers are run forward and backward, the
bytes of all tensors alive are counted, and their peak is carried forward to all layers and tokens. Key-value caches
follow from shapes. Models that are cut up over ranks: :mod:`stepkd.doctor.cut_up`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import nn

from stepkd.data.batching import BatchPlan, micro_batches
from stepkd.doctor.cut_up import cut_up
from stepkd.doctor.live import peak_of
from stepkd.errors import StepkdError
from stepkd.losses import VocabHead, cross_entropy
from stepkd.models.adapter import adapter_folder, add_empty_adapter, add_lora, plain_model
from stepkd.models.checkpoint import trained_spec
from stepkd.models.head import backbone_of
from stepkd.models.load import checkpoint_layers, model_config, training_spec
from stepkd.models.source import as_trained
from stepkd.models.spec import FrozenSpec, PolicySpec
from stepkd.models.unpadded import check_unpadded, is_worth_it, unpadded_hidden
from stepkd.rollout.decode import room_columns

PROBED_LAYERS = (2, 3)  # the first layer keeps less where only adapters are trained
PROBED_TOKENS = (64, 128)
PROBED_VOCABULARY = 512
BATCHES = 50
"""Batches of the data that are looked at for the largest micro-batch."""
PROBED_CHUNK = 16
ALLOCATOR = {"cpu": 0.52, "cuda": 0.1}
"""What an allocator holds beyond tensors, as a share. ``cuda``: of all of them, assumed. ``cpu``: of those of a phase,
fitted to runs (glibc); activations count by how much of them is in tensors below HEAP, since larger ones have pages of
their own, which the system takes back at once."""
HEAP = 32 * 2**20
"""Bytes; glibc never keeps larger pieces in its heap."""
AROUND = {"cpu": 100 * 2**20, "cuda": 600 * 2**20}
"""Tokenised data, caches of libraries and, on a GPU, its context; measured on a CPU, assumed on a GPU."""
DRAW_COPIES = 3
"""Float64 arrays of a token's logits while it is drawn."""


@dataclass
class Footprint:
    """Bytes on one device."""

    held: dict[str, int] = field(default_factory=dict)
    """What is there all the time."""
    phases: dict[str, dict[str, int]] = field(default_factory=dict)
    """What a phase needs beside it; phases follow each other."""
    facts: dict[str, str] = field(default_factory=dict)
    """What the figures are made of, for people."""

    @property
    def peak(self) -> int:
        """The largest sum."""
        return sum(self.held.values()) + max((sum(parts.values()) for parts in self.phases.values()), default=0)


@dataclass(frozen=True)
class Batch:
    """The largest micro-batch of a recipe."""

    tokens: int
    """Real tokens in one forward pass."""
    padding: float
    """Share of padding in it, in [0, 1)."""
    targets: int
    """Positions whose logits are made."""
    prompt: int
    """Tokens of the longest prompt."""
    known: bool
    """Whether the data were read, or the recipe's limits taken."""


def footprint(module: Any, data: Any, *, precision: str = "32-true", device: str = "cpu", shards: int = 1) -> Footprint:
    """Estimate a recipe's memory.

    Args:
        module: a :class:`~stepkd.modules.StepModule` that has loaded nothing.
        data: its data module, not set up yet.
        precision: the Trainer's.
        device: ``cpu`` or ``cuda``.
        shards: ranks that the model is cut up over (FSDP2); 1: it is whole.

    Raises:
        StepkdError: a model whose settings cannot be read.
    """
    found = Footprint()
    spec = as_trained(training_spec(module.policy_spec))
    model = skeleton(spec)
    trained = [p for p in model.parameters() if p.requires_grad]
    trained_bytes = sum(p.numel() * p.element_size() for p in trained)
    found.held["weights"] = weight_bytes(model, spec)
    found.held["gradients"] = trained_bytes
    found.held["optimiser (AdamW)"] = 2 * trained_bytes
    found.facts["parameters"] = (
        f"{sum(p.numel() for p in model.parameters()):,}, trained {sum(p.numel() for p in trained):,}"
    )
    if module.ema_decay is not None:
        found.held["running average"] = trained_bytes
    teacher = _other_models(found, module, spec, trained_bytes)
    batch = largest_batch(module, data)
    found.facts["largest micro-batch"] = f"{batch.tokens:,} tokens" + ("" if batch.known else " (the recipe's limit)")
    vocabulary = int(model.get_output_embeddings().weight.shape[0])
    width = int(model.get_output_embeddings().weight.shape[1])
    heads = 2 if {"teacher", "self-teacher"} & found.held.keys() else 1
    chunk = head_peak(spec, width, vocabulary, min(module.chunk_size, batch.targets))
    kept = activations(spec, batch, precision)
    found.phases["training"] = {"activations": kept.peak, "chunk of logits": heads * chunk}
    _sampling(found, module, data, spec, batch, vocabulary)
    if shards > 1:
        cut_up(found, module, data, (model, teacher), "bf16-mixed" in precision, shards)
    for name, phase in found.phases.items():
        taken = sum(phase.values())
        if device == "cuda":
            taken += sum(found.held.values())
        elif name == "training":
            taken = int(taken * kept.small)
        phase["allocator"] = int(ALLOCATOR[device] * taken)
    found.held["around"] = AROUND[device]
    return found


def skeleton(spec: PolicySpec) -> Any:
    """A policy without storage: shapes, dtypes, and what is trained."""
    from transformers import AutoModelForCausalLM

    config = model_config(spec)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=spec.trust_remote_code)
        return _with_adapter(model.to(_dtype(spec, config)), spec)


def weight_bytes(model: nn.Module, spec: PolicySpec) -> int:
    """Bytes of the weights as they are kept."""
    packed = {"none": None, "int8": 1.0, "nf4": 0.53}[spec.quantization]  # 4 bits and the scales of their blocks
    total = 0.0
    for name, parameter in model.named_parameters():
        quantised = packed is not None and parameter.dim() == 2 and "lora_" not in name and "embed" not in name
        total += parameter.numel() * (packed if quantised and packed is not None else parameter.element_size())
    return int(total)


class Activations(NamedTuple):
    """What forward and backward pass of a micro-batch take at their peak, weights and gradients apart."""

    peak: int
    """Bytes."""
    small: float
    """Share of it in tensors below HEAP, in [0, 1]."""


def activations(spec: PolicySpec, batch: Batch, precision: str) -> Activations:
    """See :class:`Activations`; ``precision`` is the Trainer's."""
    config = copy.deepcopy(model_config(spec))
    text = config.get_text_config()
    layers = int(text.num_hidden_layers)
    text.vocab_size = PROBED_VOCABULARY
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(text, name, None)
    peaks = {}
    for depth in PROBED_LAYERS:
        text.num_hidden_layers = depth
        if getattr(text, "layer_types", None):
            text.layer_types = (text.layer_types * depth)[:depth]
        model = _probe_model(spec, config)
        for number in PROBED_TOKENS:
            peaks[depth, number], sizes = _pass_peak(model, number, batch.padding, precision)
    (low, high), (few, many) = PROBED_LAYERS, PROBED_TOKENS
    layer = {n: (peaks[high, n] - peaks[low, n]) / (high - low) for n in PROBED_TOKENS}
    by_token = (layer[many] - layer[few]) / (many - few)
    alone = layer[few] - by_token * few
    rest_by_token = (peaks[low, many] - peaks[low, few]) / (many - few) - low * by_token
    small = sum(size for size in sizes if size * batch.tokens / number < HEAP) / sum(sizes)
    return Activations(int(layers * (by_token * batch.tokens + alone) + rest_by_token * batch.tokens), small)


def _pass_peak(model: Any, tokens: int, padding: float, precision: str) -> tuple[int, list[int]]:
    """Peak of a pass over rows of this many real tokens and this share of padding, and bytes of the tensors in it."""
    causal_lm = plain_model(model)
    longest = max(int(tokens / 2 / (1 - padding)), tokens // 2)
    mask = torch.zeros(2, longest, dtype=torch.long)
    mask[0, : min(longest, tokens)] = 1
    mask[1, : max(tokens - longest, 0)] = 1
    ids = torch.arange(mask.numel()).view_as(mask) % PROBED_VOCABULARY
    unpadded = check_unpadded(causal_lm) and is_worth_it(mask)

    def work() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled="bf16-mixed" in precision):
            if unpadded:
                states = unpadded_hidden(causal_lm, ids, mask)
            else:
                states = backbone_of(causal_lm)(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        states.float().sum().backward()

    live = peak_of(work)
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.grad is not None)
    model.zero_grad(set_to_none=True)
    return live.peak - trained, live.sizes


def head_peak(spec: PolicySpec, width: int, vocabulary: int, chunk: int) -> int:
    """Bytes that a chunk's logits and their gradients take at their peak."""
    dtype = _dtype(spec, model_config(spec))
    head = nn.Linear(width, vocabulary, bias=False, device="cpu", dtype=dtype)
    trains = spec.lora is None
    head.weight.requires_grad_(trains)
    hidden = torch.zeros(PROBED_CHUNK, width, dtype=dtype, requires_grad=True)
    targets = torch.zeros(PROBED_CHUNK, dtype=torch.long)

    def work() -> None:
        sums = cross_entropy(VocabHead(head), hidden, targets, chunk_size=PROBED_CHUNK).sums
        sums["ce"].backward()

    peak = peak_of(work).peak - (head.weight.numel() * head.weight.element_size() if trains else 0)
    return peak * chunk // PROBED_CHUNK


def largest_batch(module: Any, data: Any) -> Batch:
    """The largest micro-batch that the data give, or that the recipe allows where they cannot be read."""
    limit, longest = int(module.micro_batch_tokens), int(getattr(data, "max_length", 1024))
    new = new_tokens(module)
    size = int(getattr(data, "global_batch_size", 32)) * group_size(module)
    try:
        examples = _read(module, data)
    except StepkdError:
        tokens = min(limit, size * longest)
        return Batch(tokens, 0.0, tokens, longest, known=False)
    lengths = [e.length if new is None else len(e.prompt_ids) + new for e in examples]
    plan = BatchPlan(lengths, size=int(data.global_batch_size), unit=data.batch_unit, seed=data.seed)
    most = (0, 0.0, 0)
    for batch in plan.batches(0)[:BATCHES]:
        rows = [i for i in batch for _ in range(group_size(module))]
        for group in micro_batches([lengths[i] for i in rows], limit):
            tokens = sum(lengths[rows[i]] for i in group)
            targets = sum(lengths[rows[i]] - len(examples[rows[i]].prompt_ids) for i in group)
            padded = len(group) * max(lengths[rows[i]] for i in group)
            most = max(most, (tokens, 1 - tokens / padded, targets))
    return Batch(*most, prompt=max(len(e.prompt_ids) for e in examples), known=True)


def new_tokens(module: Any) -> int | None:
    """Most tokens of a sampled completion; None for methods that learn from given ones."""
    for name in ("rollout", "source"):
        how = getattr(module, name, None)
        if how is not None and getattr(how, "student", 1.0) > 0:
            return int(how.max_new_tokens)
    return None


def group_size(module: Any) -> int:
    """Sampled completions of every prompt."""
    return int(getattr(getattr(module, "rollout", None), "group_size", 1))


def _sampling(found: Footprint, module: Any, data: Any, spec: PolicySpec, batch: Batch, vocabulary: int) -> None:
    asked = []
    new = new_tokens(module)
    if new is not None:
        how = getattr(module, "rollout", None) or module.source
        asked.append((int(how.max_rows), int(data.global_batch_size) * group_size(module), new))
    if module.validation_spec.samples:
        how = module.validation_spec
        asked.append((int(how.max_rows), 2**30, int(how.max_new_tokens)))
    for most, number, length in asked:
        rows = min(most, number)
        parts = {
            "key-value cache": rows * cache_bytes(spec, room_columns(batch.prompt, batch.prompt + length)),
            "drawing": rows * vocabulary * 8 * DRAW_COPIES,
        }
        if sum(parts.values()) > sum(found.phases.get("sampling", {}).values()):
            found.phases["sampling"] = parts
            found.facts["sampling"] = f"{rows} rows of {batch.prompt + length:,} tokens"


def cache_bytes(spec: PolicySpec, tokens: int) -> int:
    """Bytes of a row's keys and values."""
    config = model_config(spec).get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * size * tokens * _dtype(spec, config).itemsize)


def _other_models(found: Footprint, module: Any, spec: PolicySpec, trained_bytes: int) -> Any:
    """Teacher (without storage, it is returned) and frozen reference: with adapters that is their adapter-off view."""
    adapts = spec.lora is not None or adapter_folder(spec.path) is not None
    teacher = getattr(getattr(module, "teacher", None), "spec", None)
    model = None
    if teacher is not None and teacher.path is not None:
        try:
            own = trained_spec(teacher.path)
            model = skeleton(replace(own, dtype=teacher.dtype or ("auto" if own.path == teacher.path else own.dtype)))
        except StepkdError as error:
            found.held["teacher"] = 0
            found.facts["teacher"] = f"not counted, its settings cannot be read: {error}"
        else:
            found.held["teacher"] = weight_bytes(model, FrozenSpec(quantization=teacher.quantization))
            found.facts["teacher"] = f"{sum(p.numel() for p in model.parameters()):,} parameters"
    if teacher is not None and teacher.itself is not None and not (teacher.itself == "base" and spec.lora is not None):
        found.held["self-teacher"] = (2 if teacher.itself == "ema" else 1) * trained_bytes  # the average and its copy
    reference = getattr(module, "reference_spec", None)
    if reference is not None and not adapts and not reference.cache:  # a cache lets the copy go before the first step
        found.held["reference"] = found.held["weights"]
    return model


def _read(module: Any, data: Any) -> Sequence[Any]:
    data.trainer = SimpleNamespace(lightning_module=module, global_rank=0, world_size=1)
    data.overlap_ngram = 0
    data.setup("fit")
    examples: Sequence[Any] = data.examples["train"]
    return examples


def _probe_model(spec: PolicySpec, config: Any) -> Any:
    """A shallow copy with storage, of the same kind."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=spec.trust_remote_code)
        model = _with_adapter(model.to(_dtype(spec, config)), spec)
    if spec.gradient_checkpointing:
        checkpoint_layers(model)
    return model.train()


def _with_adapter(model: Any, spec: PolicySpec) -> Any:
    """With adapters where the policy has some; not quantised, which needs real weights."""
    folder = adapter_folder(spec.path)
    if folder is not None:
        return add_empty_adapter(model, folder)
    return model if spec.lora is None else add_lora(model, replace(spec, quantization="none"))


def _dtype(spec: PolicySpec, config: Any) -> torch.dtype:
    if spec.dtype != "auto":
        found: torch.dtype = getattr(torch, spec.dtype)
        return found
    stored = getattr(config, "dtype", None)
    return stored if isinstance(stored, torch.dtype) else torch.float32
