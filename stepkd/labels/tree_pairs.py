"""Preference pairs by tree search: one tree per problem, a pair at every depth of its chosen path.

Source: Xie et al. 2024, arXiv 2405.00451. The search itself is :mod:`stepkd.search`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stepkd.data.encode import Example
from stepkd.errors import DataError
from stepkd.grading import Grader
from stepkd.labels.folder import PAIR_KIND, check_job_folder
from stepkd.labels.job_data import JobData, Workbench, load_job_data, open_workbench
from stepkd.labels.manifest import as_json, base_manifest
from stepkd.labels.pair_job import PairParts, pair_record
from stepkd.labels.solutions import PROBLEM_COLUMNS
from stepkd.labels.tree_settings import TreePairSpec
from stepkd.models import Policy
from stepkd.rollout import Sampler, TransformersSampler
from stepkd.rollout.transformers_sampler import encode_prompts, fixed_batches
from stepkd.scorers.judge import PromptedJudge
from stepkd.scorers.load import ScorerOptions, load_scorer, pick_device
from stepkd.scorers.scorer import StepScorer
from stepkd.search import (
    Problem,
    RolloutValue,
    SampledSteps,
    ScorerValue,
    SearchTree,
    StateValue,
    tree_pairs,
    tree_search,
)


class TreePairBuilder:
    """Searches a tree for each problem of a group, and takes pairs from it; an item is a problem.

    Args:
        prompts: tokenised problems, with their rows.
        spec: the job's settings.
        generator: proposes steps.
        value: estimates states.
        grader: judges final answers.
        provenance: further JSON values of where the pairs come from.
    """

    def __init__(
        self,
        prompts: Sequence[Example],
        spec: TreePairSpec,
        generator: SampledSteps,
        value: StateValue,
        grader: Grader,
        *,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        self.prompts = prompts
        self.spec = spec
        self.generator = generator
        self.value = value
        self.grader = grader
        self._pairing = {
            "builder": "tree",
            **generator.provenance(),
            **(provenance or {}),
            **spec.settings(),
            "value": value.provenance(),
        }

    def provenance(self) -> dict[str, Any]:
        """What the pairs come from, as JSON values."""
        return dict(self._pairing)

    def groups(self) -> list[list[int]]:
        """See :class:`~stepkd.labels.pair_job.PairBuilder`: the trees of a group fill the batch with their actions."""
        search = self.spec.search
        return fixed_batches(self.prompts, max(search.actions, search.root_actions or 0), self.spec.max_rows)

    def work(self, items: Sequence[int]) -> list[dict[str, Any]]:
        """See :class:`~stepkd.labels.pair_job.PairBuilder`."""
        problems = [Problem(item, self.prompts[item].row, self.prompts[item].prompt_ids) for item in items]
        trees = tree_search(problems, self.generator, self.value, self.grader, self.spec.search)
        return [self._record(tree) for tree in trees]

    def _record(self, tree: SearchTree) -> dict[str, Any]:
        found = tree_pairs(tree, self.spec.pairs, columns=PROBLEM_COLUMNS, provenance=self._pairing)
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


def tree_summary(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
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


def tree_pair_parts(
    spec: TreePairSpec,
    *,
    rank: int = 0,
    overwrite: bool = False,
    policy: Policy | None = None,
    sampler: Sampler | None = None,
    scorer: StepScorer | None = None,
) -> PairParts:
    """Load what a job of tree-search pairs needs, checking what can be checked before the work begins.

    Args:
        spec: the job's settings.
        rank: this process; only rank 0 may find the folder half begun.
        overwrite: whether an earlier job in the folder is to be deleted later.
        policy, sampler, scorer: already made ones to use in place of those that ``spec`` describes.

    Raises:
        ConfigError, DataError, ModelError: settings, data or models that cannot be used.
    """
    if rank == 0:
        check_job_folder(spec.out, overwrite=overwrite, kind=PAIR_KIND)
    data = load_job_data(spec.problems, problems=True, limit=spec.limit)
    _check_rows(data, spec)
    device = pick_device(spec.device)
    bench = open_workbench(spec, data, policy=policy)
    bench.policy.to(device)
    sampler = sampler or TransformersSampler(bench.policy, max_rows=spec.max_rows)
    generator = SampledSteps(
        sampler,
        bench.policy,
        spec.drawing(1, bench.max_new_tokens),
        segmenter=spec.segmenter,
        max_step_tokens=spec.max_step_tokens,
    )
    builder = TreePairBuilder(
        encode_prompts(bench.policy, bench.template, data.rows),
        spec,
        generator,
        _value(spec, bench, generator, scorer),
        bench.grader,
        provenance={"model": bench.model, "prompt": bench.prompt_id, "data": data.facts()["source"]},
    )
    manifest = base_manifest(spec, PAIR_KIND, bench, data) | {"pairing": builder.provenance()}
    return PairParts(builder, bench.grader, as_json(manifest), summarise=tree_summary)


def _value(spec: TreePairSpec, bench: Workbench, generator: SampledSteps, scorer: StepScorer | None) -> StateValue:
    """What the settings name as the estimate of a state."""
    if spec.value == "rollout":
        return RolloutValue(generator, bench.grader, rollouts=spec.rollouts)
    if scorer is None and spec.judge is None:
        scorer = PromptedJudge(bench.policy, reference=True, max_rows=spec.max_rows, name=bench.model)
    elif scorer is None:
        asked = spec.value == "self_evaluation"
        options = ScorerOptions(
            template=spec.judge_template,
            reference=asked,
            dtype=spec.dtype,
            device=spec.device,
            max_rows=spec.max_rows,
        )
        word = str(spec.judge)
        scorer = load_scorer(f"judge:{word}" if asked and not word.startswith("judge:") else word, options)
    return ScorerValue(scorer, reduction=spec.reduction, name=spec.value)


def _check_rows(data: JobData, spec: TreePairSpec) -> None:
    for row in data.rows:
        if spec.judge == "checker" and not ("task" in row and "meta" in row):
            raise DataError(
                f"row {str(row['id'])!r} has no 'task' and 'meta': only rows of the tiny world (source 'task') have an "
                "exact checker; give a model that scores steps, --judge MODEL",
                path=data.place,
                column="task",
            )
