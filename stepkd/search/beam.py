"""Search step by step over a population of solutions: step beam search, diverse verifier tree search.

Both draw steps, score the solutions they lead to, and continue the best. Step beam search (Snell et al. 2024, arXiv
2408.03314, section 5.2) keeps the best of all; diverse verifier tree search (Beeching et al. 2024, "Scaling test-time
compute with open models") divides them into trees that share nothing but the prompt, and keeps the best of each.

The answer is taken otherwise than there. In section 5.2 (as we remember it; it could not be read again) all n
candidates of the last step vote, weighted by their scores. In search-and-learn (027a727) DVTS lets all candidates of a
tree's last step vote, and the beam sets finished solutions aside and keeps drawing n beams. Here the n / width
solutions that are left at the end vote: of a beam with n = width there is one, and no vote. A finished solution keeps
its place while it is among the best. search-and-learn's DVTS also scores a step with a lookahead of one more (at
027a727; by default none since May 2025); here a step is scored as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, TypeAlias

from stepkd.errors import ConfigError, check_bounds
from stepkd.scorers.scorer import Reduction
from stepkd.search.best_of_n import answered, choice, eligible
from stepkd.search.state import Found, Problem, Search, State, Tools, ranked

Scored: TypeAlias = tuple[State, float | None]
"""A solution so far, and its score."""


@dataclass(frozen=True, kw_only=True)
class Population(Search):
    """What methods that keep several solutions going have in common."""

    n: int = 16
    """Partial solutions of a problem at a time, at least 1."""
    max_steps: int = 40
    """Longest solution in steps, at least 1, beyond which it counts as cut off; 40 is that of search-and-learn."""
    reduction: Reduction | None = None
    """From step scores to one: product, min, mean or last; null takes what suits the scorer's meaning."""
    vote: Literal["max", "majority", "weighted"] = "weighted"
    """How the answer is taken from the solutions at the end."""

    def __post_init__(self) -> None:
        check_bounds("", self, n="[1, inf)", max_steps="[1, inf)")

    def chosen(
        self, tools: Tools, groups: Sequence[Sequence[Scored]], traces: Sequence[list[dict[str, Any]]]
    ) -> list[list[Found]]:
        """The solutions of every problem as completions, the one that the vote takes first; the trace is its own."""
        keys = tools.votes([[state for state, _ in group] for group in groups])
        results = []
        for group, votes, trace in zip(groups, keys, traces, strict=True):
            scores = [score for _, score in group]
            states = [state for state, _ in group]
            may = eligible(states)
            winner = may[choice([scores[i] for i in may], [votes[i] for i in may], self.vote)]
            trace.append({"event": "choice", "vote": self.vote, "scores": scores, "votes": votes, "kept": [winner]})
            results.append(answered(states, scores, winner, trace))
        return results


def event(kind: str, candidates: Sequence[Scored], **more: Any) -> dict[str, Any]:
    """A decision among solutions, for a trace: their newest steps, their scores, and what else there is to say."""
    shown = {"steps": [state.steps[-1] for state, _ in candidates], "scores": [score for _, score in candidates]}
    return {"event": kind, **more, **shown}


@dataclass(frozen=True, kw_only=True)
class Beam(Population):
    """Step beam search."""

    width: int = 4
    """Next steps drawn of every solution, at least 1; n is a multiple of it, and the best n / width are continued."""
    diverse: bool = False
    """Divide the solutions into n / width trees, of each of which the best is continued (DVTS); false: the best of
    all are."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds("", self, width="[1, inf)")
        if self.n % self.width:
            raise ConfigError(
                f"n={self.n} is no multiple of width={self.width}: n / width solutions are continued at each step"
            )

    @property
    def name(self) -> str:
        """See :attr:`~stepkd.search.state.Search.name`."""
        return self.named(f"{'dvts' if self.diverse else 'beam'}@{self.n}x{self.width}", "diverse", "n", "width")

    def run(self, problems: Sequence[Problem], tools: Tools) -> list[list[Found]]:
        """See :meth:`~stepkd.search.state.Search.run`; a finished solution keeps its place while it is among the
        best."""
        keep = self.n // self.width
        trees = keep if self.diverse else 1
        # The trees of all problems in one list, problem by problem; of each the solutions that are continued.
        beams: list[list[Scored]] = [[] for _ in problems for _ in range(trees)]
        traces: list[list[dict[str, Any]]] = [[] for _ in problems]
        for step in range(self.max_steps):
            new = self._proposed(beams, tools) if step else self._first(problems, tools, trees)
            if not any(new):
                break
            scores = iter(tools.scores([state for states in new for state in states], self.reduction))
            for number, states in enumerate(new):
                # A finished solution keeps its place, so that of equal scores the first path is sampling.
                fresh = ((state, next(scores)) for state in states)
                candidates = [
                    each
                    for old in beams[number]
                    for each in ([old] if old[0].end != "step" else islice(fresh, self.width))
                ]
                candidates += fresh  # first steps
                kept = ranked([score for _, score in candidates])[: keep // trees]
                beams[number] = [candidates[i] for i in kept]
                if states:
                    tree = {"tree": number % trees} if self.diverse else {}
                    traces[number // trees].append(event("prune", candidates, step=step, kept=kept, **tree))
        groups = [[each for beam in beams[i : i + trees] for each in beam] for i in range(0, len(beams), trees)]
        return self.chosen(tools, groups, traces)

    def _first(self, problems: Sequence[Problem], tools: Tools, trees: int) -> list[list[State]]:
        """First steps: n of every problem, divided among its trees."""
        share, starts = self.n // trees, [State(problem) for problem in problems]
        drawn = tools.generator.propose(starts, self.n)
        return [
            [start.then(step) for step in steps[i : i + share]]
            for start, steps in zip(starts, drawn, strict=True)
            for i in range(0, self.n, share)
        ]

    def _proposed(self, beams: Sequence[Sequence[Scored]], tools: Tools) -> list[list[State]]:
        """What the unfinished solutions of every tree lead to."""
        going = [[state for state, _ in beam if state.end == "step"] for beam in beams]
        flat = [state for states in going for state in states]
        drawn = iter(tools.generator.propose(flat, self.width) if flat else [])
        return [[state.then(step) for state in states for step in next(drawn)] for states in going]
