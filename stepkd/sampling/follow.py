"""Whether an engine samples from the weights that it was given: its numbers against the trainer's, at every batch."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from stepkd.data.completion import Completion, Numbers
from stepkd.errors import ModelError
from stepkd.models.policy import Policy
from stepkd.sampling.annotate import sampled_logps
from stepkd.sampling.engine import Engine, SamplingConfig, is_stand_in

logger = logging.getLogger(__name__)

WATCHED, AT_LEAST = 16, 4
"""Completions of every batch that are compared: of all addresses together, and of one."""
LEAST_NOISE = 1e-4
"""Nats a token that float32 explains."""
MOST_NOISE = {"float32": 1e-2, "16 bit": 0.1}
"""Nats a token at the first samples beyond which an engine is not the policy's: models have about 1e-6 in float32 and
0.05 in bfloat16. Quantised ones (0.1 to 0.2 at 4 bits) are warned of."""
LEAST_DOUBT = 0.01
"""Least mean probability of tokens that were not drawn; below it differences are rounding of another kind."""
GROWTH = 4
"""Times the noise that distances may grow to while the engine follows."""
PATIENCE = 3
"""Batches running that have to stray before the run stops: one may be an accident."""


class Reading(NamedTuple):
    """How far two computations of the same log-probabilities are apart."""

    nats: float
    """Mean difference in nats a token at temperature 1; at T rounded logits move log-probabilities by a T-th of it."""
    doubt: float
    """Mean probability of the tokens that were not drawn, at least :data:`LEAST_DOUBT`."""

    @property
    def share(self) -> float:
        """``nats`` over ``doubt``: a rounded logit moves a token's log-probability about in proportion to the latter,
        so that batches of which the policy is more or less sure compare."""
        return self.nats / self.doubt


def reading(a_N: Numbers, b_N: Numbers, drawn_N: Numbers, temperature: float = 1.0) -> Reading:
    """Compare log-probabilities.

    Args:
        a_N, b_N: both computations, by token.
        drawn_N: log-probabilities with which the tokens were drawn.
        temperature: of all of them.
    """
    nats = temperature * float(np.abs(a_N - b_N).mean())
    return Reading(nats, max(float(1 - np.exp(drawn_N).mean()), LEAST_DOUBT))


@dataclass
class Follower:
    """What is known of one address; decides by distances alone, all of them a :attr:`Reading.share`."""

    noise: float
    """Distance of engine and trainer at the first samples."""
    before: float
    """The same when the engine was last seen to follow."""
    strayed: int = 0
    """Batches running that the engine strayed."""

    def follows(self, gap: float, moved: float | None) -> bool | None:
        """Judge a batch.

        Two things explain a distance: rounding, or weights that never arrived. Of the first it stays near what it was;
        of the second it is what the trainer itself has moved since.

        Args:
            gap: distance of engine and trainer now.
            moved: distance of the trainer now from the trainer when the engine was last seen to follow, of the samples
                of then; None: not known.

        Returns:
            True where the engine is seen to follow, False where it strays, None where the trainer has not moved far
            enough to say.
        """
        is_nearer = moved is not None and 2 * gap <= moved  # to the new weights; not where one is no number
        if not (gap <= self.before + self.noise or (is_nearer and gap <= GROWTH * self.noise)):
            self.strayed += 1
            return False
        self.strayed = 0
        if moved is not None and not (is_nearer and moved > self.noise):
            return None
        self.before = gap
        return True


@dataclass(eq=False)
class FollowCheck:
    """Stops a run whose engine does not follow the weights that it was given, each address for itself.

    The noise is measured at the first samples of a run and kept in ``policy.engine_noise``, which checkpoints hold, for
    engines of the same number format. An engine of which :data:`PATIENCE` batches running are further from the trainer
    than before plus that noise, and no nearer to its weights than to the old ones (or further than :data:`GROWTH` times
    the noise), stops the run.
    """

    engine: Engine
    """Its policy is the trainer's."""
    _of: dict[str, Follower] = field(default_factory=dict, init=False)
    _last: dict[str, tuple[list[Completion], SamplingConfig, Numbers]] = field(default_factory=dict, init=False)
    """By address the samples at which it was last seen to follow, and what the trainer said of them."""
    _said: bool = field(default=False, init=False)

    def __call__(self, drawn: Mapping[str, Sequence[Completion]], spec: SamplingConfig, which: str) -> None:
        """Compare a batch.

        Args:
            drawn: completions by address; "" is this process.
            spec: how they were drawn.
            which: weights they should be drawn from, for messages.

        Raises:
            ModelError: the engine samples from other weights.
        """
        if spec.temperature == 0 or spec.top_p < 1 or spec.top_k:
            if not self._said and spec.temperature:
                self._said = True
                logger.warning("samples that top_p or top_k cut cannot show whether the engine follows the weights")
            return
        policy, found = self.engine.policy, dict[str, list[Completion]]()
        for where, completions in drawn.items():
            some = [each for each in completions if not is_stand_in(each, policy.eos_ids)]
            found |= {where: some} if some else {}
        known, said = policy.engine_noise, self.engine.facts()
        kind = f"{said.get('dtype')} {said.get('quantization')}"
        resumed = {} if self._of or known.get("of") != kind else dict(known)
        for where, completions in found.items():
            # Not every k-th one: requests go to servers in turn, and one could be left out.
            number = min(len(completions), max(WATCHED // len(found), AT_LEAST))
            chosen = np.random.default_rng(len(completions)).choice(len(completions), number, replace=False)
            some = [completions[i] for i in sorted(chosen)]
            self._look(where, some, spec, f"{which} at {where}" if where else which, resumed)
        if self._of:
            most = {name: max(getattr(each, name) for each in self._of.values()) for name in ("noise", "before")}
            known |= {"of": kind, **most}

    def _look(
        self, where: str, some: list[Completion], spec: SamplingConfig, which: str, resumed: Mapping[str, float]
    ) -> None:
        policy: Policy = self.engine.policy
        drawn_N = np.concatenate([each.logprobs for each in some])
        own_N = sampled_logps(policy, some, spec.temperature)
        gap = reading(own_N, drawn_N, drawn_N, spec.temperature)
        moved = None
        if where not in self._of:
            noise = max(gap.nats, LEAST_NOISE) / gap.doubt
            self._of[where] = Follower(resumed.get("noise", noise), resumed.get("before", noise))
            self._check_first(gap.nats, which)
        if where in self._last:
            samples, how, then_N = self._last[where]
            now_N = sampled_logps(policy, samples, how.temperature)
            moved = reading(now_N, then_N, np.concatenate([each.logprobs for each in samples]), how.temperature)
        follower = self._of[where]
        if follower.follows(gap.share, moved and moved.share):
            self._last[where] = some, spec, own_N
        if follower.strayed >= PATIENCE:
            since = f"; the trainer's moved by {moved.nats:.2g} since it last did" if moved else ""
            times = gap.share / (follower.before + follower.noise)
            self._stop(which, gap.nats, f"{times:.2g} times what rounding explains{since}")

    def _check_first(self, nats: float, which: str) -> None:
        """Refuse an engine that is further from the policy than its number formats explain."""
        policy, said = self.engine.policy, self.engine.facts()
        kinds = {each.dtype for each in policy.parameters()}
        is_whole = all(kind in (torch.float32, torch.float64) for kind in kinds)
        is_whole &= not torch.is_autocast_enabled(policy.device.type)
        is_whole &= str(said.get("dtype", torch.float32)) in ("torch.float32", "torch.float64")
        most = MOST_NOISE["float32" if is_whole else "16 bit"]
        if nats <= most:
            return
        quantised = any(not kind.is_floating_point for kind in kinds) or said.get("quantization", "None") != "None"
        if not quantised:
            self._stop(which, nats, f"{most} is the most that rounding explains")
        logger.warning("%s: engine and trainer differ by %.2g nats a token, as quantised weights may", which, nats)

    @staticmethod
    def _stop(which: str, gap: float, why: str) -> None:
        raise ModelError(
            f"the engine does not sample from the weights of {which}: its log-probabilities are {gap:.2g} nats a token "
            f"from the trainer's ({why}). Does the server hold the policy's model, and does its log say that it loaded "
            "the weights? The samples would be another policy's, so the run stops"
        )
