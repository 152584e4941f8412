"""Preference pairs by tree search: one tree per problem, a pair at every depth of its chosen path.

Source: Xie et al. 2024, arXiv 2405.00451. The search itself is :mod:`stepkd.search`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from stepkd.data.completion import Completion
from stepkd.data.encode import with_end
from stepkd.data.templates import PromptTemplate
from stepkd.labels.labellers import A_SOLUTION, A_TASK, PROBLEM_COLUMNS
from stepkd.labels.settings import StepScore, TreePairConfig
from stepkd.labels.workbench import Workbench, pair_record
from stepkd.models.policy import Policy
from stepkd.runs.job import Job
from stepkd.sampling.engine import Engine
from stepkd.sampling.transformers_engine import encode_prompts, fixed_batches
from stepkd.scorers.rules import Checker
from stepkd.scorers.scorer import StepScorer
from stepkd.search.generate import SampledSteps
from stepkd.search.mcts import Reference, tree_search
from stepkd.search.state import Problem, State, Step
from stepkd.search.tree import SearchTree, tree_pairs
from stepkd.steps.text import tokenize_text


@dataclass(frozen=True, eq=False)
class GoldSteps:
    """Steps of problems' reference solutions, with what the policy thinks of them."""

    generator: SampledSteps
    """Its engine scores them, its segmenter cuts them."""
    template: PromptTemplate
    """Has the token that ends a solution."""

    def __call__(self, states: Sequence[State]) -> list[list[Step]]:
        """What follows in the ``solution`` of each state's problem, to its end.

        Args:
            states: unfinished solutions.

        Returns:
            For each its steps; none where the state does not say the solution's beginning up to the end of a token
            (leading white space apart), where there is no room for the rest, or in a solution that :meth:`is_cut`.
        """
        rests = [self._rest(state) for state in states]
        asked = [
            Completion(np.array((*state.problem.prompt_ids, *state.token_ids)), np.array(rest))
            for state, rest in zip(states, rests, strict=True)
            if rest
        ]
        scores = iter(self.generator.engine.score(asked) if asked else [])
        return [
            self.generator.steps(state, rest, next(scores).logps_T.tolist(), "stop") if rest else []
            for state, rest in zip(states, rests, strict=True)
        ]

    def is_cut(self, problem: Problem) -> bool:
        """Whether the solution holds a string that ends a sampled one, so that the policy cannot write it."""
        solution = str(problem.row["solution"])
        return self.generator.sampling.before_stop(solution) != solution

    def _rest(self, state: State) -> tuple[int, ...]:
        if self.is_cut(state.problem):
            return ()
        tokenizer = self.generator.policy.tokenizer
        whole = with_end(tokenize_text(tokenizer, str(state.problem.row["solution"])), self.template, tokenizer)
        gold, said = whole.text.lstrip(), state.text.lstrip()
        chars = len(whole.text) - len(gold) + len(said) if said else 0
        start, room = whole.token_end(chars), self.generator.room(state)
        at_a_token = not start or whole.char_ends[start - 1] == chars
        fits = room is None or len(whole) - start <= room
        return whole.token_ids[start:] if gold.startswith(said) and at_a_token and fits else ()


class TreePairBuilder:
    """Searches a tree for each problem of a group, and takes pairs from it; an item is a problem. What can be checked
    before the work begins is checked when it is made.

    Args:
        config: the job's settings.
        job: keeps what is measured.
        policy, engine, scorer: already made ones to use in place of those that ``config`` describes.

    Raises:
        ConfigError, DataError, ModelError: settings, data or models that cannot be used.
    """

    def __init__(
        self,
        config: TreePairConfig,
        job: Job,
        *,
        policy: Policy | None = None,
        engine: Engine | None = None,
        scorer: StepScorer | None = None,
    ) -> None:
        exact = isinstance(config.value, StepScore) and config.value.scorer in ("checker", Checker())
        needs = (A_TASK,) * exact + (A_SOLUTION,) * config.search.gold_steps
        self.config = config
        self.bench = bench = Workbench(
            config, config.problems, config.model, needs, problems=True, job=job, policy=policy
        )
        self.generator = SampledSteps(
            engine or bench.engine(),
            bench.policy,
            bench.limited(config.sampling),
            segmenter=config.segmenter,
            max_step_tokens=config.max_step_tokens,
        )
        self.value = config.value.build(bench, self.generator, scorer)
        self.gold = GoldSteps(self.generator, bench.template) if config.search.gold_steps else None
        self.reference = Reference(bench.grader, config.search.outcome, self.gold)
        self.prompts = encode_prompts(bench.policy, bench.template, bench.rows)
        self.pairing = {
            "builder": "tree",
            **self.generator.provenance(),
            "model": bench.model,
            "prompt": bench.prompt_id,
            "data": bench.source,
            "search": asdict(config.search),
            **asdict(config.pairs),
            "value": self.value.provenance(),
        }

    def groups(self) -> list[list[int]]:
        """Item numbers of every group: its trees fill the batch with their actions."""
        return fixed_batches(self.prompts, self.config.search.actions, self.config.engine.at_once)

    def work(self, items: Sequence[int]) -> list[dict[str, Any]]:
        """One record per item (:func:`~stepkd.labels.workbench.pair_record`)."""
        self.generator.engine.forget()
        problems = [
            Problem(item, self.prompts[item].row, tuple(self.prompts[item].prompt_ids.tolist())) for item in items
        ]
        trees = tree_search(problems, self.generator, self.value.values, self.config.search, self.reference)
        return [self._record(tree) for tree in trees]

    def _record(self, tree: SearchTree) -> dict[str, Any]:
        found = tree_pairs(tree, self.config.pairs, columns=PROBLEM_COLUMNS, provenance=self.pairing)
        index = tree.problem.index
        costs = self.generator.costs.pop(index, Counter())
        facts = {
            "trees_with_a_correct_end": int(tree.solved),
            "correct_paths": int(tree.last.correct is True),
            "steps_of_paths": len(tree.decisions),
            "nodes": sum(node is not tree.root for node in tree.root.subtree()),
            "tokens_of_steps": costs["steps"],
            "tokens_of_continuations": costs["continuations"],
            "solutions_with_a_stop_string": int(self.gold is not None and self.gold.is_cut(tree.problem)),
        }
        return pair_record(self.prompts[index].id, index, found.rows, dropped=found.dropped, facts=facts)
