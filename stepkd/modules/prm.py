"""Process reward models: a language model that scores every step of a solution.

Two heads (:class:`~stepkd.models.step_head.StepHeadSpec`): label tokens at a step marker, as in Math-Shepherd
(arXiv 2312.08935) and ASPRM (arXiv 2502.13943), or a small classifier, as in Qwen2.5-Math-PRM (arXiv 2501.07301). With
``data.labels.scope: outcome`` and ``head.meaning: outcome`` it is an outcome reward model, the baseline.
"""

from __future__ import annotations

from typing import Any, cast

from stepkd.data.collate import MicroBatch
from stepkd.data.encode import Example
from stepkd.data.loader import StepBatch
from stepkd.data.step_collate import LabelledBatch, collate_steps
from stepkd.errors import ConfigError
from stepkd.losses import DEFAULT_CHUNK, LossTerms, step_cross_entropy, step_weights
from stepkd.models import PolicySpec, StepHeadSpec
from stepkd.models.step_head import StepHeadIds, resolve_ids
from stepkd.modules.base import StepModule
from stepkd.modules.optim import OptimizerSpec
from stepkd.modules.validation import ValidationSpec


class PRMModule(StepModule):
    """Cross-entropy on step labels, every labelled step weighing the same (up to its class weight).

    Args:
        policy: the model to train; LoRA or all weights.
        head: how it scores steps.
        class_weights: weight per class, worst first; null for none.
        optimizer, validation, micro_batch_tokens, chunk_size, loss_weights, ema_decay, seed: as for
            :class:`~stepkd.modules.base.StepModule`.
    """

    components = ("prm",)

    def __init__(
        self,
        policy: PolicySpec,
        head: StepHeadSpec | None = None,
        class_weights: list[float] | None = None,
        optimizer: OptimizerSpec | None = None,
        validation: ValidationSpec | None = None,
        micro_batch_tokens: int = 8192,
        chunk_size: int = DEFAULT_CHUNK,
        loss_weights: dict[str, float] | None = None,
        ema_decay: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(policy, optimizer, validation, micro_batch_tokens, chunk_size, loss_weights, ema_decay, seed)
        self.head_spec = head or StepHeadSpec()
        if self.validation_spec.samples:
            raise ConfigError("validation.samples: a process reward model scores steps and is not sampled from; use 0")
        if class_weights is not None and (
            len(class_weights) != self.head_spec.num_classes or min(class_weights) < 0 or not sum(class_weights)
        ):
            raise ConfigError(
                f"class_weights={class_weights}: {self.head_spec.num_classes} numbers >= 0, not all 0, worst first"
            )
        self.class_weights = class_weights

    @property
    def step_head_ids(self) -> StepHeadIds:
        """Marker and label ids in the policy's tokenizer; available before the weights are loaded."""
        return resolve_ids(self.head_spec, self.tokenizer)

    def configure_model(self) -> None:
        """Load the policy and put the step head on it (once)."""
        super().configure_model()
        self.model.attach_step_head(self.head_spec, seed=self.policy_spec.init_seed)

    def count(self, micro_batch: MicroBatch) -> dict[str, float]:
        """The sum of the labelled steps' weights."""
        return {"prm": float(step_weights(cast(LabelledBatch, micro_batch).targets_LC, self.class_weights).sum())}

    def loss_terms(self, micro_batch: MicroBatch) -> LossTerms:
        """Cross-entropy of the labelled steps, with accuracies by class."""
        batch = cast(LabelledBatch, micro_batch)
        hidden_BTH = self.model.hidden(batch.input_ids_BT, batch.attention_mask_BT)
        hidden_LH = hidden_BTH.flatten(0, 1)[batch.read_L]
        head = self.model.require_step_head()
        logps_LC = head.logps(hidden_LH, self.model.head, chunk_size=self.chunk_size)
        return step_cross_entropy(logps_LC, batch.targets_LC.to(logps_LC), class_weights=self.class_weights)

    def predict_step(self, batch: StepBatch, batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """A reward model samples nothing."""
        raise ConfigError("stepkd predict samples completions, and this is a reward model: use stepkd score")

    def next_commands(self, run: str) -> list[str]:
        """A reward model is judged and used, not sampled from."""
        return [
            f"judge:  stepkd evaluate --benchmark processbench --model {run} --out ...",
            f"score:  stepkd score --model {run} --rollouts ... --out ...",
            f"export: stepkd export {run} --to ...",
        ]

    def _collate(self, examples: list[Example], *, is_filler: bool = False) -> MicroBatch:
        return collate_steps(examples, int(self.tokenizer.pad_token_id or 0), is_filler=is_filler)
