"""Refine and rerank: a trained refiner writes a draft anew, as a whole and from its first doubtful step on, and a
scorer picks one of the three.

Source: GLoRe (Havrilla et al. 2024, arXiv 2402.10963): greedy drafts; one global refinement, from question and draft;
one local, from these and a mark at the first incorrect step, which a stepwise reward model places; an outcome reward
model reranks. The paper was read in excerpts and no code is released: how the refiner's prompt is written, and that a
local refinement is what stands behind the mark, are reconstructions. Here one scorer places the mark and reranks, and
one refiner writes both. :mod:`stepkd.labels.refinements` makes what it is trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from stepkd.errors import ConfigError, check_bounds
from stepkd.scorers.scorer import Reduction
from stepkd.search.best_of_n import answered, eligible
from stepkd.search.revise import with_draft
from stepkd.search.state import Found, Problem, Search, State, Tools, Writer, doubtful, ranked

MARK = "[BAD] "
"""Stands before the step at which a local refinement begins."""


@dataclass(frozen=True)
class _Asked:
    """A refinement that was asked for."""

    number: int
    """Of the problem."""
    kept: State
    """What stays of the draft: nothing, of a global one."""
    start: State
    """What the refiner continues."""
    kind: str
    """``global`` or ``local``."""


@dataclass(frozen=True, kw_only=True)
class Refine(Search):
    """Draft, global and local refinement of it by a trained refiner; the scorer takes one (GLoRe, arXiv 2402.10963)."""

    refiner: str
    """Model trained on rows of ``stepkd convert --to Refinements``, with the policy's tokenizer: a run, a checkpoint, a
    model folder or a hub id."""
    theta: float = 0.5
    """Score in [0, 1] below which a step is doubtful; the first such step is where the local refinement begins, and
    where there is none (always with 0) there is no local refinement."""
    reduction: Reduction | None = None
    """From step scores to the one that ranks: product, min, mean or last; null takes what suits the scorer's
    meaning."""

    def __post_init__(self) -> None:
        check_bounds("", self, theta="[0, 1]")
        if not self.refiner:
            raise ConfigError("refiner is empty: name the model that was trained on refinements")

    @property
    def models(self) -> tuple[str, ...]:
        """See :attr:`~stepkd.search.state.Search.models`."""
        return (self.refiner,)

    def run(self, problems: Sequence[Problem], tools: Tools) -> list[list[Found]]:
        """See :meth:`~stepkd.search.state.Search.run`; drafts and refinements are greedy."""
        drafts = tools.generator.complete([State(problem) for problem in problems], 1, temperature=0.0)
        judged = tools.judged([state for (state,) in drafts], self.reduction)
        cuts = [doubtful(steps, self.theta) for _, steps in judged]
        asked = self._asked([state for (state,) in drafts], cuts, tools)
        writer = tools.writer(self.refiner)
        drawn = writer.complete([each.start for each in asked], 1, temperature=0.0) if asked else []
        refined = [_joined(each.kept, rest, writer) for each, (rest,) in zip(asked, drawn, strict=True)]
        scores = tools.scores(refined, self.reduction)
        results = []
        for number, ((draft,), (score, steps)) in enumerate(zip(drafts, judged, strict=True)):
            # A refiner that writes nothing has refined nothing.
            own = [i for i, each in enumerate(asked) if each.number == number and drawn[i][0].text.strip()]
            states, own_scores = [draft, *(refined[i] for i in own)], [score, *(scores[i] for i in own)]
            may = eligible(states)
            winner = may[ranked([own_scores[i] for i in may])[0]]
            event: dict[str, Any] = {"event": "refine", "kinds": ["draft", *(asked[i].kind for i in own)]}
            event |= {"step": cuts[number]} if cuts[number] is not None else {}
            event |= {"steps": [state.text for state in states], "scores": own_scores, "kept": [winner]}
            trace = [{"event": "verify", "steps": list(draft.steps), "scores": list(steps)}, event]
            results.append(answered(states, own_scores, winner, trace))
        return results

    def _asked(self, drafts: Sequence[State], cuts: Sequence[int | None], tools: Tools) -> list[_Asked]:
        """A global refinement of every draft, a local one where a step is doubtful; those without room are counted."""
        writer, asked = tools.writer(self.refiner), []
        for number, (draft, cut) in enumerate(zip(drafts, cuts, strict=True)):
            for kind, at in (("global", None), ("local", cut)):
                if kind == "local" and at is None:
                    continue
                problem = writer.asked(draft.problem, refine_prompt(draft.problem.row["prompt"], draft.steps, at))
                if problem is None:
                    tools.costs[draft.problem.index]["no_room"] += 1
                else:
                    asked.append(_Asked(number, draft.first(at or 0), State(problem), kind))
        return asked


def refine_prompt(prompt: Any, steps: Sequence[str], step: int | None) -> Any:
    """What a refiner reads: the problem and a draft, with :data:`MARK` before the step from which on it is to be
    written anew.

    Args:
        prompt: the problem's, text or chat messages.
        steps: texts of the draft's steps, separators included.
        step: number of the marked one, from 0; None: no mark, and the whole solution is to be written.
    """
    marked = [MARK * (number == step) + text for number, text in enumerate(steps)]
    return with_draft(prompt, "Draft:\n" + "".join(marked).rstrip())


def _joined(kept: State, rest: State, writer: Writer) -> State:
    """What was kept of a draft, and what the refiner wrote behind it, which had the longest solution to itself: the
    steps that end beyond that are cut off."""
    start = len(kept.token_ids)
    whole = replace(
        kept,
        steps=(*kept.steps, *rest.steps),
        token_ids=(*kept.token_ids, *rest.token_ids),
        path=(*kept.path, *rest.path),
        step_ends=(*kept.step_ends, *(start + end for end in rest.step_ends)),
        end=rest.end,
    )
    if (room := writer.room(whole)) is None or room >= 0:
        return whole
    most = len(whole.token_ids) + room
    return replace(whole.first(sum(end <= most for end in whole.step_ends)), end="length")
