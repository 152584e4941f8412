"""Process reward models: a language model that scores every step of a solution.

Two heads (:class:`~stepkd.models.step_head.StepHeadConfig`): label tokens at a step marker, as in Math-Shepherd
(arXiv 2312.08935) and ASPRM (arXiv 2502.13943), or a small classifier, as in Qwen2.5-Math-PRM (arXiv 2501.07301). With
``data.labels.scope: outcome`` and ``head.meaning: outcome`` it is an outcome reward model, the baseline.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor

from stepkd.data.batching import StepBatch
from stepkd.data.collate import LabelledBatch, MicroBatch, collate_steps
from stepkd.data.encode import Example
from stepkd.errors import ConfigError
from stepkd.losses import LossTerms, cross_entropy, step_cross_entropy, step_weights
from stepkd.models.spec import PolicyConfig
from stepkd.models.step_head import StepHeadConfig, StepHeadIds, resolve_ids
from stepkd.modules.base import StepModule


class PRMModule(StepModule):
    """Cross-entropy on step labels, every labelled step weighing the same (up to its class weight).

    Args:
        policy: the model to train; LoRA or all weights.
        head: how it scores steps.
        class_weights: weight per class, worst first; null for none.
        lm_weight: weight of next-token cross-entropy on the right steps' own tokens beside the step labels; 0 is off.
            The verifiers of Cobbe et al. 2021 (arXiv 2110.14168) are trained with both losses; leaving out the steps
            that are not labelled right is ours. It helps a model that cannot do the task yet.
        **settings: ``optimizer``, ``validation`` and what else :class:`~stepkd.modules.base.StepModule` takes.
    """

    loss_names: tuple[str, ...] = ("prm",)
    scores_steps = True
    labels_give_accuracy = True

    def __init__(
        self,
        policy: PolicyConfig,
        head: StepHeadConfig | None = None,
        class_weights: list[float] | None = None,
        lm_weight: float = 0.0,
        **settings: Any,
    ) -> None:
        super().__init__(policy, **settings)
        self.head_spec = head or StepHeadConfig()
        if self.validation_spec.samples:
            raise ConfigError("validation.samples: a process reward model scores steps and is not sampled from; use 0")
        if class_weights is not None and (
            len(class_weights) != self.head_spec.num_classes
            or not all(0 < weight < float("inf") for weight in class_weights)
        ):
            raise ConfigError(
                f"class_weights={class_weights}: {self.head_spec.num_classes} positive numbers, worst first"
            )
        if not 0 <= lm_weight < float("inf"):
            raise ConfigError(f"lm_weight={lm_weight}: must be 0 (off) or positive")
        self.class_weights = class_weights
        self._ids: StepHeadIds | None = None
        if lm_weight:
            self.loss_names = ("prm", "lm")
            self.loss_weights.setdefault("lm", lm_weight)

    @property
    def step_head_ids(self) -> StepHeadIds:
        """Marker and label ids in the policy's tokenizer; available before the weights are loaded."""
        if self._ids is None:
            self._ids = resolve_ids(self.head_spec, self.tokenizer)
        return self._ids

    def complete_model(self) -> None:
        """Put the step head on the policy."""
        self.model.attach_step_head(self.head_spec, seed=self.policy_spec.init_seed)

    def count(self, micro_batch: MicroBatch) -> dict[str, float]:
        """The sum of the labelled steps' weights, and the solutions' tokens when they are trained on too."""
        batch = cast(LabelledBatch, micro_batch)
        counts = {"prm": float(step_weights(batch.targets_LC, self.class_weights).sum())}
        return counts if "lm" not in self.loss_names else counts | {"lm": float(self._own_tokens(batch).sum())}

    def loss_terms(self, micro_batch: MicroBatch) -> LossTerms:
        """Cross-entropy of the labelled steps, with accuracies by class."""
        batch = cast(LabelledBatch, micro_batch)
        hidden_NH = self.model.hidden(batch.input_ids_BT, batch.attention_mask_BT).flatten(0, 1)
        head = self.model.require_step_head()
        logps_LC = head.logps(hidden_NH[batch.read_L], self.model.head, chunk_size=self.chunk_size)
        terms = step_cross_entropy(logps_LC, batch.targets_LC.to(logps_LC), class_weights=self.class_weights)
        if "lm" in self.loss_names:
            own_N = self._own_tokens(batch)
            language = cross_entropy(
                self.model.head, hidden_NH[batch.needed_N[own_N]], batch.targets_N[own_N], chunk_size=self.chunk_size
            )
            terms.sums["lm"] = language.sums["ce"]
        return terms

    def _own_tokens(self, batch: LabelledBatch) -> Tensor:
        """Which of the targets the language-model loss is on: the right steps' own tokens, without the markers."""
        marker = self.step_head_ids.marker
        return batch.right_N if marker is None else batch.right_N & (batch.targets_N != marker)

    def predict_step(self, batch: StepBatch, batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """A reward model samples nothing."""
        raise ConfigError("stepkd predict samples completions, and this is a reward model: use stepkd score")

    def next_commands(self, run: str) -> list[str]:
        """A reward model is judged and used, not sampled from."""
        return [
            f"judge:  stepkd evaluate --model {run} {self._evaluation(steps=True)} --out ...",
            f"score:  stepkd score --model {run} --rollouts ... --out ...",
            f"export: stepkd export {run} --to ...",
        ]

    def _collate(self, examples: list[Example], *, is_filler: bool = False) -> MicroBatch:
        return collate_steps(examples, int(self.tokenizer.pad_token_id or 0), is_filler=is_filler)
