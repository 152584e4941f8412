"""What KTO, Step-KTO and DPO share: completions that read a prompt once, and their log-ratios against a frozen
reference, which may be a cache of its log-probabilities.

Axes: those of :mod:`stepkd.data.collate`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from stepkd.data.batching import StepBatch, StepLoader
from stepkd.data.collate import Batch, plan
from stepkd.data.completion import Completion
from stepkd.errors import ConfigError, ModelError
from stepkd.models.checkpoint import load_trained, parameters_fingerprint
from stepkd.models.spec import PolicyConfig
from stepkd.modules.base import Prepared, StepModule
from stepkd.modules.components import ForwardPass
from stepkd.runs.files import write_file
from stepkd.sampling.annotate import check_same_vocabulary


@dataclass(frozen=True)
class ReferenceConfig:
    """The frozen model that log-ratios are taken against."""

    path: str | None = None
    """Another model of the same vocabulary: run folder, model folder, hub id; null: the policy as it starts. That is
    its adapter-off view when fresh adapters are trained, and a frozen copy otherwise."""
    cache: bool = False
    """Compute all the reference's log-probabilities once, before the first step, keep them in the run folder and let go
    of its weights: no second model in memory, and nothing is computed again in a second epoch."""


class ReferenceCache(dict[bytes, Tensor]):
    """Log-probabilities of a completion's tokens under the reference, on the CPU, by the completion's key.

    Args:
        folder: where the ranks' files are; read at once.
        identity: fingerprint of the reference; files of another one are refused.
        precision: the Trainer's; what was computed in another one is not taken, and has to be computed again.

    Raises:
        ModelError: a file of another reference, or one that cannot be read.
    """

    def __init__(self, folder: Path, identity: str, precision: str) -> None:
        super().__init__()
        self.folder = folder
        self.identity = identity
        self.precision = precision
        for path in sorted(folder.glob("reference-*.safetensors")):
            self._read(path)

    def __missing__(self, key: bytes) -> Tensor:
        raise ConfigError(
            "reference.cache holds no log-probabilities of a completion of this batch, and the reference's weights "
            "are gone: resume with the data and batch size that the run was begun with, or set reference.cache: false"
        )

    def save(self, rank: int) -> None:
        """Write everything this rank knows, whole or not at all."""
        path = self.folder / f"reference-{rank}.safetensors"
        tensors = {
            "keys": torch.frombuffer(bytearray(b"".join(self)), dtype=torch.uint8).view(-1, 16).clone(),
            "lengths": torch.tensor([len(each) for each in self.values()]),
            "logps": torch.cat(list(self.values())),
        }
        facts = {"reference": self.identity, "precision": self.precision}
        write_file(path, lambda temporary: save_file(tensors, temporary, metadata=facts))

    def _read(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                facts = file.metadata() or {}
                keys, lengths, logps = (file.get_tensor(name) for name in ("keys", "lengths", "logps"))
        except Exception as error:  # safetensors raises its own class for a torn or foreign file
            raise ModelError(f"{path} is not a readable reference cache ({type(error).__name__}): delete it") from error
        if facts.get("reference") != self.identity:
            raise ModelError(
                f"{path} was made with another reference model ({facts.get('reference')} there, {self.identity} here): "
                "delete it, or give the reference of the first run"
            )
        if facts.get("precision", "32-true") != self.precision:
            return
        for key, values in zip(keys, logps.split(lengths.tolist()), strict=True):
            self[bytes(key.tolist())] = values.clone()


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
        self._cache: ReferenceCache | None = None
        self._known: dict[Completion, Tensor] = {}

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
            reference = load_trained(path, dtype=spec.dtype if spec is not None and spec.dtype != "auto" else None)
            check_same_vocabulary(policy.tokenizer, reference.tokenizer)
            policy.set_reference(reference)
        elif spec is None or spec.lora is None:
            policy.freeze_copy()  # all weights are trained, or an adapter that is no longer at its start
        with policy.reference() as view:
            named = view.named_parameters()
            own = named if view is not policy else [(n, p) for n, p in named if "lora_" not in n]
            identity = parameters_fingerprint(own)
        self.keep_in_mind("reference", identity, "against another reference model", "reference.path (or policy.path)")

    def on_fit_start(self) -> None:
        """Check the reference's context, and fill its cache when one is asked for."""
        super().on_fit_start()
        with self.model.reference() as view:
            self.check_data_fits("reference", view.max_length)
        if self.reference_spec.cache:
            self._fill_cache()

    # ---- batches ---------------------------------------------------------------------------------------------------

    def prepare(self, batch: StepBatch) -> Iterator[Prepared]:
        """One optimiser step: the batch's completions with their reference log-probabilities."""
        yield self.with_reference(self.prepare_examples(batch.examples))

    def prepare_evaluation(self, batch: StepBatch) -> Prepared:
        """The same for validation."""
        examples = tuple(example for example in batch.examples if len(example.token_ids))
        places = tuple(
            place for place, example in zip(batch.places, batch.examples, strict=False) if len(example.token_ids)
        )
        return next(iter(self.prepare(replace(batch, examples=examples, places=places))))

    def make_dummy(self, batch: StepBatch) -> Batch:
        """A rank without work computes one example with weight zero."""
        dummy = super().make_dummy(batch)
        return replace(dummy, reference_N=torch.zeros(len(dummy.targets_N)))

    # ---- log-ratios ------------------------------------------------------------------------------------------------

    def with_reference(self, prepared: Prepared) -> Prepared:
        """Add the reference's log-probabilities to all micro-batches."""
        with self.phases.phase("reference", total=len(prepared.micro_batches)):
            for place, micro_batch in enumerate(prepared.micro_batches):
                prepared.micro_batches[place] = self._referenced(micro_batch)
                self.phases.advance()
        return prepared

    @torch.no_grad()
    def _referenced(self, batch: Batch) -> Batch:
        completions = [completion for example in batch.examples for completion in example.completions]
        if self._cache is not None:
            return replace(batch, reference_N=torch.cat([self._cache[each.key] for each in completions]))
        if self._known:
            return replace(batch, reference_N=torch.cat([self._known[each] for each in completions]))
        batch = batch.to(self.device)
        with self.model.reference() as view:
            return replace(batch, reference_N=ForwardPass(view, batch, self.chunk_size).logps_N)

    def know_reference(self, completions: Sequence[Completion]) -> None:
        """Compute the reference's log-probabilities of all completions of a step together, so that those of one prompt
        read it once; those of the step before are let go."""
        self._known = {}
        if self._cache is None:
            of_reference = self._of_tokens(completions, lambda batch: cast(Tensor, batch.reference_N), "reference")
            self._known = dict(zip(completions, of_reference, strict=True))

    @torch.no_grad()
    def frozen_logratios(self, completions: Sequence[Completion]) -> list[Tensor]:
        """Token log-ratios of completions without gradients, one tensor each, in order."""

        def logratios(batch: Batch) -> Tensor:
            return self.forward_pass(batch.to(self.device)).logratios_N

        return self._of_tokens(completions, logratios, "log-ratios")

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

    # ---- cache -----------------------------------------------------------------------------------------------------

    def _fill_cache(self) -> None:
        """Reference log-probabilities of everything this rank will meet; then the reference's weights are let go."""
        folder = Path(self.trainer.default_root_dir) / "reference"
        cache = ReferenceCache(folder, self._frozen["reference"][0], str(self.trainer.precision))
        wanted: dict[bytes, Completion] = {}
        for batch in self._future_batches():
            for example in (*batch.examples, batch.dummy):
                wanted |= {each.key: each for each in example.completions} if len(example.token_ids) else {}
            wanted |= {each.key: each for each in self.mismatches(batch)}
        missing = [completion for key, completion in wanted.items() if key not in cache]
        as_trained = self.trainer.precision_plugin.forward_context()  # no step has begun that would have entered it
        with self.gathered(), as_trained:
            logps = self._of_tokens(missing, lambda batch: cast(Tensor, batch.reference_N), "reference cache")
        cache |= {each.key: values.detach().cpu() for each, values in zip(missing, logps, strict=True)}
        if missing:
            cache.save(self.global_rank)
        self.model.set_reference(None)
        self._cache = cache

    def _future_batches(self) -> Iterator[StepBatch]:
        """This rank's training batches to the end of the run, and its validation batches."""
        data, steps = self.datamodule, self.planned_steps()
        if data is None:
            raise ConfigError("reference.cache needs stepkd's data module: it reads the run's batches ahead")
        if steps is None:
            raise ConfigError("reference.cache needs to know the run's length: set trainer.max_steps or max_epochs")
        position, left = self.position, steps - self.global_step
        loader = cast(StepLoader, data.train_dataloader())
        loader.position = lambda: position
        while left > 0:
            for batch in loader:
                position, left = batch.next_position, left - 1
                yield batch
                if left <= 0:
                    break
        validation = data.val_dataloader()
        if isinstance(validation, StepLoader):
            yield from validation
