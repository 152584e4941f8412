"""What KTO, Step-KTO and DPO share: completions that read a prompt once, and their log-ratios against a frozen
reference, which may be a cache of its log-probabilities.

Axes: those of :mod:`stepkd.data.collate`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor

from stepkd.data.batching import Position, StepBatch, StepLoader
from stepkd.data.collate import Batch, plan
from stepkd.data.completion import Completion
from stepkd.errors import ConfigError
from stepkd.models.checkpoint import load_trained, reference_fingerprint
from stepkd.models.spec import PolicyConfig
from stepkd.modules.base import StepModule
from stepkd.modules.components import ForwardPass
from stepkd.sampling.annotate import check_same_vocabulary


@dataclass(frozen=True)
class ReferenceConfig:
    """The frozen model that log-ratios are taken against."""

    path: str | None = None
    """Another model of the same vocabulary: run folder, model folder, hub id; null: the policy as it starts. That is
    its adapter-off view when fresh adapters are trained, and a frozen copy otherwise."""
    cache: bool = False
    """Compute all the reference's log-probabilities before the first step and let go of its weights: no second model in
    memory, and nothing is computed again in a second epoch. A run that is resumed computes them again."""


class PreferenceModule(StepModule):
    """Base of the methods that compare the policy with a reference on given completions.

    Dropout is off in both views. Completions of one prompt that meet in a micro-batch read it once (and what else they
    begin with alike); log-ratios are those of separate rows.

    Args:
        policy: the model to train; LoRA or all weights.
        reference: the frozen model.
        **settings: ``optimizer``, ``validation`` and what else :class:`~stepkd.modules.base.StepModule` takes.
    """

    validates_on_problems = False
    without_dropout = "policy and reference must be seen alike"
    shares = True
    """Whether completions of one prompt read it once, where the model allows it."""

    def __init__(
        self,
        policy: PolicyConfig,
        reference: ReferenceConfig | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(policy, **settings)
        self.reference_spec = reference or ReferenceConfig()
        self.prepares_with_model = not self.reference_spec.cache
        self._known: dict[bytes, Tensor] = {}
        self._all_are_known = False

    # ---- what a method defines -------------------------------------------------------------------------------------

    def mismatches(self, batch: StepBatch) -> list[Completion]:
        """Further completions of which :meth:`prepare` needs log-ratios (without gradients)."""
        return []

    # ---- model -----------------------------------------------------------------------------------------------------

    def complete_model(self) -> None:
        """Give the policy its reference, while its weights are still those it starts from.

        Raises:
            ModelError: the reference cannot be loaded, or has another vocabulary.
        """
        policy, spec, path = self.model, self.model.spec, self.reference_spec.path
        if path is not None:
            reference = load_trained(path, dtype=None if spec is None else spec.dtype)
            check_same_vocabulary(policy.tokenizer, reference.tokenizer)
            policy.set_reference(reference)
        elif spec is None or spec.lora is None:
            policy.freeze_copy()  # all weights are trained, or an adapter that is no longer at its start
        self.frozen["reference"] = reference_fingerprint(policy)

    def check_run(self) -> None:
        """Refuse text that is longer than the reference's context, too."""
        super().check_run()
        if not self._all_are_known:  # its weights are gone then
            with self.model.reference() as view:
                self.check_data_fits("reference", view.max_length)

    def on_fit_start(self) -> None:
        """Fill the reference's cache when one is asked for."""
        super().on_fit_start()
        if self.reference_spec.cache:
            as_trained = self.trainer.precision_plugin.forward_context()  # no step has begun that would have entered it
            with self.gathered(), as_trained:
                self.know_reference(self._all_completions())
            self._all_are_known = True
            self.model.set_reference(None)

    # ---- batches ---------------------------------------------------------------------------------------------------

    def prepare(self, batch: StepBatch) -> Iterator[list[Batch]]:
        """One optimiser step: the batch's completions with their reference log-probabilities."""
        micro_batches = self.prepare_examples(batch.examples)
        with self.phases.phase("reference", total=len(micro_batches)):
            for place, micro_batch in enumerate(micro_batches):
                micro_batches[place] = self._referenced(micro_batch)
                self.phases.advance()
        yield micro_batches

    def prepare_evaluation(self, batch: StepBatch) -> list[Batch]:
        """The same for validation."""
        return next(iter(self.prepare(batch)))

    def make_dummy(self, batch: StepBatch) -> Batch:
        """A rank without work computes one example with weight zero."""
        dummy = super().make_dummy(batch)
        return replace(dummy, reference_N=torch.zeros(len(dummy.targets_N)))

    # ---- log-ratios ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _referenced(self, batch: Batch) -> Batch:
        completions = [completion for example in batch.examples for completion in example.completions]
        if self._known or self._all_are_known:
            missing = [each for each in completions if each.key not in self._known]
            if missing:
                raise ConfigError(
                    f"reference.cache holds no log-probabilities of a completion of row {missing[0].id}, "
                    "and the reference's weights are gone: set reference.cache: false, or give the data of the fit"
                )
            return replace(batch, reference_N=torch.cat([self._known[each.key] for each in completions]))
        batch = batch.to(self.device)
        with self.model.reference() as view:
            return replace(batch, reference_N=ForwardPass(view, batch, self.chunk_size).logps_N)

    def know_reference(self, completions: Sequence[Completion]) -> None:
        """Compute the reference's log-probabilities of completions together, so that those of one prompt read it once.

        Those known before are let go. Nothing to do where all are known (``reference.cache``).

        Args:
            completions: of this rank; found again by their :attr:`~stepkd.data.completion.Completion.key`.
        """
        if not self._all_are_known:
            self._known = {}
            found = self._of_tokens(completions, lambda batch: cast(Tensor, batch.reference_N), "reference")
            self._known = {each.key: logps.cpu() for each, logps in zip(completions, found, strict=True)}

    @torch.no_grad()
    def frozen_logratios(self, completions: Sequence[Completion]) -> list[Tensor]:
        """Token log-ratios ``log pi - log ref`` of completions, without gradients.

        Args:
            completions: of this rank, in any order.

        Returns:
            One tensor for each completion, in order, with a number for each of its tokens, in nats.
        """
        return self._of_tokens(
            completions, lambda batch: self.forward_pass(batch.to(self.device)).logratios_N, "log-ratios"
        )

    def _of_tokens(self, completions: Sequence[Completion], of: Callable[[Batch], Tensor], phase: str) -> list[Tensor]:
        """Something (N,) of micro-batches with their reference, completion by completion."""
        groups = plan(completions, self.micro_batch_tokens, share=self.shares_prompts) if completions else []
        found: dict[Completion, Tensor] = {}
        with self.phases.phase(phase, total=len(groups)):
            for group in groups:
                batch = self._referenced(self._collate(group))
                found |= zip(group, of(batch).split([len(each.token_ids) for each in group]), strict=True)
                self.phases.advance()
        return [found[each] for each in completions]

    def _all_completions(self) -> list[Completion]:
        """Everything that this rank meets in the whole run, each once: so a resumed run computes what the first did."""
        met: dict[bytes, Completion] = {}
        for batch in self._all_batches():
            own = [each for example in (*batch.examples, batch.dummy) for each in example.completions]
            met |= {each.key: each for each in (*own, *self.mismatches(batch))}
        return list(met.values())

    def _all_batches(self) -> Iterator[StepBatch]:
        """This rank's batches of the whole run; from where it stands, too, if other data or batches led there."""
        data, steps = self.datamodule, self.planned_steps()
        if data is None:
            raise ConfigError("reference.cache reads the run's batches ahead: it needs stepkd's data module")
        if steps is None:
            raise ConfigError("reference.cache reads the run's batches ahead: set trainer.max_steps or max_epochs")

        def training(position: Position) -> Iterator[StepBatch]:
            loader, left = cast(StepLoader, data.train_dataloader()), steps
            loader.position = lambda: position
            while left:
                for batch in islice(loader, left):
                    position, left = batch.next_position, left - 1
                    yield batch

        passed = {Position()}
        for batch in training(Position()):
            passed.add(batch.next_position)
            yield batch
        if self.position not in passed:
            yield from training(self.position)
        validation = data.val_dataloader()
        yield from validation if isinstance(validation, StepLoader) else ()
