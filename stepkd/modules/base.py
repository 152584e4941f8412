"""StepModule: the optimiser step that every method shares.

A method says what to train on (:meth:`StepModule.prepare`) and what its loss is (:meth:`StepModule.loss_terms`); this
class runs micro-batches, normalises over the whole step and all ranks, clips, steps, logs, validates and checkpoints.
One loader batch is one optimiser step (or several, for on-policy methods that prepare more than one).
"""

from __future__ import annotations

import inspect
import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from lightning.pytorch.utilities.parsing import collect_init_args
from torch import Tensor, nn

from stepkd.data.batching import Position, StepBatch, micro_batches
from stepkd.data.benchmarks import next_evaluation
from stepkd.data.collate import MicroBatch, collate
from stepkd.data.encode import Example
from stepkd.data.labelled_data import PreferenceData
from stepkd.data.templates import PromptTemplate, template_name
from stepkd.errors import ConfigError, TrainingError
from stepkd.losses import DEFAULT_CHUNK, LossTerms, component_scales, reduce
from stepkd.models import Policy, PolicySpec, load_tokenizer
from stepkd.models.adapter import LOW_PRECISION
from stepkd.models.average import WeightAverage
from stepkd.models.checkpoint import base_fingerprint, load_policy
from stepkd.models.load import training_spec
from stepkd.models.sharding import shard
from stepkd.models.trained_template import trained_template
from stepkd.modules.checkpoint_state import pack, unpack
from stepkd.modules.distributed import all_reduce, check_micro_batches, clip_in_engine, gradient_sync
from stepkd.modules.evaluation_loops import EvaluationLoops
from stepkd.modules.finite import require_finite
from stepkd.modules.optim import OptimizerSpec, build_optimizer, build_schedule, put_back
from stepkd.modules.step_metrics import accumulate, step_values
from stepkd.modules.strategies import check_strategy
from stepkd.modules.throughput import Throughput
from stepkd.modules.validation import SampledAccuracy, ValidationSpec
from stepkd.randomness import stream_key
from stepkd.runs.phases import PhaseTracker
from stepkd.runs.preemption import STOP_REQUEST, Preempted

logger = logging.getLogger(__name__)

MOST_SKIPPED = 100
"""Batches in a row that may be skipped for want of items."""


@dataclass
class Prepared:
    """What one optimiser step trains on, on this rank."""

    micro_batches: list[MicroBatch]
    """Micro-batches, largest first."""
    denominators: dict[str, float]
    """Per loss component, this rank's count over all micro-batches; reduced over ranks before the first backward."""


