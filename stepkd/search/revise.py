"""Verify, then revise: a draft is scored step by step, and what follows its first doubtful step is written anew.

Source: StepCo (Wu et al. 2024, arXiv 2410.12934) and its released code: draft; stop where the whole solution's score
reaches ``theta``; else have the solution rewritten from the first step below it, until a revision is accepted, says the
same as the one before, or there have been ``rounds`` of them. There all answers are sampled (temperature 0.7, top-p
0.95), the model is *asked* to rewrite, a further question draws the answer out of each text, and the last one counts.
What differs here: the answer is what the grader finds; a score that is missing accepts nothing and doubts nothing; and
by default the draft is greedy, and cut before the doubtful step and continued, which needs no model that follows
instructions (a reconstruction for small models). ``draft`` and ``revision`` choose.

Refine and rerank: GLoRe (Havrilla et al. 2024, arXiv 2402.10963): greedy drafts; one global refinement, from question
and draft; one local, from these and a mark at the first incorrect step, which a stepwise reward model places; an
outcome reward model reranks. The paper was read in excerpts and no code is released: how the refiner's prompt is
written, and that a local refinement is what stands behind the mark, are reconstructions. Here one scorer places the
mark and reranks, and one refiner writes both. :mod:`stepkd.labels.refinements` makes what it is trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from stepkd.errors import ConfigError, check_bounds
from stepkd.scorers.scorer import Reduction
from stepkd.search.best_of_n import answered, elected
from stepkd.search.state import Found, Problem, Scored, Search, State, StepGenerator, Tools, Trace

MARK = "[BAD] "
"""Stands before the step at which a local refinement begins."""


@dataclass
class _Work:
    """What there is of one problem."""

    versions: list[State]
    """The draft and its revisions."""
    scores: list[float | None] = field(default_factory=list)
    """Of each, once it was scored."""
    trace: Trace = field(default_factory=list)
    """An event a version."""
    cut: int | None = None
    """The step that the newest version is revised from; None: it is not revised."""
    doubt: float = 0.0
    """Score of that step."""


@dataclass(frozen=True, kw_only=True)
class VerifyRevise(Search):
    """Revises a draft from its first doubtful step on, until a scorer accepts it (StepCo, arXiv 2410.12934); the last
    version is the answer, as in the released code, also where it was cut off."""

    form = "verify_revise@{rounds}"

    theta: float = 0.5
    """Score in [0, 1] from which on a solution is accepted, and below which a step is doubtful; 0 leaves every draft as
    it is, and 0.5 is the released code's threshold."""
    rounds: int = 5
    """Most revisions of a draft, at least 1; 5 is the released code's max_iterations."""
    draft: Literal["greedy", "sampled"] = "greedy"
    """Where it starts: the greedy solution (the default, which is correct most often), or the first of the samples that
    methods share, as in the released code."""
    revision: Literal["resample", "rewrite"] = "resample"
    """How it is revised: cut before the doubtful step and continued by sampling (the default, for which no model needs
    to follow instructions), or written anew by the model, which is shown the draft, the step and its score, as in the
    released code (in other words)."""
    reduction: Reduction | None = None
    """From step scores to the whole solution's: product, min, mean or last (nearest to the released code, which reads
    one score behind the unsplit text); null takes what suits the scorer's meaning."""

    def __post_init__(self) -> None:
        check_bounds("", self, theta="[0, 1]", rounds="[1, inf)")

    def run(self, problems: Sequence[Problem], tools: Tools) -> list[list[Found]]:
        """See :meth:`~stepkd.search.state.Search.run`; behind the answer stand the other versions, oldest first."""
        if self.draft == "sampled":
            drafts = tools.samples(problems, 1)
        else:
            drafts = tools.generator.complete([State(problem) for problem in problems], 1, temperature=0.0)
        works = going = [_Work([state]) for (state,) in drafts]
        for number in range(self.rounds + 1):
            self._verify([work for work in going if len(work.versions) > len(work.scores)], number, tools)
            going = [work for work in going if work.cut is not None]
            if not going or number == self.rounds:
                break
            going = self._revised(going, number + 1, tools)
        return [answered(work.versions, work.scores, len(work.scores) - 1, work.trace) for work in works]

    def _verify(self, works: Sequence[_Work], number: int, tools: Tools) -> None:
        """Score the newest version of each, and decide what becomes of it."""
        judged = tools.judged([work.versions[-1] for work in works], self.reduction)
        votes = tools.votes([work.versions[-2:] for work in works])
        for work, (score, steps), keys in zip(works, judged, votes, strict=True):
            work.scores.append(score)
            work.cut = doubtful(steps, self.theta)
            reasons = {
                "accepted": score is not None and score >= self.theta,
                "agreed": len(keys) == 2 and keys[0] is not None and keys[0] == keys[1],
                "last_round": number == self.rounds,
                "no_doubtful_step": work.cut is None,
            }
            then = next((reason for reason, holds in reasons.items() if holds), self.revision)
            work.cut = work.cut if then == self.revision else None
            event = {"event": "verify", "round": number, "score": score, "then": then}
            if work.cut is not None:
                event["step"], work.doubt = work.cut, steps[work.cut] or 0.0
            work.trace.append(event | {"steps": list(work.versions[-1].steps), "scores": list(steps)})

    def _revised(self, works: Sequence[_Work], number: int, tools: Tools) -> list[_Work]:
        """Add a version to each, numbered so that its noise is new, unless the model wrote nothing; returns those whose
        prompt had room for one."""
        starts: list[tuple[_Work, State]] = []
        for work in works:
            state, cut = work.versions[-1], work.cut
            assert cut is not None
            start: State | None = state.first(cut, number)
            if self.revision == "rewrite":
                prompt = rewrite_prompt(state.problem.row["prompt"], state.steps, cut, work.doubt)
                problem = tools.writer().asked(state.problem, prompt)
                start = None if problem is None else State(problem, path=(number,))
            if start is None:
                tools.costs[state.problem.index]["no_room"] += 1
                work.trace.append({"event": "no_room", "round": number})
            else:
                starts.append((work, start))
        if starts:
            drawn = tools.generator.complete([start for _, start in starts], 1)
            for (work, start), (state,) in zip(starts, drawn, strict=True):
                if state.text[len(start.text) :].strip():
                    work.versions.append(replace(state, problem=work.versions[0].problem))
                else:
                    work.trace.append({"event": "nothing_written", "round": number})
        return [work for work, _ in starts]


