"""Preference pairs by tree search: one tree per problem, a pair at every depth of its chosen path.

Source: Xie et al. 2024, arXiv 2405.00451. The search itself is :mod:`stepkd.search`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from stepkd.errors import DataError
from stepkd.labels.settings import TreePairConfig
from stepkd.labels.solutions import PROBLEM_COLUMNS, Row
from stepkd.labels.workbench import Workbench, load_judge, open_workbench, pair_record
from stepkd.models.policy import Policy
from stepkd.sampling.sampler import Sampler
from stepkd.sampling.transformers_sampler import TransformersSampler, encode_prompts, fixed_batches
from stepkd.scorers.judge import PromptedJudge
from stepkd.scorers.scorer import StepScorer
from stepkd.search.generate import RolloutValue, SampledSteps, ScorerValue
from stepkd.search.mcts import SearchTree, tree_search
from stepkd.search.pairs import tree_pairs
from stepkd.search.tree import Problem, StateValue
from stepkd.tasks.rows import is_task_row


class TreePairBuilder:
    """Searches a tree for each problem of a group, and takes pairs from it; an item is a problem.

    Args:
        spec: the job's settings.
        bench: problems, policy, template and grader.
        generator: proposes steps.
        value: estimates states.
    """

    def __init__(self, spec: TreePairConfig, bench: Workbench, generator: SampledSteps, value: StateValue) -> None:
        self.spec, self.bench, self.generator, self.value = spec, bench, generator, value
        self.prompts = encode_prompts(bench.policy, bench.template, bench.rows)
        self.pairing = {
            "builder": "tree",
            **generator.provenance(),
            "model": bench.model,
            "prompt": bench.prompt_id,
            "data": bench.source,
            **spec.settings(),
            "value": value.provenance(),
        }

    def groups(self) -> list[list[int]]:
        """See :class:`~stepkd.labels.workbench.PairBuilder`: the trees of a group fill the batch with their actions."""
        search = self.spec.search
        return fixed_batches(self.prompts, max(search.actions, search.root_actions or 0), self.spec.max_rows)

    def work(self, items: Sequence[int]) -> list[dict[str, Any]]:
        """See :class:`~stepkd.labels.workbench.PairBuilder`."""
        problems = [Problem(item, self.prompts[item].row, self.prompts[item].prompt_ids) for item in items]
        trees = tree_search(problems, self.generator, self.value, self.bench.grader, self.spec.search)
        return [self._record(tree) for tree in trees]

    def _record(self, tree: SearchTree) -> dict[str, Any]:
        found = tree_pairs(tree, self.spec.pairs, columns=PROBLEM_COLUMNS, provenance=self.pairing)
        index = tree.problem.index
        return pair_record(
            self.prompts[index].id,
            index,
            found.rows,
            dropped=found.dropped,
            facts=tree_facts(tree)
            | {
                "tokens_of_steps": self.generator.step_tokens.pop(index, 0),
                "tokens_of_rollouts": self.generator.rest_tokens.pop(index, 0),
            },
        )

    def summary(self, records: Sequence[Row]) -> dict[str, Any]:
        """Shares and means over all trees of a job."""

        def total(fact: str) -> int:
            return sum(int(record["facts"][fact]) for record in records)

        trees, depths = total("trees"), [len(row["prefix"]) for record in records for row in record["rows"]]
        return {
            "solved_share": total("trees_with_a_right_end") / trees,
            "right_path_share": total("right_paths") / trees,
            "mean_tree_depth": total("depth_of_trees") / trees,
            "mean_path_steps": total("steps_of_paths") / trees,
            "mean_pair_depth": sum(depths) / len(depths) if depths else None,
            "tokens_generated": total("tokens_of_steps") + total("tokens_of_rollouts"),
        }


def tree_facts(tree: SearchTree) -> dict[str, int]:
    """Whole numbers that describe a tree; they may be added up over trees."""
    nodes = [node for node in tree.root.subtree() if node is not tree.root]
    ends = [node for node in nodes if node.terminal]
    return {
        "trees": 1,
        "trees_with_a_right_end": int(tree.solved),
        "right_paths": int(tree.last.correct is True),
        "steps_of_paths": len(tree.decisions),
        "nodes": len(nodes),
        "depth_of_trees": max((node.depth for node in nodes), default=0),
        "merged_samples": sum(node.copies - 1 for node in nodes),
        "ends": len(ends),
        "right_ends": sum(node.correct is True for node in ends),
        "cut_off_ends": sum(node.step is not None and node.step.end == "length" for node in ends),
    }


def tree_pair_builder(
    spec: TreePairConfig,
    *,
    policy: Policy | None = None,
    sampler: Sampler | None = None,
    scorer: StepScorer | None = None,
) -> TreePairBuilder:
    """Load what a job of tree-search pairs needs, checking what can be checked before the work begins.

    Args:
        spec: the job's settings.
        policy, sampler, scorer: already made ones to use in place of those that ``spec`` describes.

    Raises:
        ConfigError, DataError, ModelError: settings, data or models that cannot be used.
    """
    bench = open_workbench(spec, spec.problems, partial(_check_row, spec), problems=True, policy=policy)
    bench.policy.to(bench.device)
    generator = SampledSteps(
        sampler or TransformersSampler(bench.policy, max_rows=spec.max_rows),
        bench.policy,
        spec.drawing(1, bench.max_new_tokens),
        segmenter=spec.segmenter,
        max_step_tokens=spec.max_step_tokens,
    )
    return TreePairBuilder(spec, bench, generator, _value(spec, bench, generator, scorer))


def _value(spec: TreePairConfig, bench: Workbench, generator: SampledSteps, scorer: StepScorer | None) -> StateValue:
    """What the settings name as the estimate of a state."""
    if spec.value == "rollout":
        return RolloutValue(generator, bench.grader, rollouts=spec.rollouts_per_step)
    if scorer is None and spec.judge is None:
        scorer = PromptedJudge(bench.policy, reference=True, max_rows=spec.max_rows, name=bench.model)
    elif scorer is None:
        asked, word = spec.value == "self_evaluation", str(spec.judge)
        word = f"judge:{word}" if asked and not word.startswith("judge:") else word
        scorer = load_judge(spec, word, template=spec.judge_template, reference=asked)
    return ScorerValue(scorer, reduction=spec.reduction, name=spec.value)


def _check_row(spec: TreePairConfig, row: Row, place: str) -> None:
    if spec.judge == "checker" and not is_task_row(row):
        raise DataError(
            f"row {str(row['id'])!r} has no 'task' and 'meta': only rows of the tiny world (source 'task') have an "
            "exact checker; give a model that scores steps, --judge MODEL",
            path=place,
            column="task",
        )
