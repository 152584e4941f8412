"""StepModule: the optimiser step that every method shares.

A method says what to train on (:meth:`StepModule.prepare`) and has a list of losses (:attr:`StepModule.components`);
this class runs micro-batches, normalises over the whole step and all ranks, clips, steps, logs and validates. One
loader batch is one optimiser step (or several, for on-policy methods that prepare more than one).
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from stepkd.data.batching import StepBatch
from stepkd.data.collate import Batch, collate, plan
from stepkd.data.completion import Completion
from stepkd.data.config import Rows, next_evaluation
from stepkd.data.templates import template_name
from stepkd.errors import ConfigError, TrainingError
from stepkd.losses import LossTerms, component_scales
from stepkd.models.adapter import LOW_PRECISION
from stepkd.modules.components import Component, ForwardPass, terms_of
from stepkd.modules.distributed import all_reduce, check_micro_batches, gradient_sync, union
from stepkd.modules.in_memory import loss_of_rows
from stepkd.modules.optim import build_optimizer, build_schedule, put_back
from stepkd.modules.policy_module import PolicyModule
from stepkd.modules.step_metrics import Throughput, accumulate, means, require_counts, require_finite
from stepkd.modules.validation import SampledAccuracy
from stepkd.randomness import stream_key
from stepkd.runs.process import STOP_REQUEST
from stepkd.safe import refuse_credentials

logger = logging.getLogger(__name__)

MOST_SKIPPED = 100
"""Batches in a row that may be skipped for want of items."""


class StepModule(PolicyModule):
    """Base of all methods.

    A method has :attr:`components`, set where it is made; it may define :meth:`prepare`, and what else stands below.

    Arguments are those of :class:`~stepkd.modules.policy_module.PolicyModule`.
    """

    components: Sequence[Component] = ()
    """The losses, added up after each was divided by its count and weighed by ``loss_weights``; the same on every
    rank."""
    steps_per_batch = 1
    """Optimiser steps that one loader batch serves (more than 1 for on-policy methods with inner steps)."""
    shares = False
    """Whether completions of one prompt that meet in a micro-batch read it once, where the model allows it."""
    shown: tuple[str, ...] = ("train/loss",)
    """What the progress line shows of training, beside its speed."""
    skip_empty_steps = False
    """Whether a step in which no rank has a single item is skipped (it is an error otherwise)."""
    prepares_with_model = False
    """Whether :meth:`prepare` runs the policy before it gives its first step: where the policy is sharded (FSDP2) it is
    gathered until then."""
    validates_on_problems = True
    """Whether ``stepkd evaluate`` can read the rows that it is validated on."""
    labels_give_accuracy = False
    """Whether validation gives ``val/accuracy`` without sampling anything."""

    automatic_optimization = False
    loss_scales: Mapping[str, float] = {}
    """Factor of each component's sum in the optimiser step that is being taken."""
    _throughput: Throughput | None = None
    _skipped = 0
    _own_settings: Sequence[dict[str, Any]] = ()  # the optimiser's settings, before a checkpoint replaces them
    _sums: dict[str, float]  # of the evaluation that runs

    # ---- what a method defines -------------------------------------------------------------------------------------

    def reads(self, split: str) -> dict[tuple[str, ...], str]:
        """Columns beside the prompt of which a split's rows must have one.

        Args:
            split: ``train``, ``validation``, ``test`` or ``predict``.

        Returns:
            Groups of columns, one of each group being enough, with the reason that an error gives.
        """
        if split == "train":
            return {("solution",): f"{type(self).__name__} trains on solutions"}
        reason = f"{split} samples and grades answers (model.init_args.validation.sampling is not null)"
        return {("answer",): reason} if self.validation_spec.sampling is not None or split == "predict" else {}

    def prepare(self, batch: StepBatch) -> Iterable[list[Batch]]:
        """Turn a loader batch into one or more optimiser steps, each the micro-batches that this rank trains on.

        Offline methods use this default: the batch's examples, cut into micro-batches. On-policy methods roll out,
        score and grade here, without gradients.

        Args:
            batch: this rank's share of the global batch; its ``peers`` are the whole of it.

        Returns:
            Micro-batches of each optimiser step, at least one step and as many on every rank; ranks may differ in the
            number of micro-batches, and one without any computes dummies.
        """
        yield self.prepare_examples(batch.examples)

    def make_dummy(self, batch: StepBatch) -> Batch:
        """What a rank computes, with weight zero, when others have more micro-batches than it.

        Args:
            batch: the loader batch; its ``dummy`` is the example to compute.

        Returns:
            A micro-batch with ``is_dummy``, for which the components give the same names as for any other.
        """
        return self._collate([batch.dummy], is_dummy=True)

    def measured(self, batch: StepBatch) -> dict[str, tuple[float, float]]:
        """Further metrics of an evaluation; ranks may do different work in it.

        Args:
            batch: a validation batch of this rank, with at least one example.

        Returns:
            For each metric a sum and what it is a mean of; both are added over batches and ranks before they are
            divided.
        """
        return {}

    def derived_metrics(self, values: dict[str, float]) -> dict[str, float]:
        """What is logged of the means of the components' metrics: themselves, and differences of them, for example.

        Args:
            values: mean of each metric over the optimiser step or the evaluation, and over all ranks.

        Returns:
            What is logged in their place, under the same prefix.
        """
        return values

    def begin(self) -> None:
        """Called once the model and the training data are loaded: count and load what the first step needs."""

    def after_step(self, metrics: dict[str, float]) -> None:
        """Called after every optimiser step, before anything is logged.

        Args:
            metrics: mean of each metric of the components over the step, and over all ranks.
        """

    def next_commands(self, run: str) -> list[str]:
        """What to do with a finished run, one line each, for the end of ``stepkd fit``."""
        return [
            f"evaluate: stepkd evaluate --model {run} {self._evaluation()} --out ...",
            f"report:   stepkd report {run}",
            f"export:   stepkd export {run} --to ...",
        ]

    def _evaluation(self, *, steps: bool = False) -> str:
        """What fits the data that the run was trained on."""
        spec = getattr(self.datamodule, "specs", {}).get("validation")
        name = "" if self.template is None else template_name(self.template)
        return next_evaluation(spec if self.validates_on_problems else None, name, steps=steps)

    # ---- losses ----------------------------------------------------------------------------------------------------

    @property
    def loss_names(self) -> tuple[str, ...]:
        """Names of all sums of the components, in order."""
        return tuple(name for component in self.components for name in component.names)

    def count(self, micro_batch: Batch) -> dict[str, float]:
        """What the components count in a micro-batch: its part of the denominators."""
        return {name: n for component in self.components for name, n in component.count(micro_batch).items()}

    def count_all(self, micro_batches: Iterable[Batch]) -> dict[str, float]:
        """:meth:`count` of micro-batches together: this rank's part of an optimiser step's denominators."""
        total = dict.fromkeys(self.loss_names, 0.0)
        for micro_batch in micro_batches:
            for name, count in self.count(micro_batch).items():
                total[name] += count
        return total

    def loss_terms(self, micro_batch: Batch) -> LossTerms:
        """Named sums and metrics of all components, from one forward pass of the policy.

        Args:
            micro_batch: on the policy's device, with what :meth:`prepare` adds (reference or sampled
                log-probabilities).

        Returns:
            Sums that nothing has divided yet; ``loss_scales`` are their factors in the optimiser step being taken.
        """
        return terms_of(self.components, self.forward_pass(micro_batch))

    def forward_pass(self, micro_batch: Batch) -> ForwardPass:
        """What the components share of a micro-batch; nothing is computed yet."""
        return ForwardPass(self.model, micro_batch, self.chunk_size, self.loss_scales if self.training else {})

    def loss(self, rows: Rows, *, step: int | None = None, **data: Any) -> Tensor:
        """Loss of rows with its graph, to look at, to differentiate, or for a loop of one's own: what an optimiser step
        makes of them.

        Encoder, checks, :meth:`prepare` (which samples, scores and grades where a method does), components and the one
        normalisation are those of training, over all rows as one optimiser step of this process. No step is taken, no
        running average moves, and nothing is logged. Afterwards the model is loaded, and in training mode.

        A loop of one's own counts ``step`` up. A teacher that is the student itself is told behind each optimiser step
        (``module.teacher.after_step(step + 1)``) and knows of no passes over data. The rows of a call are all of its
        data: class weights by the ratio rule are theirs. But what ``MCMI`` and sub-classes of ``StepDistillation`` are
        fitted to is that of the first call's rows for good: give it all of them, and a Trainer another module.

        Args:
            rows: a list of rows, a ``datasets.Dataset``, a path or settings, as ``StepData(train=...)`` takes them.
            step: optimiser steps taken before, >= 0: they key dropout, sampling noise and GKD's source, and move
                schedules. None: those of the module's Trainer, 0 without one.
            **data: further settings of :class:`~stepkd.data.datamodule.StepData`: ``template``, ``segmenter``,
                ``max_length``, ``labels``, ``allow_one_class``.

        Returns:
            () the weighted sum of the components, each divided by its count; of a method with several optimiser steps
            for a batch the first one's. float32 or float64.

        Raises:
            DataError, ConfigError, ModelError: rows, settings or a model that training refuses, too; a schedule over
                the whole run, where no Trainer with ``max_steps`` says how long that is.
            TrainingError: no row has a single target, or a Trainer trains the module just now: counts and logs of the
                run would take in these rows.
        """
        return loss_of_rows(self, rows, step=step, **data)

    # ---- training --------------------------------------------------------------------------------------------------

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

    def prepare_examples(self, examples: Iterable[Completion]) -> list[Batch]:
        """Cut examples into micro-batches of at most ``micro_batch_tokens`` tokens, padding included, largest first.

        Args:
            examples: those of this rank, in any order; a pair is not split. None give no micro-batch.

        Returns:
            Padded micro-batches on the CPU.
        """
        groups = plan(list(examples), self.micro_batch_tokens, share=self.shares_prompts)
        return [self._collate(group) for group in groups]

    def check_run(self) -> None:
        """Refuse what manual optimisation cannot honour, and settings that do not fit the data or each other.

        Raises:
            ConfigError: the value, and what to set.
        """
        refuse_credentials(self._settings())
        precision, dtypes = str(self.trainer.precision), {p.dtype for p in self.model.parameters()}
        if ("16" in precision and "bf16" not in precision) or torch.float16 in dtypes:
            raise ConfigError(
                f"float16 training (trainer.precision {precision}, policy.dtype {self.policy_spec.dtype}) needs loss "
                "scaling, which is not supported: use trainer.precision bf16-mixed, or policy.dtype bfloat16 with LoRA"
            )
        trained = self.model.trainable_parameters()
        low = [name for name, parameter in trained if parameter.dtype in LOW_PRECISION]
        if low and not self.policy_spec.allow_low_precision:
            raise ConfigError(
                f"{len(low)} of {len(trained)} trained weights are bfloat16 ({low[0]}), which rounds most updates "
                "away: set policy.dtype float32 with trainer.precision bf16-mixed, or train LoRA adapters "
                "(policy.lora), which stay float32 (policy.allow_low_precision trains them all the same)"
            )
        names = self.loss_names
        if unknown := sorted(set(self.loss_weights) - set(names)):
            raise ConfigError(f"loss_weights names {unknown}, the loss has the components {list(names)}")
        if len(set(names)) < len(names):
            raise ConfigError(f"the loss has the components {list(names)}: each name once")
        self.check_data_fits("model", self.model.max_length)

    def on_fit_start(self) -> None:
        """Check the run before its first step, and warn of what it leaves out."""
        self.check_run()
        precision = str(self.trainer.precision)
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
        self.begin()

    def on_train_start(self) -> None:
        """Let the settings of this start win over those of the checkpoint, which is loaded by now."""
        if self._own_settings:
            put_back(self._own_settings, cast(Any, self.optimizers()), cast(Any, self.lr_schedulers()))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Log by the number of batches done, which Lightning miscounts after some ends of the run before."""
        loop = self.trainer.fit_loop.epoch_loop
        loop._batches_that_stepped = loop.batch_progress.total.ready - 1

    def training_step(self, batch: StepBatch, batch_idx: int) -> None:
        """Run the optimiser steps of one loader batch."""
        self.model.train()
        steps = 0
        for micro_batches in self._prepared(batch):
            self._optimizer_step(micro_batches, self.make_dummy(batch), begins=not steps)
            steps += 1
        if not steps:
            raise TrainingError("the batch gave no optimiser step: prepare() must yield at least one")
        self.position = batch.next_position

    def _prepared(self, batch: StepBatch) -> Iterator[list[Batch]]:
        """What :meth:`prepare` gives, with the whole model in place until its first step, if it asks for that."""
        found, first = iter(self.prepare(batch)), cast(list[Batch] | None, [])
        with STOP_REQUEST.excuses(), self.gathered() if self.prepares_with_model else nullcontext():
            first = next(found, None)
        if first is not None:
            yield first
            yield from found

    def _optimizer_step(self, micro_batches: list[Batch], dummy: Batch, *, begins: bool) -> None:
        # Dropout is the only other draw from the global generator; keyed like this, a resumed run repeats it exactly.
        torch.manual_seed(stream_key(self.seed, "dropout", self.global_step, self.global_rank) % 2**63)
        counts = all_reduce({**self.count_all(micro_batches), "": float(bool(STOP_REQUEST))}, self.device)
        if counts.pop("") and begins:  # later steps of a batch are taken: a batch is done whole or not at all
            raise STOP_REQUEST.preempted()
        self._skipped = 0 if any(counts.values()) else self._skipped + 1
        if self._skipped:
            if self.skip_empty_steps and self._skipped < MOST_SKIPPED:  # a run that has nothing else would never end
                return
            require_counts(counts, step=self.global_step, batches=self._skipped)
        self.loss_scales = component_scales(self.loss_names, counts, self.loss_weights, self.trainer.world_size)
        longest = int(all_reduce({"n": float(len(micro_batches))}, self.device, op="max")["n"])
        check_micro_batches(self.trainer.strategy, longest)
        padded = micro_batches + [dummy] * (longest - len(micro_batches))
        optimizer = cast(torch.optim.Optimizer, self.optimizers())
        sums: dict[str, Tensor] = {}
        losses: list[Tensor] = []
        with self.phases.phase("micro-batch", total=longest):
            for i, micro_batch in enumerate(padded):
                with gradient_sync(self.trainer.strategy.model, enabled=i + 1 == longest):
                    loss, terms = self.model(self._micro_loss, micro_batch.to(self.device))
                    self.manual_backward(loss)
                losses.append(loss.detach())
                if not micro_batch.is_dummy:
                    accumulate(sums, terms)
                self.phases.advance()
        norm = self._clip()
        require_finite(losses, norm, padded, step=self.global_step, device=self.device, begins=begins)
        lr = float(optimizer.param_groups[0]["lr"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        cast(Any, self.lr_schedulers()).step()
        tokens = sum(example.size for micro in micro_batches for example in micro.examples)
        self._log_step(counts, sums, terms, {"grad_norm": norm, "lr": lr, "tokens": float(tokens)})

    def _micro_loss(self, micro_batch: Batch) -> tuple[Tensor, LossTerms]:
        """Within one forward pass of the policy, which gathers what a strategy has sharded."""
        terms = self.loss_terms(micro_batch)
        return terms.scaled(self.loss_scales) * (0.0 if micro_batch.is_dummy else 1.0), terms

    def _clip(self) -> float:
        parameters = [p for _, p in self.model.trainable_parameters()]
        limit = self.optimizer_spec.max_grad_norm or float("inf")
        norm = nn.utils.clip_grad_norm_(parameters, limit)
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)  # a DTensor under FSDP2

    def _log_step(
        self, counts: dict[str, float], sums: dict[str, Tensor], last: LossTerms, facts: dict[str, float]
    ) -> None:
        # Named by the last terms: every rank sends the same names, also one that had only dummies.
        names = [f"sum/{name}" for name in last.sums]
        names += [f"{part}/{name}" for name in last.metrics for part in ("metric", "number")]
        totals = all_reduce({"tokens": facts["tokens"], **{name: sums.get(name, 0.0) for name in names}}, self.device)
        totals |= {f"count/{name}": count for name, count in counts.items()}
        losses, metrics = means(totals, self.loss_names, self.loss_weights)
        facts["tokens"] = totals["tokens"]
        self.after_step(metrics)
        found = dict.fromkeys(self.loss_names, 0.0) | losses | self.derived_metrics(metrics) | facts
        values = {f"train/{name}": value for name, value in found.items()}
        if self._throughput is not None:
            values.update(self._throughput.measure(facts["tokens"], self.trainer.world_size))
        for name in (*self.shown, "perf/tokens_per_second"):
            if name in values:
                self.log(name, values.pop(name), prog_bar=True, batch_size=1)
        self.log_dict(values, batch_size=1)

    # ---- validation, test, prediction ------------------------------------------------------------------------------

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Evaluation mode; ranks may do different work in it."""
        self.model.eval()
        with STOP_REQUEST.excuses(), self.gathered():
            yield

    def prepare_evaluation(self, batch: StepBatch) -> list[Batch]:
        """What validation measures the loss on; every rank calls it for every batch.

        Args:
            batch: a validation batch; this rank's share of it may be empty.

        Returns:
            Micro-batches of the examples that have a completion; problems alone have no loss.
        """
        return self.prepare_examples([example for example in batch.examples if len(example.token_ids)])

    def on_validation_epoch_start(self) -> None:
        """Fresh sums; all ranks give the weights to an engine that samples elsewhere, whatever their share."""
        self._sums = defaultdict(float)
        if self._validates_elsewhere:
            with self._evaluating():
                self.sampling_engine.update(self.global_step)

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: StepBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Sums of this rank's share; a rank without examples adds nothing."""
        with self._evaluating():
            micro_batches = self.prepare_evaluation(batch)
            with self.phases.phase("validation", total=len(micro_batches)):
                for micro_batch in micro_batches:
                    for name, count in self.count(micro_batch).items():
                        self._sums[f"count/{name}"] += count
                    accumulate(self._sums, self.loss_terms(micro_batch.to(self.device)), float)
                    self.phases.advance()
            if self.validation_spec.sampling is not None and batch.examples:
                for name, number in self.sampled_accuracy(batch, self.phases, self.validation_engine).items():
                    self._sums[f"sampled/{name}"] += number
            for name, (part, whole) in (self.measured(batch) if batch.examples else {}).items():
                self._sums[f"metric/{name}"] += part
                self._sums[f"number/{name}"] += whole

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Reduce over ranks and log ``val/...``."""
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        """Reduce over ranks and log ``test/...``."""
        self._log_evaluation("test")

    def _log_evaluation(self, prefix: str) -> None:
        # A rank without a batch has no sums, and the others' names are not known to it.
        sums = {name: self._sums.get(name, 0.0) for name in union(self._sums)}
        totals = all_reduce({**sums, "broken off": float(STOP_REQUEST.lost_server)}, self.device)
        if totals.pop("broken off"):  # nothing is logged, and no checkpoint is the best for it
            raise STOP_REQUEST.preempted()
        losses, metrics = means(totals, self.loss_names, self.loss_weights)
        sampled = {
            name.removeprefix("sampled/"): total for name, total in totals.items() if name.startswith("sampled/")
        }
        values = losses | self.derived_metrics(metrics) | SampledAccuracy.rates(sampled)
        shown = {f"{prefix}/{name}": values.pop(name) for name in ("loss", "accuracy") if name in values}
        self.log_dict(shown, prog_bar=True, batch_size=1)
        self.log_dict({f"{prefix}/{name}": value for name, value in values.items()}, batch_size=1)
        if self._throughput is not None:
            self._throughput.restart()

    def predict_step(self, batch: StepBatch, batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """Sample completions and return them as completion rows (``stepkd.data.rows.COMPLETION``)."""
        source = str(self.trainer.ckpt_path or self.policy_spec.path)
        with self._evaluating():
            return self.sampled_accuracy.completion_rows(batch, self.phases, model_id=source)

    # ---- plumbing --------------------------------------------------------------------------------------------------

    def _collate(self, examples: list[Completion], *, is_dummy: bool = False) -> Batch:
        pad = int(self.tokenizer.pad_token_id or 0)
        return collate(examples, pad, share=self.shares_prompts, is_dummy=is_dummy)

    @property
    def shares_prompts(self) -> bool:
        """Whether completions of one prompt that meet in a micro-batch read it once."""
        return self.shares and self.model.shares_prompts

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Batches are lists of examples; micro-batches move to the device one at a time."""
        return batch

    def teardown(self, stage: str) -> None:
        """Release worker processes."""
        if (made := vars(self).pop("sampled_accuracy", None)) is not None:
            made.close()
        for name in ("sampler", "_fidelity", "sampling_engine"):
            vars(self).pop(name, None)  # they grade by its workers, or hold weights
