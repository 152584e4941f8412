"""The validation, test and prediction loops that every method shares."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule

from stepkd.data.batching import StepBatch
from stepkd.data.encode import Example
from stepkd.losses import LossTerms
from stepkd.models import Policy, PolicySpec
from stepkd.models.average import WeightAverage
from stepkd.modules.distributed import all_reduce, union
from stepkd.modules.throughput import Throughput
from stepkd.modules.validation import SampledAccuracy, ValidationSpec
from stepkd.runs.phases import PhaseTracker

if TYPE_CHECKING:
    from stepkd.data.collate import MicroBatch
    from stepkd.modules.base import Prepared


class EvaluationLoops(LightningModule):
    """Teacher-forced loss on held-out solutions, accuracy of sampled ones, rollouts; always with the averaged weights
    when the run keeps them."""

    components: tuple[str, ...] = ()
    """Names of the loss components, the same on every rank; empty: what ``count`` names."""
    policy_spec: PolicySpec
    validation_spec: ValidationSpec
    loss_weights: dict[str, float]
    phases: PhaseTracker
    seed: int
    ema: WeightAverage | None
    _accuracy: SampledAccuracy | None
    _throughput: Throughput | None
    _sums: dict[str, float]

    if TYPE_CHECKING:  # what StepModule and the method define

        @property
        def model(self) -> Policy: ...
        def ensure_average(self) -> None: ...
        def name_components(self, batch: StepBatch) -> None: ...
        def gathered(self) -> AbstractContextManager[Any]: ...
        def prepare_examples(self, examples: Iterable[Example]) -> Prepared: ...
        def derived_metrics(self, values: dict[str, float]) -> dict[str, float]: ...
        def loss_terms(self, micro_batch: MicroBatch) -> LossTerms: ...

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Evaluation mode, with averaged weights where there are some; ranks may do different work in it."""
        self.ensure_average()
        self.model.eval()
        averaged = nullcontext() if self.ema is None else self.ema.applied(self.model.trainable_parameters())
        with averaged, self.gathered():
            yield

    def _sampled(self) -> SampledAccuracy:
        if self._accuracy is None:
            self._accuracy = SampledAccuracy(self.model, self.validation_spec, self.seed)
        return self._accuracy

    def prepare_evaluation(self, batch: StepBatch) -> Prepared:
        """What validation measures the loss on; every rank calls it for every batch."""
        return self.prepare_examples([example for example in batch.examples if example.completion_ids])

    def on_validation_epoch_start(self) -> None:
        """Fresh sums."""
        self._sums.clear()

    def on_test_epoch_start(self) -> None:
        """Fresh sums."""
        self._sums.clear()

    def validation_step(self, batch: StepBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Sums of this rank's share; a rank without examples adds nothing."""
        self.name_components(batch)
        with self._averaged():
            prepared = self.prepare_evaluation(batch)
            for name, count in prepared.denominators.items():
                self._sums[f"count/{name}"] += count
            with self.phases.phase("validation", total=len(prepared.micro_batches)):
                for micro_batch in prepared.micro_batches:
                    terms = self.loss_terms(micro_batch.to(self.device))
                    for name, value in terms.sums.items():
                        self._sums[f"sum/{name}"] += float(value)
                    for name, (total, items) in terms.metrics.items():
                        self._sums[f"metric/{name}"] += float(total)
                        self._sums[f"number/{name}"] += float(items)
                    self.phases.advance()
            if self.validation_spec.samples and batch.examples:
                for name, number in self._sampled()(batch, self.phases).items():
                    self._sums[f"sampled/{name}"] += number

    def test_step(self, batch: StepBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """As validation, on the test set."""
        self.validation_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        """Reduce over ranks and log ``val/...``."""
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        """Reduce over ranks and log ``test/...``."""
        self._log_evaluation("test")

    def _log_evaluation(self, prefix: str) -> None:
        # Metric names are known only to ranks that had a batch; everything else has fixed names.
        fixed = [f"{part}/{name}" for name in self.components for part in ("sum", "count")]
        fixed += [f"sampled/{name}" for name in SampledAccuracy.NAMES]
        totals = all_reduce({name: self._sums.get(name, 0.0) for name in fixed}, self.device)
        values = {
            f"{prefix}/{name}": totals[f"sum/{name}"] / totals[f"count/{name}"]
            for name in self.components
            if totals[f"count/{name}"]
        }
        if values:
            weights = self.loss_weights
            values[f"{prefix}/loss"] = sum(
                weights.get(name, 1.0) * values.get(f"{prefix}/{name}", 0.0) for name in self.components
            )
        means = self.evaluation_metrics(self._metric_totals())
        values |= {f"{prefix}/{name}": value for name, value in (means | self.derived_metrics(means)).items()}
        sampled = {name.removeprefix("sampled/"): value for name, value in totals.items()}
        values |= {f"{prefix}/{name}": value for name, value in SampledAccuracy.rates(sampled).items()}
        shown = {name: values.pop(name) for name in (f"{prefix}/loss", f"{prefix}/accuracy") if name in values}
        self.log_dict(shown, prog_bar=True, batch_size=1)
        self.log_dict(values, batch_size=1)
        if self._throughput is not None:
            self._throughput.restart()

    def evaluation_metrics(self, totals: Mapping[str, tuple[float, float]]) -> dict[str, float]:
        """What an evaluation logs, from every metric's sum and number over all batches and ranks: their means."""
        return {name: total / number for name, (total, number) in totals.items() if number}

    def _metric_totals(self) -> dict[str, tuple[float, float]]:
        names = union(name.removeprefix("metric/") for name in self._sums if name.startswith("metric/"))
        totals = all_reduce(
            {
                f"{part}/{name}": self._sums.get(f"{part}/{name}", 0.0)
                for name in names
                for part in ("metric", "number")
            },
            self.device,
        )
        return {name: (totals[f"metric/{name}"], totals[f"number/{name}"]) for name in names}

    def predict_step(self, batch: StepBatch, batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """Sample completions and return them as rollout rows (see ``stepkd.data.rows.ROLLOUT``)."""
        source = str(self.trainer.ckpt_path or self.policy_spec.path)
        with self._averaged():
            return self._sampled().rollout_rows(batch, self.phases, model_id=source)
