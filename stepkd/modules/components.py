"""Components: a method's losses, each with its count and its terms side by side, on one shared forward pass.

Axes: B rows, T padded length, N targets, L labelled steps, C classes, H hidden size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType

import torch
from torch import Tensor

from stepkd.data.collate import Batch
from stepkd.losses import DEFAULT_CHUNK, LossTerms, VocabHead, cross_entropy, token_logps
from stepkd.models.policy import Policy
from stepkd.models.spec import StepHeadConfig
from stepkd.teachers.signals import Signals


@dataclass(eq=False)
class ForwardPass:
    """One micro-batch under a policy: everything else is computed when a component first asks, and once for all."""

    policy: Policy
    """The model; in training the one that is trained, so that gradients flow through all of this."""
    batch: Batch
    """On the policy's device."""
    chunk_size: int = DEFAULT_CHUNK
    """Positions whose logits exist at the same time; a component hands it to its loss function."""
    scales: Mapping[str, float] = field(default_factory=dict)
    """Factor of every sum in the loss of this optimiser step (:func:`~stepkd.losses.reduce.component_scales`), for a
    loss that takes its gradients in the forward pass; empty outside training."""
    signals: Signals | None = None
    """What a teacher says of the targets, where the method has one."""
    teacher_N: Tensor | None = None
    """A teacher's log-probability of every target, where the method reads that alone."""

    @property
    def head(self) -> VocabHead:
        """The policy's head, hidden states to logits."""
        return self.policy.head

    @cached_property
    def hidden_BTH(self) -> Tensor:
        """Last hidden states of all positions; those of padding are arbitrary.

        The one forward pass of the policy: the first component that needs it makes it, with its graph where gradients
        are on.
        """
        batch = self.batch
        return self.policy.hidden(batch.input_ids_BT, batch.attention_mask_BT, batch.shared_BT)

    def hidden_at(self, places: Tensor) -> Tensor:
        """Hidden states at some positions, for a head that reads steps or tokens there.

        Args:
            places: int64 positions of the flattened (B * T) axis, such as ``batch.read_L``.

        Returns:
            (places, H) states in that order; gradients flow through them.
        """
        return self.hidden_BTH.flatten(0, 1)[places]

    @cached_property
    def hidden_NH(self) -> Tensor:
        """Hidden states that predict the targets."""
        return self.hidden_at(self.batch.needed_N)

    @cached_property
    def logps_N(self) -> Tensor:
        """Log-probability of every target in nats, float32 or float64, at temperature 1.

        Computed ``chunk_size`` positions at a time (:func:`~stepkd.losses.linear.token_logps`), so that logits over the
        vocabulary never exist for all targets at once.
        """
        return token_logps(self.head, self.hidden_NH, self.batch.targets_N, chunk_size=self.chunk_size)

    @cached_property
    def logratios_N(self) -> Tensor:
        """``log pi - log ref`` of every target, nats; gradients flow through ``log pi`` alone.

        The batch must have its log-probabilities under the reference (``reference_N``), which the module's ``prepare``
        adds.
        """
        assert self.batch.reference_N is not None, "prepare() adds the reference"
        return self.logps_N - self.batch.reference_N.to(self.logps_N)

    @cached_property
    def step_logps_LC(self) -> Tensor:
        """Log-probabilities of the step head's classes at every labelled step, worst class first, nats.

        Raises:
            ModelError: the policy has no step head.
        """
        hidden_LH = self.hidden_at(self.batch.read_L)
        return self.policy.require_step_head().logps(hidden_LH, self.head, chunk_size=self.chunk_size)


