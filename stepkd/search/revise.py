"""Verify, then revise: a draft is scored step by step, and what follows its first doubtful step is written anew.

Source: StepCo (Wu et al. 2024, arXiv 2410.12934) and its released code: draft; stop where the whole solution's score
reaches ``theta``; else have the solution rewritten from the first step below it, until a revision is accepted, says the
same as the one before, or there have been ``rounds`` of them. There all answers are sampled (temperature 0.7, top-p
0.95), the model is *asked* to rewrite, a further question draws the answer out of each text, and the last one counts.
What differs here: the answer is what the grader finds; a score that is missing accepts nothing and doubts nothing; and
by default the draft is greedy, and cut before the doubtful step and continued, which needs no model that follows
instructions (a reconstruction for small models). ``draft``, ``revision`` and ``answer`` choose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from stepkd.errors import check_bounds
from stepkd.scorers.scorer import Reduction
from stepkd.search.best_of_n import answered, eligible
from stepkd.search.state import Found, Problem, Search, State, Tools, doubtful, ranked


@dataclass
class _Work:
    """What there is of one problem."""

    versions: list[State]
    """The draft and its revisions."""
    scores: list[float | None] = field(default_factory=list)
    """Of each, once it was scored."""
    trace: list[dict[str, Any]] = field(default_factory=list)
    """An event a version."""
    cut: int | None = None
    """The step that the newest version is revised from; None: it is not revised."""
    doubt: float = 0.0
    """Score of that step."""


@dataclass(frozen=True, kw_only=True)
class VerifyRevise(Search):
    """Revises a draft from its first doubtful step on, until a scorer accepts it (StepCo, arXiv 2410.12934)."""

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
    answer: Literal["last", "best"] = "last"
    """Which version is the answer: the last one, as in the released code, also where it was cut
    off (it then cannot say the same as the one before, and all rounds are used up), or the one with the highest score
    among those that are whole."""
    reduction: Reduction | None = None
    """From step scores to the whole solution's: product, min, mean or last (nearest to the released code, which reads
    one score behind the unsplit text); null takes what suits the scorer's meaning."""

    def __post_init__(self) -> None:
        check_bounds("", self, theta="[0, 1]", rounds="[1, inf)")

    @property
    def name(self) -> str:
        """See :attr:`~stepkd.search.state.Search.name`."""
        return self.named(f"verify_revise@{self.rounds}", "rounds")

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
        return [self._found(work) for work in works]

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
            event = {"event": "verify", "round": number, "score": score, "then": then}
            if then == self.revision:
                assert work.cut is not None
                event["step"], work.doubt = work.cut, steps[work.cut] or 0.0
            else:
                work.cut = None
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

    def _found(self, work: _Work) -> list[Found]:
        may = eligible(work.versions) if self.answer == "best" else [len(work.versions) - 1]
        winner = may[ranked([work.scores[i] for i in may])[0]]
        return answered(work.versions, work.scores, winner, work.trace)


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