def doubtful(scores: Sequence[float | None], theta: float) -> int | None:
    """The first step with a score below ``theta``; None: no step has one."""
    return next((step for step, score in enumerate(scores) if score is not None and score < theta), None)


def rewrite_prompt(prompt: Any, steps: Sequence[str], step: int, score: float) -> Any:
    """A problem with a draft of its solution, the step that is in doubt, and the request to write it anew from there.

    Args:
        prompt: the problem's, text or chat messages.
        steps: texts of the draft's steps, separators included.
        step: number of the doubtful one, from 0.
        score: its score, in [0, 1].
    """
    numbered = "\n".join(f"({number}) {text.strip()}" for number, text in enumerate(steps, start=1) if text.strip())
    return with_draft(
        prompt,
        f"Here is a draft of the solution with numbered steps:\n{numbered}\n\nA verifier gives step ({step + 1}) a "
        f"probability of {score:.0%} of being correct. Keep the steps before step ({step + 1}), carefully redo this "
        "step and all later ones, and write out the whole solution without the numbers.",
    )


def with_draft(prompt: Any, text: str) -> Any:
    """A prompt with more text behind the problem: of chat messages, in the last one.

    Args:
        prompt: text or chat messages.
        text: what to add, as a paragraph.
    """
    if isinstance(prompt, str):
        return f"{prompt.rstrip()}\n\n{text}\n"
    last = prompt[-1]
    return [*prompt[:-1], dict(last) | {"content": with_draft(last["content"], text).rstrip()}]


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
        starts, writer = [State(problem) for problem in problems], tools.writer(self.refiner)
        drafts = [draft for (draft,) in tools.generator.complete(starts, 1, temperature=0.0)]
        judged = tools.judged(drafts, self.reduction)
        cuts = [doubtful(steps, self.theta) for _, steps in judged]
        asked: list[tuple[int, str, State, State]] = []  # of which problem, kind, what is kept of the draft, the start
        for number, (draft, cut) in enumerate(zip(drafts, cuts, strict=True)):
            for kind, at in [("global", None), *([] if cut is None else [("local", cut)])]:
                problem = writer.asked(draft.problem, refine_prompt(draft.problem.row["prompt"], draft.steps, at))
                if problem is None:
                    tools.costs[draft.problem.index]["no_room"] += 1
                else:
                    asked.append((number, kind, draft.first(at or 0), State(problem)))
        drawn = writer.complete([start for *_, start in asked], 1, temperature=0.0) if asked else []
        # A refiner that writes nothing has refined nothing.
        done = [(*each[:3], rest) for each, (rest,) in zip(asked, drawn, strict=True) if rest.text.strip()]
        refined = [_joined(kept, rest, writer) for _, _, kept, rest in done]
        groups: list[list[Scored]] = [[(draft, score)] for draft, (score, _) in zip(drafts, judged, strict=True)]
        traces: list[Trace] = []
        for draft, (_, steps), cut in zip(drafts, judged, cuts, strict=True):
            refine: dict[str, Any] = {"event": "refine", "kinds": ["draft"], "steps": [draft.text]}
            traces.append([{"event": "verify", "steps": [*draft.steps], "scores": [*steps]}, refine])
            refine |= {} if cut is None else {"step": cut}
        for (number, kind, *_), state, score in zip(done, refined, tools.scores(refined, self.reduction), strict=True):
            groups[number].append((state, score))
            traces[number][1]["kinds"].append(kind)
            traces[number][1]["steps"].append(state.text)
        return elected(tools, groups, traces, "max")


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


def _joined(kept: State, rest: State, writer: StepGenerator) -> State:
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