class Component(ABC):
    """One loss of a method: named sums over a micro-batch's items, and how many items each is over.

    A method's ``components`` are a list of these (:class:`~stepkd.modules.base.StepModule`), so a loss beside another
    is one more entry. They share one :class:`ForwardPass`. Nobody divides: the base counts over all micro-batches and
    ranks, divides, weighs by ``loss_weights`` and adds up. A component may hold what it needs, be it settings, a
    teacher or a schedule; what a batch must be prepared for is the module's work.

    Together the components of a method must reach every trainable parameter in every micro-batch, because DDP waits for
    all of them. ``terms`` gives the same sums and metrics for every micro-batch (a metric with count 0 where it does
    not apply), because ranks add them up name by name. It is called for dummy batches too; their gradient counts zero.
    """

    names: tuple[str, ...]
    """Names of its sums, different from those of all other components of a method: most have one. Several sums are for
    a loss whose one pass over the logits, or whose one loss function, gives them all."""

    @abstractmethod
    def count(self, batch: Batch) -> dict[str, float]:
        """How many items each sum is over in this micro-batch: its part of the denominators, on the CPU.

        Args:
            batch: a micro-batch; counted before its forward pass, and before it is moved to a device.

        Returns:
            For each of ``names`` a number >= 0; weights in place of a count are allowed. Added up over the
            micro-batches of an optimiser step and all ranks, it is what the sum is divided by.
        """

    @abstractmethod
    def terms(self, forward: ForwardPass) -> LossTerms:
        """The sums, not divided, and metrics of one micro-batch.

        A loss of several sums that takes its gradients in the forward pass makes ``LossTerms.loss`` of
        ``forward.scales``, too.

        Args:
            forward: the micro-batch under the policy; what it computes is shared with the other components.

        Returns:
            For each of ``names`` a scalar sum with its graph, and detached (sum, count) metrics.
        """


class CrossEntropy(Component):
    """Next-token cross-entropy on the targets.

    Args:
        weights: weight of each token id, >= 0; an id that is not there has 1.
    """

    names = ("ce",)

    def __init__(self, weights: Mapping[int, float] = MappingProxyType({})) -> None:
        self.weights = weights

    def count(self, batch: Batch) -> dict[str, float]:
        """Targets, by weight."""
        weights_N = self._weights(batch.targets_N)
        return {"ce": float(batch.targets_N.numel() if weights_N is None else weights_N.sum())}

    def terms(self, forward: ForwardPass) -> LossTerms:
        """``ce``: summed negative log-likelihood of the targets (nats), by weight."""
        targets_N = forward.batch.targets_N
        weights_N, size = self._weights(targets_N), forward.chunk_size
        return cross_entropy(forward.head, forward.hidden_NH, targets_N, weights_N=weights_N, chunk_size=size)

    def _weights(self, targets_N: Tensor) -> Tensor | None:
        if not self.weights:
            return None
        weights_N = torch.ones_like(targets_N, dtype=torch.float64)
        for token, weight in self.weights.items():
            weights_N[targets_N == token] = weight
        return weights_N


class StepLoss(Component):
    """A loss of a process reward model: a component that reads the step head, or trains the backbone beside one that
    does."""

    reads_head = True
    """Whether it trains the step head by itself; one of a module's losses has to."""
    compares_steps = False
    """Whether it compares the steps of a solution, of which an outcome reward model labels none but the last."""

    def check(self, head: StepHeadConfig) -> None:
        """Refuse a head that the loss cannot train.

        Raises:
            ConfigError: the setting that does not go with the head's classes.
        """

    def bound(self, policy: Policy) -> StepLoss:
        """The loss for a model with its step head: itself, where it needs nothing of them."""
        return self


def terms_of(components: Sequence[Component], forward: ForwardPass) -> LossTerms:
    """Sums and metrics of all components of a method for one micro-batch.

    Args:
        components: with names that differ.
        forward: the micro-batch under the policy, one forward pass for all of them.

    Returns:
        All of their sums and metrics; with ``loss`` where one of them made its own and the forward pass has ``scales``:
        every component's part of it, added up.
    """
    found = [component.terms(forward) for component in components]
    together = LossTerms({}, {})
    for terms in found:
        together.sums |= terms.sums
        together.metrics |= terms.metrics
    if any(terms.loss is not None for terms in found) and forward.scales:
        together.loss = sum((terms.scaled(forward.scales) for terms in found[1:]), found[0].scaled(forward.scales))
    return together
