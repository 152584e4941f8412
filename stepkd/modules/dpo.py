"""DPO on pairs of completions or of next steps (Step-DPO, arXiv 2406.18629; MCTS-DPO, arXiv 2405.00451).

Axes: N completion tokens, R completions (two per pair), P pairs.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor

from stepkd.data.collate import Batch
from stepkd.data.feedback import PairExample
from stepkd.errors import ConfigError, check_choice
from stepkd.losses import LossTerms, dpo, segment_sum, visit_smoothing
from stepkd.losses.dpo import PairLoss
from stepkd.models.spec import PolicyConfig
from stepkd.modules.preference import PreferenceModule, ReferenceConfig
from stepkd.steps.text import first_difference


class DPOModule(PreferenceModule):
    """Direct preference optimisation. What the pairs are decides the method: whole solutions (DPO), a right and a wrong
    next step after a right prefix (Step-DPO; the prefix is read with the prompt and carries no loss), or siblings of a
    search tree (MCTS-DPO).

    Args:
        policy, reference: as for :class:`~stepkd.modules.preference.PreferenceModule`.
        beta: > 0.
        loss: ``sigmoid``, ``ipo`` or ``hinge``.
        label_smoothing: chance in [0, 0.5] that a pair is the wrong way round; ``visits`` takes it from the pairs'
            visit counts (MCTS-DPO).
        length_normalised: divide log-ratios by the number of their tokens.
        from_first_difference: leave out the leading tokens that both sides share.
        **settings: ``packing``, ``optimizer`` and what else :class:`~stepkd.modules.preference.PreferenceModule` takes.
    """

    loss_names = ("dpo",)
    feedback = "pairs"

    def __init__(
        self,
        policy: PolicyConfig,
        reference: ReferenceConfig | None = None,
        beta: float = 0.1,
        loss: PairLoss = "sigmoid",
        label_smoothing: float | Literal["visits"] = 0.0,
        length_normalised: bool = False,
        from_first_difference: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(policy, reference, **settings)
        check_choice("loss", loss, ("sigmoid", "ipo", "hinge"))
        if not 0 < beta < float("inf"):
            raise ConfigError(f"beta={beta}: must be positive")
        if label_smoothing != "visits" and not (
            isinstance(label_smoothing, float | int) and 0 <= label_smoothing <= 0.5
        ):
            raise ConfigError(f"label_smoothing={label_smoothing!r}: must lie in [0, 0.5], or be 'visits'")
        if loss != "sigmoid" and label_smoothing != 0:
            raise ConfigError(f"label_smoothing goes with loss 'sigmoid', not with {loss!r}")
        self.beta = beta
        self.loss: PairLoss = loss
        self.label_smoothing = label_smoothing
        self.length_normalised = length_normalised
        self.from_first_difference = from_first_difference

    def count(self, batch: Batch) -> dict[str, float]:
        """Pairs."""
        return {"dpo": float(len(batch.examples))}

    def loss_terms(self, batch: Batch) -> LossTerms:
        """DPO's loss on the log-ratios of both sides."""
        ratios_N = self.logratios(batch)
        kept_N = self._kept(batch).to(ratios_N)
        ratios_P2 = segment_sum(ratios_N * kept_N, batch.completion_N, batch.num_completions).view(-1, 2)
        lengths_P2 = segment_sum(kept_N, batch.completion_N, batch.num_completions).view(-1, 2).clamp(min=1)
        return dpo(
            ratios_P2[:, 0],
            ratios_P2[:, 1],
            beta=self.beta,
            loss=self.loss,
            label_smoothing=self._smoothing(batch),
            lengths_P2=lengths_P2 if self.length_normalised else None,
        )

    def _kept(self, batch: Batch) -> Tensor:
        """1.0 for tokens that count, 0.0 for leading ones that both sides share."""
        kept_N = torch.ones(len(batch.targets_N))
        if not self.from_first_difference:
            return kept_N
        at = 0
        for example in batch.examples:
            better, worse = example.completions
            shared = first_difference(better.token_ids, worse.token_ids)
            for side in (better, worse):
                kept_N[at : at + shared] = 0.0
                at += len(side.token_ids)
        return kept_N

    def _smoothing(self, batch: Batch) -> float | Tensor:
        if self.label_smoothing != "visits":
            return float(self.label_smoothing)
        pairs = [cast(PairExample, example) for example in batch.examples]
        if lacking := [pair.id for pair in pairs if pair.visits is None]:
            raise ConfigError(
                f"label_smoothing: visits, and pair {lacking[0]} has no visit counts (chosen_visits, rejected_visits): "
                "they come from a tree search (stepkd label --to tree_preference)"
            )
        visits_P2 = torch.tensor([pair.visits for pair in pairs])
        return visit_smoothing(visits_P2[:, 0], visits_P2[:, 1])
