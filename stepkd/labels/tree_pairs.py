"""Preference pairs by tree search: one tree per problem, a pair at every depth of its chosen path.

Source: Xie et al. 2024, arXiv 2405.00451. The search itself is :mod:`stepkd.search`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from stepkd.labels.labellers import check_task_row
from stepkd.labels.settings import StepScore, TreePairConfig
from stepkd.labels.step_labels import PROBLEM_COLUMNS, Row
from stepkd.labels.workbench import PairBuilder, Workbench, open_workbench, pair_record
from stepkd.models.policy import Policy
from stepkd.sampling.sampler import Sampler
from stepkd.sampling.transformers_sampler import TransformersSampler, encode_prompts, fixed_batches
from stepkd.scorers.rules import Checker
from stepkd.scorers.scorer import StepScorer
from stepkd.search.generate import SampledSteps
from stepkd.search.mcts import SearchTree, tree_pairs, tree_search
from stepkd.search.tree import Problem, StateValue


class TreePairBuilder(PairBuilder):
    """Searches a tree for each problem of a group, and takes pairs from it; an item is a problem.

    Args:
        config: the job's settings.
        bench: problems, policy, template and grader.
        generator: proposes steps.
        value: estimates states.
    """

    def __init__(self, config: TreePairConfig, bench: Workbench, generator: SampledSteps, value: StateValue) -> None:
        self.config, self.bench, self.generator, self.value = config, bench, generator, value
        self.prompts = encode_prompts(bench.policy, bench.template, bench.rows)
        self.pairing = {
            "builder": "tree",
            **generator.provenance(),
            "model": bench.model,
            "prompt": bench.prompt_id,
            "data": bench.source,
            "search": asdict(config.search),
            **asdict(config.pairs),
            "value": value.provenance(),
        }

    def groups(self) -> list[list[int]]:
        """See :class:`~stepkd.labels.workbench.PairBuilder`: the trees of a group fill the batch with their actions."""
        return fixed_batches(self.prompts, self.config.search.actions, self.config.max_rows)

    def work(self, items: Sequence[int]) -> list[dict[str, Any]]:
        """See :class:`~stepkd.labels.workbench.PairBuilder`."""
        problems = [
            Problem(item, self.prompts[item].row, tuple(self.prompts[item].prompt_ids.tolist())) for item in items
        ]
        trees = tree_search(problems, self.generator, self.value, self.bench.grader, self.config.search)
        return [self._record(tree) for tree in trees]

    def _record(self, tree: SearchTree) -> dict[str, Any]:
        found = tree_pairs(tree, self.config.pairs, columns=PROBLEM_COLUMNS, provenance=self.pairing)
        index = tree.problem.index
        return pair_record(
            self.prompts[index].id,
            index,
            found.rows,
            dropped=found.dropped,
            facts=tree_facts(tree)
            | {
                "tokens_of_steps": self.generator.step_tokens.pop(index, 0),
                "tokens_of_continuations": self.generator.rest_tokens.pop(index, 0),
            },
        )

    def summary(self, records: Sequence[Row]) -> dict[str, Any]:
        """Shares and means over all trees of a job."""

        def total(fact: str) -> int:
            return sum(int(record["facts"][fact]) for record in records)

        trees, depths = total("trees"), [len(row["prefix"]) for record in records for row in record["rows"]]
        return {
            "solved_share": total("trees_with_a_correct_end") / trees,
            "correct_path_share": total("correct_paths") / trees,
            "mean_tree_depth": total("depth_of_trees") / trees,
            "mean_path_steps": total("steps_of_paths") / trees,
            "mean_pair_depth": sum(depths) / len(depths) if depths else None,
            "tokens_generated": total("tokens_of_steps") + total("tokens_of_continuations"),
        }


def tree_facts(tree: SearchTree) -> dict[str, int]:
    """Whole numbers that describe a tree; they may be added up over trees."""
    nodes = [node for node in tree.root.subtree() if node is not tree.root]
    ends = [node for node in nodes if node.terminal]
    return {
        "trees": 1,
        "trees_with_a_correct_end": int(tree.solved),
        "correct_paths": int(tree.last.correct is True),
        "steps_of_paths": len(tree.decisions),
        "nodes": len(nodes),
        "depth_of_trees": max((node.depth for node in nodes), default=0),
        "merged_samples": sum(node.copies - 1 for node in nodes),
        "ends": len(ends),
        "correct_ends": sum(node.correct is True for node in ends),
        "cut_off_ends": sum(node.step is not None and node.step.end == "length" for node in ends),
    }


def tree_pair_builder(
    config: TreePairConfig,
    *,
    policy: Policy | None = None,
    sampler: Sampler | None = None,
    scorer: StepScorer | None = None,
) -> TreePairBuilder:
    """Load what a job of tree-search pairs needs, checking what can be checked before the work begins.

    Args:
        config: the job's settings.
        policy, sampler, scorer: already made ones to use in place of those that ``config`` describes.

    Raises:
        ConfigError, DataError, ModelError: settings, data or models that cannot be used.
    """

    def check(row: Row, place: str) -> None:
        if isinstance(config.value, StepScore) and config.value.scorer in ("checker", Checker()):
            check_task_row(row, place, "give another scorer")

    bench = open_workbench(config, config.problems, config.model, check, problems=True, policy=policy)
    bench.policy.to(bench.device)
    generator = SampledSteps(
        sampler or TransformersSampler(bench.policy, max_rows=config.max_rows),
        bench.policy,
        bench.limited(config.sampling),
        segmenter=config.segmenter,
        max_step_tokens=config.max_step_tokens,
    )
    return TreePairBuilder(config, bench, generator, config.value.build(bench, generator, scorer))