class StepModule(EvaluationLoops):
    """Base of all methods.

    A method defines :meth:`count` and :meth:`loss_terms`. Every component must reach every trainable parameter, because
    DDP waits for all of them. ``count`` names the same components, and ``loss_terms`` the same metrics (with count 0
    where one does not apply), for every micro-batch, because ranks add them up name by name.

    Args:
        policy: the model to train.
        optimizer: optimiser and schedule.
        validation: how validation samples and scores; its loss is always measured.
        micro_batch_tokens: most tokens (padding included) in one forward pass: trades memory for speed, never changes
            the gradient.
        chunk_size: positions whose logits exist at the same time.
        loss_weights: factor per loss component; missing ones are 1.
        ema_decay: keep a running average of the trainable weights, validate and export with it; null for none.
        seed: keys dropout and sampling noise. Dropout is drawn per rank and micro-batch, so with ``lora.dropout`` the
            gradient does depend on the split; nothing else does.
    """

    steps_per_batch = 1
    """Optimiser steps that one loader batch serves (more than 1 for on-policy methods with inner steps)."""
    shown: tuple[str, ...] = ("train/loss",)
    """What the progress line shows of training, beside its speed."""
    skip_empty_steps = False
    """Whether a step in which no rank has a single item is skipped (it is an error otherwise)."""

    prepares_with_model = False
    """Whether :meth:`prepare` runs the policy before it gives its first step: where the policy is cut up over ranks
    (FSDP2) it is gathered until then."""
    scores_steps = False
    """Whether the method trains a step head; any other method refuses a reward model as its policy."""
    labels_give_accuracy = False
    """Whether validation gives ``val/accuracy`` without sampling anything."""
    resume_with: tuple[str, ...] = ()
    """Settings that decide what a run learns and may differ all the same from those of the run that is resumed."""

    checkpoint: str | None = None
    """The checkpoint that the command line starts from."""

    automatic_optimization = False
    strict_loading = False  # checkpoints hold trainable weights only; on_load_checkpoint checks their names itself

    def __init__(
        self,
        policy: PolicySpec,
        optimizer: OptimizerSpec | None = None,
        validation: ValidationSpec | None = None,
        micro_batch_tokens: int = 8192,
        chunk_size: int = DEFAULT_CHUNK,
        loss_weights: dict[str, float] | None = None,
        ema_decay: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if micro_batch_tokens < 1 or chunk_size < 1:
            raise ConfigError(f"micro_batch_tokens={micro_batch_tokens}, chunk_size={chunk_size}: both at least 1")
        self.policy_spec = policy
        self.optimizer_spec = optimizer or OptimizerSpec()
        self.validation_spec = validation or ValidationSpec()
        self.micro_batch_tokens = micro_batch_tokens
        self.chunk_size = chunk_size
        self.loss_weights = dict(loss_weights or {})
        self.ema_decay = ema_decay
        self.seed = seed
        self.arguments: dict[str, Any] = {}
        for given in collect_init_args(cast(Any, inspect.currentframe()), [], classes=(StepModule,)):
            self.arguments |= given
        self.phases = PhaseTracker()
        self.position = Position()
        self.policy: Policy | None = None
        self.base_identity = ""  # of what an adapter stands on
        self.ema: WeightAverage | None = None
        self._tokenizer: Any = None
        self._restored_ema: dict[str, Tensor] | None = None
        self._throughput: Throughput | None = None
        self._accuracy: SampledAccuracy | None = None
        self._sums: dict[str, float] = defaultdict(float)
        self._skipped = 0
        self._own_settings: list[dict[str, Any]] = []  # the optimiser's settings, before a checkpoint replaces them
        self.loss_scales: dict[str, float] = {}  # of the optimiser step that is being taken

    # ---- what a method defines -------------------------------------------------------------------------------------

    def reads(self, split: str) -> dict[tuple[str, ...], str]:
        """Columns beside the prompt of which a split's rows must have one, each with the reason."""
        if split == "train":
            return {("solution",): f"{type(self).__name__} trains on solutions"}
        samples = self.validation_spec.samples
        reason = f"{split} samples and grades answers (model.init_args.validation.samples: {samples})"
        return {("answer",): reason} if samples or split == "predict" else {}

    def prepare(self, batch: StepBatch) -> Iterable[Prepared]:
        """Turn a loader batch into one or more optimiser steps.

        Offline methods use this default: the batch's examples, cut into micro-batches. On-policy methods roll out,
        score and grade here, without gradients.
        """
        yield self.prepare_examples(batch.examples)

    def make_filler(self, batch: StepBatch) -> MicroBatch:
        """What a rank computes, with weight zero, when others have more micro-batches than it."""
        return self._collate([batch.filler], is_filler=True)

    def count(self, micro_batch: MicroBatch) -> dict[str, float]:
        """How many items each loss component sums over in this micro-batch: its part of the denominators."""
        raise NotImplementedError(f"{type(self).__name__} must define count()")

    def name_components(self, batch: StepBatch) -> None:
        """Where the method does not name its components, take those that :meth:`count` names for any micro-batch."""
        if not self.components:
            self.components = tuple(self.count(self.make_filler(batch)))
            self._check_weights()

    def loss_terms(self, micro_batch: MicroBatch) -> LossTerms:
        """Named sums and metrics of one micro-batch."""
        raise NotImplementedError(f"{type(self).__name__} must define loss_terms()")

    def derived_metrics(self, values: dict[str, float]) -> dict[str, float]:
        """Further values to log, from the means of ``loss_terms``' metrics (differences of means, for example)."""
        return {}

    def after_step(self) -> None:
        """Called after every optimiser step, before anything is logged."""

    def method_state(self) -> dict[str, Any]:
        """State of the method that a checkpoint must hold (running averages, ...): plain values and tensors."""
        return {}

    def restore_method_state(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`method_state` gave, to go on training."""

    def adopt_method_state(self, state: dict[str, Any]) -> None:
        """Take from it what validation, test and prediction need; nothing has to fit the run that wrote it."""

    def next_commands(self, run: str) -> list[str]:
        """What to do with a finished run, one line each, for the end of ``stepkd fit``."""
        return [
            f"evaluate: stepkd evaluate --model {run} {self._evaluation()} --out ...",
            f"export:   stepkd export {run} --to ...",
        ]

    def _evaluation(self, *, steps: bool = False) -> str:
        """What fits the data that the run was trained on."""
        data = self.datamodule
        spec = getattr(data, "specs", {}).get("validation")
        template = getattr(data, "template", None)
        name = template_name(template) if isinstance(template, PromptTemplate) else ""
        return next_evaluation(None if isinstance(data, PreferenceData) else spec, name, steps=steps)

    # ---- model -----------------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Any:
        """The policy's tokenizer; available before the weights are loaded."""
        if self.policy is not None:
            return self.policy.tokenizer
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.policy_spec)
        return self._tokenizer

    @property
    def model(self) -> Policy:
        """The loaded policy."""
        if self.policy is None:
            raise RuntimeError("the policy is loaded by configure_model(): call it first when using a module by hand")
        return self.policy

    @property
    def datamodule(self) -> Any:
        """The run's data module; None without one."""
        return getattr(self._trainer, "datamodule", None)

    def trained_template(self) -> PromptTemplate | None:
        """The prompt template that the checkpoint, or else the policy, was trained with; None: nothing says it."""
        found = None if self.checkpoint is None else trained_template(self.checkpoint)
        return found or trained_template(self.policy_spec.path, self.policy_spec.revision)

    def setup(self, stage: str) -> None:
        """Refuse a strategy that would train incorrectly; tell an engine that holds the gradients where to clip."""
        check_strategy(self.trainer.strategy)
        clip_in_engine(self.trainer.strategy, self.optimizer_spec.max_grad_norm)

    def configure_model(self) -> None:
        """Load the policy (once)."""
        if self.policy is None:
            spec = self.policy_spec
            self.policy_spec = training_spec(spec)
            if spec != self.policy_spec:
                logger.info("policy.dtype auto: all weights are trained, so they are loaded in float32")
            self.policy = load_policy(self.policy_spec)
            self.base_identity = base_fingerprint(self.policy)
            if self.policy.step_head is not None and not self.scores_steps:
                raise ConfigError(
                    f"policy.path={self.policy_spec.path} is a reward model (it has a step head), and "
                    f"{type(self).__name__} trains a policy: start from the language model it was made of"
                )

    def shard(self, mesh: Any) -> None:
        """Cut the model up over a mesh of ranks (FSDP2); called by the strategy once the module is complete."""
        mixed = str(self.trainer.precision) == "bf16-mixed"
        shard(self.model, mesh, param_dtype=torch.bfloat16 if mixed else None)

    def gathered(self) -> AbstractContextManager[Any]:
        """A block without gradients in which ranks may use the model differently often, however it is cut up."""
        return self.model.gathered()

    def configure_optimizers(self) -> Any:
        """AdamW and a schedule over the planned number of optimiser steps."""
        optimizer = build_optimizer(self.optimizer_spec, self.model.trainable_parameters())
        schedule = build_schedule(self.optimizer_spec, optimizer, self.planned_steps())
        self._own_settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        return [optimizer], [schedule]

    def planned_steps(self) -> int | None:
        """Optimiser steps of the whole run; None where it has no end."""
        total = self.trainer.estimated_stepping_batches
        planned = int(total) if total not in (-1, float("inf")) else None
        if planned is not None and planned != self.trainer.max_steps:
            planned *= self.steps_per_batch  # Lightning counts batches
        return planned

    def needed_hidden(self, micro_batch: MicroBatch) -> Tensor:
        """Hidden states (N, H) that predict the micro-batch's targets."""
        hidden_BTH = self.model.hidden(micro_batch.input_ids_BT, micro_batch.attention_mask_BT)
        return hidden_BTH.flatten(0, 1)[micro_batch.needed_N]

    # ---- training --------------------------------------------------------------------------------------------------

    def prepare_examples(self, examples: Iterable[Example]) -> Prepared:
        """Cut examples into micro-batches and count their denominators."""
        kept = list(examples)
        groups = micro_batches([example.length for example in kept], self.micro_batch_tokens)
        return self.counted([self._collate([kept[i] for i in group]) for group in groups])

    def counted(self, batches: Sequence[MicroBatch]) -> Prepared:
        """Micro-batches with their denominators."""
        counts: dict[str, float] = defaultdict(float)
        for micro_batch in batches:
            for name, value in self.count(micro_batch).items():
                counts[name] += value
        return Prepared(list(batches), dict(counts))

    def on_fit_start(self) -> None:
        """Refuse what manual optimisation cannot honour."""
        precision, dtypes = str(self.trainer.precision), {p.dtype for p in self.model.parameters()}
        if ("16" in precision and "bf16" not in precision) or torch.float16 in dtypes:
            raise ConfigError(
                f"float16 training (trainer.precision {precision}, policy.dtype {self.policy_spec.dtype}) needs loss "
                "scaling, which is not supported: use trainer.precision bf16-mixed, or policy.dtype bfloat16 with LoRA"
            )
        trained = self.model.trainable_parameters()
        if low := [name for name, parameter in trained if parameter.dtype in LOW_PRECISION]:
            raise ConfigError(
                f"{len(low)} of {len(trained)} trained weights are bfloat16 ({low[0]}), which rounds most updates "
                "away: set policy.dtype float32 with trainer.precision bf16-mixed, or train LoRA adapters "
                "(policy.lora), which stay float32"
            )
        self._check_weights()
        self.check_data_fits("model", self.model.max_length)
        text = self.model.causal_lm.config.get_text_config()
        if auxiliary := {name: value for name, value in vars(text).items() if "aux_loss" in name and value}:
            logger.warning(
                "%s is a mixture of experts: its auxiliary loss, which balances the experts (%s), is not part of this "
                "method's loss. Watch validation, or train LoRA adapters without the router",
                type(self.model.causal_lm).__name__,
                ", ".join(f"{name} {value}" for name, value in auxiliary.items()),
            )
        self._throughput = Throughput(
            self.model, self.device, torch.bfloat16 if "bf16" in precision else self.model.causal_lm.dtype
        )

    def check_data_fits(self, name: str, context: int | None) -> None:
        """Refuse data that is longer than a model's context (None: unlimited)."""
        longest = getattr(self.datamodule, "max_length", None)
        if longest is not None and context is not None and longest > context:
            raise ConfigError(
                f"data.max_length={longest} exceeds the {name}'s context of {context} tokens: lower it, or take a "
                f"{name} of a longer context"
            )

    def _check_weights(self) -> None:
        if self.components and (unknown := sorted(set(self.loss_weights) - set(self.components))):
            raise ConfigError(f"loss_weights names {unknown}, the loss has the components {list(self.components)}")

    def on_train_start(self) -> None:
        """Start or restore the weight average (the checkpoint is loaded by now); settings win over the checkpoint."""
        self.ensure_average()
        if self._own_settings:
            put_back(self._own_settings, cast(Any, self.optimizers()), cast(Any, self.lr_schedulers()))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Log by the number of batches done, which Lightning miscounts after some ends of the run before."""
        loop = self.trainer.fit_loop.epoch_loop
        loop._batches_that_stepped = loop.batch_progress.total.ready - 1

    def ensure_average(self) -> None:
        """Make the running average when this run keeps one, or, outside training, when the checkpoint holds one."""
        training = self.trainer.state.fn == "fit"
        if self.ema is not None or (self.ema_decay is None and (training or self._restored_ema is None)):
            return
        decay = 0.5 if self.ema_decay is None else self.ema_decay  # without a decay it is only read, never updated
        self.ema = WeightAverage(self.model.trainable_parameters(), decay)
        if self._restored_ema is not None:
            self.ema.load_state_dict(self._restored_ema)

    def training_step(self, batch: StepBatch, batch_idx: int) -> None:
        """Run the optimiser steps of one loader batch."""
        self.name_components(batch)
        self.model.train()
        steps = 0
        for prepared in self._prepared(batch):
            self._optimizer_step(prepared, self.make_filler(batch), begins=not steps)
            steps += 1
        if not steps:
            raise TrainingError("the batch gave no optimiser step: prepare() must yield at least one")
        self.position = batch.next_position

    def _prepared(self, batch: StepBatch) -> Iterator[Prepared]:
        """What :meth:`prepare` gives, with the whole model in place until its first step, if it asks for that."""
        found = iter(self.prepare(batch))
        with self.gathered() if self.prepares_with_model else nullcontext():
            first = next(found, None)
        if first is not None:
            yield first
            yield from found

    def _optimizer_step(self, prepared: Prepared, filler: MicroBatch, *, begins: bool) -> None:
        # Dropout is the only other draw from the global generator; keyed like this, a resumed run repeats it exactly.
        torch.manual_seed(stream_key(self.seed, "dropout", self.global_step, self.global_rank) % 2**63)
        mine = {name: prepared.denominators.get(name, 0.0) for name in self.components}
        counts = all_reduce({**mine, "": float(bool(STOP_REQUEST))}, self.device)
        if counts.pop("") and begins:  # later steps of a batch are taken: a batch is done whole or not at all
            raise Preempted(f"asked to stop by {STOP_REQUEST.name or 'a signal to another rank'}")
        if not any(counts.values()):
            if self.skip_empty_steps:
                self._skip()
                return
            raise TrainingError(
                f"step {self.global_step}: no row of the batch has a single target ({', '.join(counts)} all 0); look "
                "at max_length and at the rows' solutions"
            )
        self._skipped = 0
        self.loss_scales = component_scales(self.components, counts, self.loss_weights, self.trainer.world_size)
        longest = int(all_reduce({"n": float(len(prepared.micro_batches))}, self.device, op="max")["n"])
        check_micro_batches(self.trainer.strategy, longest)
        padded = prepared.micro_batches + [filler] * (longest - len(prepared.micro_batches))
        optimizer = cast(torch.optim.Optimizer, self.optimizers())
        sums: dict[str, Tensor] = {}
        losses: list[Tensor] = []
        with self.phases.phase("micro-batch", total=longest):
            for i, micro_batch in enumerate(padded):
                with gradient_sync(self.trainer.strategy.model, enabled=i + 1 == longest):
                    loss, terms = self.model(self._micro_loss, micro_batch.to(self.device), counts)
                    self.manual_backward(loss)
                losses.append(loss.detach())
                if not micro_batch.is_filler:
                    accumulate(sums, terms)
                self.phases.advance()
        norm = self._clip()
        require_finite(self, losses, norm, padded)
        lr = float(optimizer.param_groups[0]["lr"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        cast(Any, self.lr_schedulers()).step()
        if self.ema is not None:
            self.ema.update(self.model.trainable_parameters())
        self.after_step()
        tokens = sum(example.length for micro in prepared.micro_batches for example in micro.examples)
        self._log_step(counts, sums, terms, {"grad_norm": norm, "lr": lr, "tokens": float(tokens)})

    def _skip(self) -> None:
        """Count steps without an item; a run that has nothing else would never end."""
        self._skipped += 1
        if self._skipped >= MOST_SKIPPED:
            raise TrainingError(
                f"step {self.global_step}: {self._skipped} batches in a row had nothing to learn from ("
                f"{', '.join(self.components)} all 0); look at what the method counts, and at the data"
            )

    def _micro_loss(self, micro_batch: MicroBatch, counts: Mapping[str, float]) -> tuple[Tensor, LossTerms]:
        """Within one forward pass of the policy, which gathers what a strategy has cut up."""
        terms = self.loss_terms(micro_batch)
        if terms.loss is not None:
            return terms.loss * (0.0 if micro_batch.is_filler else 1.0), terms
        sums = {name: value * 0.0 for name, value in terms.sums.items()} if micro_batch.is_filler else terms.sums
        return reduce(sums, counts, weights=self.loss_weights, world_size=self.trainer.world_size), terms

    def _clip(self) -> float:
        parameters = [p for _, p in self.model.trainable_parameters()]
        limit = self.optimizer_spec.max_grad_norm or float("inf")
        norm = nn.utils.clip_grad_norm_(parameters, limit)
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)  # a DTensor under FSDP2

    def _log_step(
        self, counts: dict[str, float], sums: dict[str, Tensor], last: LossTerms, facts: dict[str, float]
    ) -> None:
        values, tokens = step_values(counts, sums, last, self.loss_weights, facts["tokens"], self.device)
        means = {name: value for name, value in values.items() if name in last.metrics}
        values = {f"train/{name}": value for name, value in (values | self.derived_metrics(means)).items()}
        values["train/grad_norm"] = facts["grad_norm"]
        values["train/lr"] = facts["lr"]
        values["train/tokens"] = tokens
        if self._throughput is not None:
            values.update(self._throughput.measure(tokens, self.trainer.world_size))
        for name in (*self.shown, "perf/tokens_per_second"):
            if name in values:
                self.log(name, values.pop(name), prog_bar=True, batch_size=1)
        self.log_dict(values, batch_size=1)

    # ---- plumbing --------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep trainable weights only, and everything that cannot be recomputed."""
        pack(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint fits this module, and restore what is not weights."""
        self.position, self._restored_ema = unpack(self, checkpoint)

    def _collate(self, examples: list[Example], *, is_filler: bool = False) -> MicroBatch:
        return collate(examples, int(self.tokenizer.pad_token_id or 0), is_filler=is_filler)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Batches are lists of examples; micro-batches move to the device one at a time."""
        return batch

    def teardown(self, stage: str) -> None:
        """Release worker processes."""
        if self._accuracy is not None:
            self._accuracy.close()
            self._accuracy = None
