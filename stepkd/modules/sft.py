"""Supervised fine-tuning on solutions: the ground the other methods start from."""

from __future__ import annotations

from stepkd.data.collate import MicroBatch
from stepkd.losses import LossTerms, cross_entropy
from stepkd.modules.base import StepModule


class SFTModule(StepModule):
    """Next-token cross-entropy on completion tokens, the end token included, averaged over the tokens of the whole
    batch (every token weighs the same, whatever its row's length or micro-batch).

    Arguments are those of :class:`~stepkd.modules.base.StepModule`.
    """

    components = ("ce",)

    def count(self, micro_batch: MicroBatch) -> dict[str, float]:
        """Completion tokens."""
        return {"ce": float(micro_batch.targets_N.numel())}

    def loss_terms(self, micro_batch: MicroBatch) -> LossTerms:
        """``ce``: summed negative log-likelihood of the completion tokens (nats)."""
        return cross_entropy(
            self.model.head, self.needed_hidden(micro_batch), micro_batch.targets_N, chunk_size=self.chunk_size
        )
