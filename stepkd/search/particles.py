"""Particle filtering over a step scorer (Puri et al. 2025, "Rollout Roulette", arXiv 2502.01618).

The model is a transition, the score of a solution so far the likelihood that it is accepted. N particles take a step
each, are weighted by their scores, and are resampled by their weights: one with a high score is continued in several
copies, one with a low score may survive, which a beam forbids.

Weights, draws and settings were read in both of the authors' codes: probabilistic-inference-scaling (commit f75d461),
which the paper's figures come from and which is followed here, and its successor its_hub (commit e4d00d1), which clips
scores at 1e-7, always resamples finished particles, and does so once more at the end. Of the paper, the abstract and
the figures' captions could be read. Different here: a solution ends where the generator says, theirs also at
``\\boxed``. Not built: particle Gibbs (iterations over whole filters), annealing the temperature.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from stepkd.errors import check_bounds
from stepkd.randomness import generator
from stepkd.search.beam import Population, Scored, event
from stepkd.search.state import Found, Problem, State, Step, Tools
from stepkd.statistics import FloatArray


@dataclass(frozen=True, kw_only=True)
class ParticleFilter(Population):
    """Particle filter over a step scorer."""

    vote: Literal["max", "majority", "weighted"] = "max"
    """How the answer is taken from the particles at the end; both of the authors' codes take the highest score."""
    temperature: float = 1.0
    """Temperature of the weights, above 0: towards 0 the best particle alone is continued, high up all alike; 1 is
    that of the authors."""
    resample_finished: bool = True
    """Whether finished particles are resampled with the others, as in the paper's runs and in its_hub, so that a copy
    of one may take the place of an unfinished one; false: the unfinished are resampled among themselves."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds("", self, temperature="(0, inf)")

    @property
    def name(self) -> str:
        """See :attr:`~stepkd.search.state.Search.name`."""
        return self.named(f"particle_filter@{self.n}", "n")

    def run(self, problems: Sequence[Problem], tools: Tools) -> list[list[Found]]:
        """See :meth:`~stepkd.search.state.Search.run`."""
        filters: list[list[Scored]] = [[(State(problem), None)] * self.n for problem in problems]
        traces: list[list[dict[str, Any]]] = [[] for _ in problems]
        for step in range(self.max_steps):
            if step:
                for number, problem in enumerate(problems):
                    filters[number] = self._resampled(filters[number], problem, step, traces[number])
            if not any(state.end == "step" for particles in filters for state, _ in particles):
                break
            filters = self._advanced(filters, tools)
        return self.chosen(tools, filters, traces)

    def _resampled(
        self, particles: list[Scored], problem: Problem, step: int, trace: list[dict[str, Any]]
    ) -> list[Scored]:
        """Particles drawn with replacement by their weights, as many as there are; none where all are finished."""
        going = [i for i, (state, _) in enumerate(particles) if state.end == "step"]
        if not going:
            return particles
        drawn = list(range(len(particles))) if self.resample_finished else going
        weights = particle_weights([particles[i][1] for i in drawn], self.temperature)
        noise = generator(problem.seed, "particles", problem.index, step)
        kept = list(range(len(particles)))
        for place, choice in zip(drawn, noise.choice(len(drawn), size=len(drawn), p=weights).tolist(), strict=True):
            kept[place] = drawn[choice]
        more = {} if self.resample_finished else {"drawn": drawn}
        trace.append(event("resample", particles, step=step - 1, weights=weights.tolist(), kept=kept, **more))
        return [particles[i] for i in kept]

    def _advanced(self, filters: Sequence[Sequence[Scored]], tools: Tools) -> list[list[Scored]]:
        """Every unfinished particle takes a step; copies of one take different ones."""
        unfinished = [
            ((number, state.path), state)
            for number, particles in enumerate(filters)
            for state, _ in particles
            if state.end == "step"
        ]
        copies, states = Counter(key for key, _ in unfinished), dict(unfinished)
        drawn: dict[tuple[int, tuple[int, ...]], Iterator[Step]] = {}
        for count in sorted(set(copies.values())):
            keys = [key for key in states if copies[key] == count]
            proposed = tools.generator.propose([states[key] for key in keys], count)
            drawn |= {key: iter(steps) for key, steps in zip(keys, proposed, strict=True)}
        new = [states[key].then(next(drawn[key])) for key, _ in unfinished]
        scored = iter(zip(new, tools.scores(new, self.reduction), strict=True))
        return [[next(scored) if each[0].end == "step" else each for each in particles] for particles in filters]


def particle_weights(scores: Sequence[float | None], temperature: float) -> FloatArray:
    """Chance of every particle to be drawn: softmax of logit(score) / temperature.

    Args:
        scores: in [0, 1]; as in the authors' code they are first clipped to 2.2e-16 away from 0 and 1, so beside an
            exact checker's 1 a 0 has 4.9e-32 of its weight at temperature 1. None has weight 0, where not all are None.
        temperature: above 0.

    Returns:
        Numbers that sum to 1.
    """
    tiny = np.finfo(float).eps
    known = np.array([np.nan if score is None else score for score in scores], dtype=float)
    if np.isnan(known).all():
        return np.full(len(known), 1 / len(known))
    clipped = np.clip(known, tiny, 1 - tiny)
    logits = (np.log(clipped) - np.log1p(-clipped)) / temperature
    weights = np.where(np.isnan(known), 0.0, np.exp(logits - np.nanmax(logits)))
    return weights / weights.sum()
