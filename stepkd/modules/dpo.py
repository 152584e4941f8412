"""DPO on pairs of completions or of next steps (Step-DPO, arXiv 2406.18629; MCTS-DPO, arXiv 2405.00451).

Axes: N completion tokens, R completions (two per pair), P pairs.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor

from stepkd.data.collate import Batch
from stepkd.data.datamodule import StepData
from stepkd.data.feedback import PairEncoder, PairExample
from stepkd.errors import ConfigError, check_bounds
from stepkd.losses import LossTerms, dpo, segment_sum, visit_smoothing
from stepkd.models.spec import PolicyConfig
from stepkd.modules.components import Component, ForwardPass
from stepkd.modules.preference import PreferenceModule, ReferenceConfig
from stepkd.steps.text import first_difference


class PairLoss(ABC):
    """How the difference D of a pair's log-ratios becomes its loss; see :func:`stepkd.losses.dpo`."""

    kind: ClassVar[Literal["sigmoid", "ipo"]]

    def smoothing(self, pairs: Sequence[PairExample]) -> float | Tensor:
        """Label smoothing of these pairs.

        Args:
            pairs: of one micro-batch.

        Returns:
            Chance in [0, 0.5] that a pair is the wrong way round: one number, or one per pair.
        """
        return 0.0


@dataclass(frozen=True)
class Sigmoid(PairLoss):
    """DPO's own: ``-log sigma(beta D)``, with label smoothing that of conservative DPO."""

    label_smoothing: float = 0.0
    """Chance in [0, 0.5] that a pair is the wrong way round; 0 trusts all of them."""

    kind = "sigmoid"

    def __post_init__(self) -> None:
        check_bounds("loss.", self, label_smoothing="[0, 0.5]")

    def smoothing(self, pairs: Sequence[PairExample]) -> float | Tensor:
        """The same for all."""
        return self.label_smoothing


@dataclass(frozen=True)
class SigmoidByVisits(PairLoss):
    """``Sigmoid`` with each pair's label smoothing from its visit counts in a tree search (MCTS-DPO)."""

    kind = "sigmoid"

    def smoothing(self, pairs: Sequence[PairExample]) -> float | Tensor:
        """See :func:`stepkd.losses.visit_smoothing`.

        Raises:
            ConfigError: a pair without visit counts.
        """
        if lacking := [pair.id for pair in pairs if pair.visits is None]:
            raise ConfigError(
                f"loss: SigmoidByVisits, and pair {lacking[0]} has no visit counts (chosen_visits, rejected_visits): "
                "they come from a tree search (stepkd pairs tree)"
            )
        visits_P2 = torch.tensor([pair.visits for pair in pairs])
        return visit_smoothing(visits_P2[:, 0], visits_P2[:, 1])


@dataclass(frozen=True)
class IPO(PairLoss):
    """``(D - 1 / (2 beta))^2`` (Azar et al. 2023, arXiv 2310.12036)."""

    kind = "ipo"


@dataclass(eq=False)
class Pairs(Component):
    """DPO's loss on the log-ratios of both sides of every pair (:func:`stepkd.losses.dpo`), which it makes of the
    tokens'."""

    loss: PairLoss
    beta: float
    length_normalised: bool
    from_first_difference: bool

    names = ("dpo",)

    def count(self, batch: Batch) -> dict[str, float]:
        """Pairs."""
        return {"dpo": float(len(batch.examples))}

    def terms(self, forward: ForwardPass) -> LossTerms:
        """See :func:`stepkd.losses.dpo`."""
        batch, ratios_N = forward.batch, forward.logratios_N
        pairs = [cast(PairExample, example) for example in batch.examples]
        kept_N = self._kept(pairs).to(ratios_N)
        ratios_P2 = segment_sum(ratios_N * kept_N, batch.completion_N, batch.num_completions).view(-1, 2)
        lengths_P2 = segment_sum(kept_N, batch.completion_N, batch.num_completions).view(-1, 2).clamp(min=1)
        return dpo(
            *(ratios_P2[:, 0], ratios_P2[:, 1]),
            beta=self.beta,
            loss=self.loss.kind,
            label_smoothing=self.loss.smoothing(pairs),
            lengths_P2=lengths_P2 if self.length_normalised else None,
        )

    def _kept(self, pairs: Sequence[PairExample]) -> Tensor:
        """1.0 for tokens that count, 0.0 for leading ones that both sides share."""
        kept = []
        for better, worse in (pair.completions for pair in pairs):
            shared = first_difference(better.token_ids, worse.token_ids) if self.from_first_difference else 0
            kept += [float(place >= shared) for side in (better, worse) for place in range(len(side.token_ids))]
        return torch.tensor(kept)


class DPOModule(PreferenceModule):
    """Direct preference optimisation. What the pairs are decides the method: whole solutions (DPO), a correct and an
    incorrect next step after a correct prefix (Step-DPO; the prefix is read with the prompt and carries no loss), or
    siblings of a search tree (MCTS-DPO).

    Args:
        policy, reference: as for :class:`~stepkd.modules.preference.PreferenceModule`.
        beta: > 0.
        loss: ``Sigmoid``, ``SigmoidByVisits`` or ``IPO``; null is ``Sigmoid`` without label smoothing.
        length_normalised: divide log-ratios by the number of their tokens.
        from_first_difference: leave out the leading tokens that both sides share.
        **settings: ``optimizer`` and what else :class:`~stepkd.modules.preference.PreferenceModule` takes.
    """

    def __init__(
        self,
        policy: PolicyConfig,
        reference: ReferenceConfig | None = None,
        beta: float = 0.1,
        loss: PairLoss | None = None,
        length_normalised: bool = False,
        from_first_difference: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(policy, reference, **settings)
        if not 0 < beta < float("inf"):
            raise ConfigError(f"beta={beta}: must be positive")
        self.components = (Pairs(loss or Sigmoid(), beta, length_normalised, from_first_difference),)

    def make_encoder(self, data: StepData) -> PairEncoder:
        """The method learns from pairs."""
        return PairEncoder(self.tokenizer, data.template, data.segmenter, max_length=data.max_length)
