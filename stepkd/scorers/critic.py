"""A generative verifier: a language model that writes a critique before each verdict, several times over, and votes.

With a verdict per step a score is the share of the critiques that call the step correct. With ProcessBench's form
(arXiv 2412.06559), whose verdict is the index of the first incorrect step, a score is that share among the critiques
that come as far as the step, so that the product of a solution's scores is the share that finds nothing incorrect; a
step to which none comes has 0. Critiques without a verdict have no vote; a step without any vote has no score.

Ties: a step that half of the votes call correct is correct (:mod:`stepkd.steps.labels`); of indices that are named
equally often the one that was named first is the prediction, as in ProcessBench's code, which counts what is boxed as
text: a verdict that is not an index is counted, too, and if it wins the vote there is no prediction.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from stepkd.data.completion import Completion
from stepkd.data.encode import Encoder
from stepkd.data.templates import PromptTemplate
from stepkd.models.policy import Policy
from stepkd.sampling.engine import Engine, SamplingConfig
from stepkd.sampling.transformers_engine import TransformersEngine
from stepkd.scorers.calibration import scaled
from stepkd.scorers.critiques import CritiqueForm, get_form
from stepkd.scorers.prm import NO_LIMIT, PolicyScorer
from stepkd.scorers.scorer import Judged, Meaning, Solutions
from stepkd.steps.labels import first_incorrect
from stepkd.steps.segment import WholeSegmenter

CRITIC_TEMPLATE = PromptTemplate()
"""The request alone, in chat style where the model has one."""


class GenerativeVerifier(PolicyScorer):
    """Scores steps by the verdicts of critiques.

    Args:
        policy: the model, any causal language model.
        form: what is asked: ``step``, ``processbench``, ``task``, a YAML file, or the form itself.
        sampling: how critiques are drawn; ``n`` is the number of votes.
        template: how the request is put.
        engine: holds the policy's model and draws; None: this process does.
        **reading: settings of :class:`~stepkd.scorers.prm.PolicyScorer`; a request that leaves no room for a token of
            the critique is not made.

    Raises:
        ConfigError: no such form, or a number out of range.
    """

    meaning: Meaning = "correctness"

    def __init__(
        self,
        policy: Policy,
        *,
        form: str | CritiqueForm = "step",
        sampling: SamplingConfig,
        template: str | PromptTemplate = CRITIC_TEMPLATE,
        engine: Engine | None = None,
        **reading: Any,
    ) -> None:
        super().__init__(policy, template, **reading)
        self.engine = engine or TransformersEngine(policy, max_rows=self.max_rows)
        self.max_length = min(self.max_length, self.engine.max_length or self.max_length)
        self.form = get_form(form) if isinstance(form, str) else form
        self.sampling = sampling
        self._encoder = Encoder(self.tokenizer, self.template, WholeSegmenter(), max_length=NO_LIMIT)

    @torch.no_grad()
    def score(self, problems: Sequence[Solutions]) -> list[list[list[float]]]:
        """Score every step; see :class:`~stepkd.scorers.scorer.StepScorer`.

        The noise of a critique is keyed by its request, so that a score depends on nothing else that is scored. What
        several solutions ask alike is asked once; the facts of each count what its critiques cost, shared or not.

        Returns:
            :class:`~stepkd.scorers.scorer.Judged` scores: ``facts`` has the form's id, the ``critiques`` (step, text,
            verdict, tokens, finish), those ``without_verdict``, and the ``generated_tokens`` and ``prefill_tokens`` of
            all of them.

        Raises:
            DataError: no problem, a solution without steps, or an empty step.
        """
        solutions = [(problem.row, steps) for problem in problems for steps in problem.solutions]
        asked = [
            (number, step, self._encoder.prompt_example({**row, "prompt": request}))
            for number, (row, steps) in enumerate(solutions)
            for step, request in self.form.questions(row, steps)
        ]
        asked = [each for each in asked if each[2].length < self.max_length]
        distinct = {prompt.key: prompt for *_, prompt in asked}
        drawn = self.engine.generate(
            [prompt.prompt_ids for prompt in distinct.values()],
            self.sampling,
            purpose="critique",
            indices=[(key.hex(),) for key in distinct],
            limits=[self.max_length - prompt.length for prompt in distinct.values()],
        )
        written = dict(zip(distinct, drawn, strict=True))
        found: list[list[tuple[int | None, Completion]]] = [[] for _ in solutions]
        for number, step, prompt in asked:
            found[number] += [(step, each) for each in written[prompt.key]]
        judged = (self._judged(len(steps), each) for (_, steps), each in zip(solutions, found, strict=True))
        return [[next(judged) for _ in problem.solutions] for problem in problems]

    def provenance(self) -> dict[str, Any]:
        """See :class:`~stepkd.scorers.scorer.StepScorer`."""
        engine = {"name": type(self.engine).__name__, **self.engine.facts()}
        asked = {"scorer": "critic", "form": asdict(self.form), "sampling": asdict(self.sampling)}
        return asked | {"engine": engine} | super().provenance()

    def _judged(self, steps: int, critiques: Sequence[tuple[int | None, Completion]]) -> Judged:
        """Scores, prediction and facts of one solution."""
        verdicts = [self.form.read(each.text) for _, each in critiques]
        votes: list[list[bool]] = [[] for _ in range(steps)]
        for (step, _), meaning in zip(critiques, map(self.form.meaning, verdicts), strict=True):
            if step is not None and meaning is not None:
                votes[step].append(bool(meaning))
            elif meaning is not None and -1 <= meaning < steps:
                for k in range(steps if meaning == -1 else meaning + 1):
                    votes[k].append(k != meaning)
        without_votes = math.nan if self.form.words or not any(votes) else 0.0
        scores = [sum(each) / len(each) if each else without_votes for each in votes]
        if self.form.words:
            prediction = first_incorrect([None if math.isnan(score) else score for score in scores])
        else:
            named = Counter(each for each in verdicts if each is not None).most_common(1)
            index = self.form.meaning(named[0][0]) if named else None
            prediction = index if index is not None and -1 <= index < steps else None
        facts = {
            "form": self.form.id,
            "critiques": [
                {"step": step, "text": one.text, "verdict": verdict, "tokens": len(one.token_ids), "finish": one.finish}
                for (step, one), verdict in zip(critiques, verdicts, strict=True)
            ],
            "without_verdict": sum(self.form.meaning(each) is None for each in verdicts),
            "generated_tokens": sum(len(each.token_ids) for _, each in critiques),
            "prefill_tokens": sum(len(each.prompt_ids) for _, each in critiques[:: self.sampling.n]),
        }
        if self.temperature is not None:
            scores = scaled(scores, self.temperature).tolist()
        return Judged(scores, facts=facts, prediction=prediction)
