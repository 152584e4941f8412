"""Search step by step over a population of solutions: step beam search, diverse verifier tree search, particle filter.

All draw steps and score the solutions they lead to; the first two continue the best. Step beam search (Snell et al.
2024, arXiv 2408.03314, section 5.2) keeps the best of all; diverse verifier tree search (Beeching et al. 2024, "Scaling
test-time compute with open models") divides them into trees that share nothing but the prompt, and keeps the best of
each.

The answer is taken otherwise than there. In section 5.2 (as we remember it; it could not be read again) all n
candidates of the last step vote, weighted by their scores. In search-and-learn (027a727) DVTS lets all candidates of a
tree's last step vote, and the beam sets finished solutions aside and keeps drawing n beams. Here the n / width
solutions that are left at the end vote: of a beam with n = width there is one, and no vote. A finished solution keeps
its place while it is among the best. search-and-learn's DVTS also scores a step with a lookahead of one more (at
027a727; by default none since May 2025); here a step is scored as it is.

The particle filter (Puri et al. 2025, "Rollout Roulette", arXiv 2502.01618) draws by the scores what is continued. The
model is a transition, the score of a solution so far the likelihood that it is accepted. N particles take a step each,
are weighted by their scores, and are resampled by their weights: one with a high score is continued in several copies,
one with a low score may survive, which a beam forbids. Its weights, draws and settings were read in both of the
authors' codes: probabilistic-inference-scaling (commit f75d461), which the paper's figures come from and which is
followed here, and its successor its_hub (commit e4d00d1), which clips scores at 1e-7, always resamples finished
particles, and does so once more at the end. Of the paper, the abstract and the figures' captions could be read.
Different here: a solution ends where the generator says, theirs also at ``\\boxed``. Not built: particle Gibbs
(iterations over whole filters), annealing the temperature.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Literal

import numpy as np

from stepkd.errors import ConfigError, check_bounds
from stepkd.randomness import generator
from stepkd.scorers.scorer import Reduction
from stepkd.search.best_of_n import elected
from stepkd.search.state import Found, Problem, Scored, Search, State, Step, Tools, Trace, event, ranked
from stepkd.statistics import FloatArray


@dataclass(frozen=True, kw_only=True)
class Population(Search):
    """Methods that draw steps of several solutions, score where they lead, and select what is continued."""

    n: int = 16
    """Partial solutions of a problem at a time, at least 1."""
    max_steps: int = 40
    """Longest solution in steps, at least 1, beyond which it counts as cut off; 40 is that of search-and-learn."""
    reduction: Reduction | None = None
    """From step scores to one: product, min, mean or last; null takes what suits the scorer's meaning."""
    vote: Literal["max", "majority", "weighted"] = "weighted"
    """How the answer is taken from the solutions at the end."""
    width = 1

    def __post_init__(self) -> None:
        check_bounds("", self, n="[1, inf)", max_steps="[1, inf)")

    def run(self, problems: Sequence[Problem], tools: Tools) -> list[list[Found]]:
        """See :meth:`~stepkd.search.state.Search.run`."""
        groups: list[list[Scored]] = [[(State(problem), None)] * (self.n // self.width) for problem in problems]
        traces: list[Trace] = [[] for _ in problems]
        for step in range(self.max_steps):
            if all(state.end != "step" for state, _ in chain(*groups)):
                break
            new = self._advanced(groups, tools)
            groups = [self._selected(*each, step) for each in zip(new, problems, traces, strict=True)]
        return elected(tools, groups, traces, self.vote)

    def _advanced(self, groups: Sequence[Sequence[Scored]], tools: Tools) -> list[list[list[Scored]]]:
        """Where ``width`` next steps lead every solution, itself where it is finished; copies take different ones."""
        unfinished = [
            ((number, state.path), state)
            for number, group in enumerate(groups)
            for state, _ in group
            if state.end == "step"
        ]
        copies, states = Counter(key for key, _ in unfinished), dict(unfinished)
        drawn: dict[tuple[int, tuple[int, ...]], Iterator[Step]] = {}
        for count in sorted(set(copies.values())):
            keys = [key for key in states if copies[key] == count]
            proposed = tools.generator.propose([states[key] for key in keys], count * self.width)
            drawn |= {key: iter(steps) for key, steps in zip(keys, proposed, strict=True)}
        new = [[state.then(step) for step in islice(drawn[key], self.width)] for key, state in unfinished]
        scores = iter(tools.scores([*chain(*new)], self.reduction))
        scored = iter([(state, next(scores)) for state in states] for states in new)
        return [[next(scored) if each[0].end == "step" else [each] for each in group] for group in groups]

    @abstractmethod
    def _selected(self, new: Sequence[list[Scored]], problem: Problem, trace: Trace, step: int) -> list[Scored]:
        """What is continued of a problem's candidates, which come from one solution each; goes into the trace."""


@dataclass(frozen=True, kw_only=True)
class Beam(Population):
    """Step beam search; a finished solution keeps its place while it is among the best."""

    width: int = 4
    """Next steps drawn of every solution, at least 1; n is a multiple of it, and the best n / width are continued."""
    diverse: bool = False
    """Divide the solutions into n / width trees, of each of which the best is continued (DVTS); false: the best of
    all are."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds("", self, width="[1, inf)")
        if self.n % self.width:
            raise ConfigError(f"n={self.n} is no multiple of width={self.width}: n / width solutions are continued")

    @property
    def name(self) -> str:
        """See :attr:`~stepkd.search.state.Search.name`."""
        return self.named(("dvts" if self.diverse else "beam") + "@{n}x{width}", "diverse")

    def _selected(self, new: Sequence[list[Scored]], problem: Problem, trace: Trace, step: int) -> list[Scored]:
        selected: list[Scored] = []
        for number, candidates in enumerate(new if self.diverse else [[*chain(*new)]]):
            kept = ranked([score for _, score in candidates])[: 1 if self.diverse else self.n // self.width]
            selected += [candidates[i] for i in kept]
            if any(len(state.steps) > step for state, _ in candidates):  # else all have been finished before
                tree = {"tree": number} if self.diverse else {}
                trace.append(event("prune", candidates, step=step, kept=kept, **tree))
        return selected


@dataclass(frozen=True, kw_only=True)
class ParticleFilter(Population):
    """Particle filter over a step scorer; finished particles are resampled with the others, as in the paper's runs and
    in its_hub, so that a copy of one may take the place of an unfinished one."""

    form = "particle_filter@{n}"

    vote: Literal["max", "majority", "weighted"] = "max"
    """How the answer is taken from the particles at the end; both of the authors' codes take the highest score."""
    temperature: float = 1.0
    """Temperature of the weights, above 0: towards 0 the best particle alone is continued, high up all alike; 1 is
    that of the authors."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds("", self, temperature="(0, inf)")

    def _selected(self, new: Sequence[list[Scored]], problem: Problem, trace: Trace, step: int) -> list[Scored]:
        """Particles drawn with replacement by their weights; none at the end."""
        particles = [*chain(*new)]
        if step + 1 == self.max_steps or all(state.end != "step" for state, _ in particles):
            return particles
        weights = particle_weights([score for _, score in particles], self.temperature)
        noise = generator(problem.seed, "particles", problem.index, step + 1)
        kept = noise.choice(len(particles), size=len(particles), p=weights).tolist()
        trace.append(event("resample", particles, step=step, weights=weights.tolist(), kept=kept))
        return [particles[i] for i in kept]


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
