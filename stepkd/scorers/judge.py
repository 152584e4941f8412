"""A language model asked, step by step, whether the step is correct: the baseline that needs no training.

The score is P(yes) / (P(yes) + P(no)) of the next token, as in P(True) (Kadavath et al. 2022, arXiv 2207.05221) and in
KG-RAR's prompted reward model. The wording of the question is ours.

The text of step k+1's question goes on where the text of step k ended, so a solution is read once; every question is a
short continuation that sees the solution up to its step. vLLM is asked in two rounds: about the last step of every
solution, then about those before it, whose beginnings its prefix cache holds by then. Labelled steps of other problems
(:mod:`stepkd.scorers.examples`) are other ones for every step, so they stand in the question, behind the solution:
they make questions longer, and the solution is still read once. Other samples of the problem stand before the
solution, the same for all solutions of a problem, and are read once with it.

Axes: B rows, T padded length, S questions, H hidden size.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stepkd.data.completion import Completion, Numbers
from stepkd.data.templates import PromptTemplate
from stepkd.errors import ConfigError, DataError
from stepkd.losses.prm import label_token_logps
from stepkd.models.head import evaluation_mode
from stepkd.models.policy import Policy
from stepkd.sampling.branches import gap_limit
from stepkd.sampling.decode import Decoder
from stepkd.sampling.engine import Engine
from stepkd.sampling.transformers_engine import TransformersEngine
from stepkd.scorers.examples import Ideas, StepExamples, problem_text
from stepkd.scorers.prm import Ids, Item, PolicyScorer, continue_rows, packed
from stepkd.scorers.scorer import Meaning, Row, Solutions
from stepkd.steps.format import check_steps, marker_token_id

JUDGE_TEMPLATE = PromptTemplate(plain="{prompt}\nAnswer:")
"""Chat style asks as a user; plain style ends where the answer begins."""
QUESTION = "Is step {step} right, given the problem and the steps before it? Answer Yes or No."
WHOLE_QUESTION = "Is this solution, as far as it goes, on the way to the correct answer? Answer Yes or No."
TRUE_QUESTION = "Is this solution correct? Answer Yes or No."
EXAMPLES = "Steps of other problems:\n\n"
EXAMPLE = "Problem: {problem}\nStep: {step}\nIs the step right? {answer}\n\n"
BRAINSTORMED = "Here are some brainstormed ideas:"
USUAL = (("Yes", "No"), (" Yes", " No"), ("yes", "no"), (" yes", " no"))
"""Forms of yes and no."""
_PLACE = "<<<the steps go here>>>"


class PromptedJudge(PolicyScorer):
    """Scores steps by asking a language model about each.

    Args:
        policy: the model, any causal language model; in evaluation mode while it judges.
        template: how the question is put: the text built from problem and steps is the template's ``{prompt}``.
        question: asked behind the steps; must hold ``{step}``, the step's number from 1, unless it is about the whole;
            None: a usual one.
        answers: pairs of a yes and a no, one token each, whose probabilities are added up; none: the usual ones.
        reference: show the row's ``solution`` (else its ``answer``) to the model.
        whole: ask once, about all steps; the last one's score is then P(yes) among all tokens, as in the released code
            of MCTS-DPO (arXiv 2405.00451), and those before it have none. With ``ideas`` it is P(True): whether the
            solution is correct, yes against no.
        ideas: samples, of which the first of the problem are shown before the solution, as many as half of the text has
            room for.
        examples: labelled steps, of which the nearest ones are shown with every question, as far as the text has room.
        engine: holds the policy's model and reads in place of this process; None: this process reads.
        **reading: settings of :class:`~stepkd.scorers.prm.PolicyScorer`. Without ``shared_prefix`` problem and solution
            are read again for every step (the same scores), and so it is done where the model's attention does not
            allow the other (a sliding window that is too short).

    Raises:
        ConfigError: a form that is not one token, no usable pair of forms, a question without ``{step}``, or a number
            out of range.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        template: str | PromptTemplate = JUDGE_TEMPLATE,
        question: str | None = None,
        answers: Sequence[tuple[str, str]] = (),
        reference: bool = False,
        whole: bool = False,
        ideas: Ideas | None = None,
        examples: StepExamples | None = None,
        engine: Engine | None = None,
        **reading: Any,
    ) -> None:
        super().__init__(policy, template, **reading)
        self.engine = engine or TransformersEngine(policy, max_rows=self.max_rows)
        self.shared_prefix &= isinstance(self.engine, TransformersEngine)  # an engine elsewhere has its own cache
        self.max_length = min(self.max_length, self.engine.scored_length or self.max_length)
        self.whole = whole
        self.meaning: Meaning = "outcome" if whole else "correctness"
        self.among_all = whole and ideas is None
        self.question = question or (WHOLE_QUESTION if self.among_all else TRUE_QUESTION if whole else QUESTION)
        if not whole and self.question.count("{step}") != 1:
            raise ConfigError(f"the judge's question must hold {{step}} once, found {question!r}")
        self.yes_ids, self.no_ids = answer_ids(policy.tokenizer, answers)
        self.reference = reference
        self.ideas, self.examples = ideas, examples
        self._words = [form.strip() for form in (*answers, *USUAL)[0]]

    @torch.no_grad()
    def score(self, problems: Sequence[Solutions]) -> list[list[list[float]]]:
        """Score every step; see :class:`~stepkd.scorers.scorer.StepScorer`.

        Raises:
            DataError: no prompt, a solution without steps, an empty step, or no reference to show.
            ModelError: the model's probabilities are not numbers.
        """
        cases = [[self._case(problem, steps) for steps in problem.solutions] for problem in problems]
        groups = [[case for case in group if case.places] for group in cases]
        groups = sorted((group for group in groups if group), key=lambda group: -len(group[0].head))
        if self.shared_prefix:
            self._in_process(groups)
        else:
            self._apart([case for group in groups for case in group])
        return [[case.scores for case in group] for group in cases]

    def provenance(self) -> dict[str, Any]:
        """See :class:`~stepkd.scorers.scorer.StepScorer`."""
        forms = {"yes": list(self.yes_ids), "no": list(self.no_ids)}
        engine = {"name": type(self.engine).__name__, **self.engine.facts()}
        asked = {"scorer": "judge", "question": self.question, "reference": self.reference, "answer_ids": forms}
        asked |= {"whole": True} if self.whole else {}
        asked |= {} if self.ideas is None else {"ideas": self.ideas.provenance()}
        asked |= {} if self.examples is None else {"examples": self.examples.provenance()}
        return asked | {"engine": engine} | super().provenance()

    def _case(self, problem: Solutions, steps: Sequence[str]) -> Item:
        name = str(problem.row.get("id", "?"))
        check_steps(steps, name)
        head, behind = self._head(problem.row, name)
        leads = self._examples(problem.row, steps)
        ids: Ids = ()
        places: list[tuple[int, int, Ids]] = []
        for k, step in enumerate(steps, start=1):
            longer = ids + self._ids(f"{_numbered(step.strip(), k)}\n")
            room = self.max_length - len(head) - len(longer) - self.among_all  # _said scores one token more
            asked = (f"\n{shown}{self.question.replace('{step}', str(k))}{behind}" for shown in leads[k - 1])
            question = next((each for each in map(self._ids, asked) if len(each) <= room), None)
            if question is None:
                break
            ids = longer
            places.append((k - 1, len(head) + len(ids), question))
        if self.whole:
            places = [place for place in places if place[0] == len(steps) - 1]
        return Item(name, head, ids, tuple(places), [math.nan] * len(steps))

    def _head(self, row: Row, name: str) -> tuple[Ids, str]:
        """Ids of what stands before the steps, and the text behind a question."""
        ideas = [] if self.ideas is None else self.ideas.of(row)
        while True:
            text = self.template.render({**row, "prompt": self._text(row, name, ideas)}, self.tokenizer)
            before, _, behind = text.partition(_PLACE)
            head = self._head_ids(before)
            if not ideas or len(head) <= self.max_length // 2:
                return head, behind
            ideas.pop()

    def _text(self, row: Row, name: str, ideas: Sequence[str]) -> str:
        """Problem, reference and ideas, with a place for the steps."""
        prompt = problem_text(row)
        if not prompt:
            raise DataError("the row has no problem to show to the judge", path=name, column="prompt")
        shown = ""
        if self.reference:
            known = [(what, row[what]) for what in ("solution", "answer") if row.get(what)]
            if not known:
                raise DataError(
                    "the judge was asked to show a reference, and the row has neither 'solution' nor 'answer'",
                    path=name,
                )
            shown = f"Reference {known[0][0]}:\n{str(known[0][1]).strip()}\n\n"
        shown += "\n\n".join([BRAINSTORMED, *ideas, ""]) if ideas else ""
        return f"Problem:\n{prompt}\n\n{shown}Solution:\n{_PLACE}"

    def _examples(self, row: Row, steps: Sequence[str]) -> list[tuple[str, ...]]:
        """For every step what may stand before its question, the best first."""
        if self.examples is None:
            return [("",)] * len(steps)
        leads: list[tuple[str, ...]] = []
        for found in self.examples.nearest(row, steps):
            shown = [
                EXAMPLE.format(problem=each.problem, step=each.step, answer=self._words[not each.correct])
                for each in found
            ]
            leads.append(("".join([EXAMPLES, *shown]), "") if shown else ("",))
        return leads

    def _ids(self, text: str) -> Ids:
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _head_ids(self, text: str) -> Ids:
        own = self._ids(text)
        if not self.template.adds_special_tokens(self.tokenizer):
            return own
        whole = tuple(self.tokenizer(text, add_special_tokens=True)["input_ids"])
        lead = next((n for n in range(len(whole)) if whole[n : n + len(own)] == own), 0)
        return whole[:lead] + own  # what some tokenizers put behind every text is left out

    def _in_process(self, groups: list[list[Item]]) -> None:
        """Blocks of groups, each read once where the model's attention allows it."""
        decoder = Decoder(self.policy, max_rows=self.max_rows)
        with evaluation_mode(self.policy):
            gaps = gap_limit(decoder)
            for block in packed([len(group) for group in groups], self.max_rows):
                chosen = [groups[g] for g in block]
                if _width([case for group in chosen for case in group]) <= gaps:
                    self._shared(decoder, chosen)
                else:
                    self._apart([case for group in chosen for case in group])

    def _shared(self, decoder: Decoder, groups: list[list[Item]]) -> None:
        """Heads once, solutions once behind them, then every question on a copy of its solution's cache."""
        for cases, solved in self._continued(decoder, groups):
            asked = [(b, *place) for b, case in enumerate(cases) for place in case.places]
            for first in range(0, len(asked), self.max_rows):
                owners, steps, cuts, questions = zip(*asked[first : first + self.max_rows], strict=True)
                hidden_BTH = continue_rows(decoder, solved, owners, questions, cuts=cuts).hidden_PTH
                last_B = torch.tensor([len(row) - 1 for row in questions], device=hidden_BTH.device)
                hidden_SH = hidden_BTH[torch.arange(len(questions), device=hidden_BTH.device), last_B]
                answers = [*self.no_ids, *self.yes_ids]
                logps_SC = label_token_logps(self.policy.head, hidden_SH, answers, restricted=not self.among_all)
                self._answer([cases[b] for b in owners], steps, logps_SC)

    def _apart(self, cases: list[Item]) -> None:
        """Every question with all before it."""
        rows = [(case, *place) for case in cases for place in case.places]
        answers = [*self.no_ids, *self.yes_ids]
        for whole in (True, False):
            part = [row for row in rows if (row[1] == row[0].places[-1][0]) is whole]
            texts = [(case.head + case.ids)[:cut] + question for case, _, cut, question in part]
            logps_SC = self._said(texts) if self.among_all else self.engine.choice_logps(texts, answers)
            self._answer([row[0] for row in part], [row[1] for row in part], torch.from_numpy(logps_SC))

    def _said(self, texts: Sequence[Ids]) -> Numbers:
        """(S, C) log-probabilities of the answers among all tokens; those of no are not asked for."""
        scores = self.engine.score(
            [Completion(np.array(text), np.array([yes])) for text in texts for yes in self.yes_ids]
        )
        logps_SY = np.array([each.logps_T[0] for each in scores]).reshape(len(texts), len(self.yes_ids))
        return np.concatenate([np.full((len(texts), len(self.no_ids)), -np.inf), logps_SY], axis=1)

    def _answer(self, cases: Sequence[Item], steps: Sequence[int], logps_SC: Tensor) -> None:
        """Give each row's step P(yes) against P(no)."""
        yes_S = logps_SC[:, len(self.no_ids) :].double().exp().sum(-1)
        scores = self._scores(yes_S, [case.name for case in cases])
        for case, step, score in zip(cases, steps, scores, strict=True):
            case.scores[step] = score


def answer_ids(tokenizer: Any, answers: Sequence[tuple[str, str]] = ()) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Token ids of the answers.

    Args:
        tokenizer: the model's.
        answers: pairs of a yes and a no, one token each; none: those of :data:`USUAL` that are, so that neither answer
            has more forms than the other.

    Returns:
        Ids of yes and of no, without repetitions.

    Raises:
        ConfigError: a given form is not one token, one is both, or no usual pair is left.
    """
    pairs: list[tuple[int, ...]] = []
    for pair in answers or USUAL:
        try:
            pairs.append(tuple(marker_token_id(tokenizer, form) for form in pair))
        except ConfigError as error:
            if answers:
                raise ConfigError(f"an answer of the judge must be one token: {error}") from None
    if not pairs:
        raise ConfigError(
            f"this tokenizer has none of the pairs {USUAL} as single tokens, so the model cannot be asked for a yes or "
            "a no in one token: give answers that it has, or another model"
        )
    yes_ids, no_ids = (tuple(dict.fromkeys(ids)) for ids in zip(*pairs, strict=True))
    if set(yes_ids) & set(no_ids):
        raise ConfigError(f"yes and no share a token of this tokenizer: {answers or USUAL}")
    return yes_ids, no_ids


def _numbered(step: str, number: int) -> str:
    """The step with its number in front, unless it says it itself."""
    return step if re.match(rf"(?i)step {number}\b", step) else f"Step {number}: {step}"


def _width(cases: list[Item]) -> int:
    """Cached positions of a block and its longest question, padding included."""
    asked = max(len(question) for case in cases for _, _, question in case.places)
    return max(len(case.head) for case in cases) + max(len(case.ids) for case in cases) + asked
