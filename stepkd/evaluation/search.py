"""``stepkd search``: test-time methods on a benchmark, compared at their cost; a job of fixed units
(:mod:`stepkd.runs.job`).

The folder holds ``settings.json`` (what decides the numbers; ``methods`` is name -> class and settings, ``steps`` what
draws steps, ``scorer`` what scored), ``parts/``, and at the end ``results.jsonl`` and ``summary.json``. A unit is a
batch of problems under one method, or the batch's shared samples with all methods that choose among them. A killed job
resumes and ends with the same bytes.

A row of ``results.jsonl`` is a problem under a method; those of a problem stand together::

    {"id": str, "index": int, "prompt": str, "answer": str,      # of the problem, as in an evaluation
     "method": str,                                              # its name (Search.name), or one of the two below
     "samples": [{..., "score": float | None}, ...],             # judged as in an evaluation, its answer first; of a
                                                                 # method that chooses among the pool the answer alone
     "tokens": {"generated": int, "scored": int},                # spent on the problem, what was thrown away included
     "scorer_calls": int, "unscored": int,                       # solutions given to the scorer; those without a score
     "drafted": int, "passes": int, "no_room": int,              # search.state.Costs; each only where it is above 0
     "trace": [{"event": str, ...}, ...]}                        # decisions in order (search.state.Found.trace)

Two methods are no methods, but samples of the policy, and have no answer and an empty trace:

- ``pool``: the shared solutions. Each sample has beside the judged columns ``step_chars``, the exclusive end of every
  step in the characters of ``completion``, and with a scorer ``step_scores`` (a number per step, null for one without
  words or without a score) and ``scores`` (reduction -> number, or null).
- ``difficulty``: solutions that no method uses; their pass rate says how difficult a problem is.

``summary.json`` is described at :func:`stepkd.evaluation.search_summary.summarise_search`. Rows and summary hold no
times; the job's log has the seconds and tokens per second of every unit, whose name begins with the method's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar, get_args

from stepkd.data.sources import get_benchmark
from stepkd.errors import ConfigError
from stepkd.evaluation.config import SearchJobConfig
from stepkd.evaluation.metrics import default_ks
from stepkd.evaluation.runner import OpenedBenchmark, open_benchmark, running
from stepkd.evaluation.search_summary import DIFFICULTY, POOL, summarise_search
from stepkd.grading.judge import judge
from stepkd.models.checkpoint import load_trained, tokenizer_fingerprint
from stepkd.models.policy import Policy
from stepkd.models.source import template_for
from stepkd.runs.job import ALONE, RESULTS_NAME, SUMMARY_NAME, Job, JobOptions
from stepkd.sampling.config import Transformers
from stepkd.sampling.transformers_engine import fixed_batches
from stepkd.scorers.load import load_scorer, pick_device
from stepkd.scorers.scorer import Reduction, StepScorer, default_reduction
from stepkd.search.best_of_n import BestOfN
from stepkd.search.generate import SampledSteps, ScorerValue
from stepkd.search.state import Costs, Found, Problem, Search, State, Tools, found
from stepkd.yaml_files import as_yaml

UNITS = "search"
"""The one phase of the job."""
_ELSEWHERE = (-1,)
"""Path of the states that the samples of :data:`DIFFICULTY` are drawn from; methods name theirs by numbers from 0."""

Unit = tuple[Sequence[Search], Sequence[int]]
"""Methods that share samples, and the numbers of the problems."""


def search_benchmark(
    config: SearchJobConfig,
    *,
    policy: Policy | None = None,
    scorer: StepScorer | None = None,
    options: JobOptions = ALONE,
) -> dict[str, Any]:
    """Run (or resume) a comparison of test-time methods.

    Args:
        config: which methods on which problems, and where to write.
        policy, scorer: already loaded ones to use in place of loading those that ``config`` names.
        options: which rank this is, and whether to overwrite an earlier result in the folder.

    Returns:
        The summary that ``summary.json`` holds, and the settings; empty while other ranks have work left: the last one
        to finish writes the results.

    Raises:
        ConfigError: the folder holds another job, or settings contradict each other.
        DataError, ModelError: data, model or scorer cannot be used.
    """
    job = Job(Path(config.out), "search", (RESULTS_NAME, SUMMARY_NAME), options)
    opened = open_benchmark(config, job, policy)
    if scorer is None and config.scorer is not None:
        scorer = load_scorer(config.scorer, device=config.device, max_rows=config.max_rows)
    names = dict.fromkeys(name for method in config.all_methods for name in method.models)
    bench = _Bench(config, {"": opened} | {name: _other_model(name, config, opened) for name in names}, scorer)
    settings = job.begin({**opened.settings, **bench.settings()})
    units = bench.units()
    with opened.grader:
        job.work(UNITS, units, bench.work, _figures)
    results = job.rows(UNITS, units)
    if results is None:
        return {}
    summary = summarise_search(
        results,
        [method.name for method in config.all_methods],
        default_ks(config.samples),
        reduction=None if scorer is None else default_reduction(scorer.meaning),
        seed=config.sampling.seed,
    )
    summary = {"benchmark": config.benchmark, "model": config.model, **summary}
    job.finish(RESULTS_NAME, results, summary)
    return summary | {"settings": settings}


def _figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float | None]]:
    """Running figures of a unit: the share of correct answers, and tokens per second."""
    answers = [{"samples": row["samples"][:1]} for row in rows if row["method"] not in (POOL, DIFFICULTY)]
    drawn = [row for row in rows if row["method"] == POOL] or rows  # what chooses among the pool draws nothing
    return running(answers or rows) | {"tokens/s": (sum(row["tokens"]["generated"] for row in drawn), None)}


def _other_model(name: str, config: SearchJobConfig, opened: OpenedBenchmark) -> OpenedBenchmark:
    """The problems under a model that a method names beside the policy, sampled in this process wherever the policy is.

    Raises:
        ConfigError: it has another tokenizer.
        ModelError: nothing loadable there.
    """
    dtype = str(next(opened.policy.parameters()).dtype).removeprefix("torch.")
    policy = load_trained(name, dtype=dtype, attention=config.attention)
    if tokenizer_fingerprint(policy.tokenizer) != tokenizer_fingerprint(opened.policy.tokenizer):
        raise ConfigError(f"methods: {name} has another tokenizer than {config.model}: take or train one with the same")
    template = template_for(name, get_benchmark(config.benchmark).template, None)
    engine = Transformers(config.engine.at_once).for_job(policy, pick_device(config.device))
    return replace(opened, policy=policy, engine=engine, template=template)


@dataclass(frozen=True, kw_only=True)
class _Samples(Search):
    """Samples of the policy: the shared ones, with what a scorer says of their steps, or those of which the pass rate
    says how difficult a problem is."""

    needs_scorer: ClassVar[bool] = False

    n: int
    shared: bool

    @property
    def name(self) -> str:
        return POOL if self.shared else DIFFICULTY

    def run(self, problems: Sequence[Problem], tools: Tools) -> list[list[Found]]:
        if not self.shared:
            drawn = tools.generator.complete([State(problem, path=_ELSEWHERE) for problem in problems], self.n)
            return [[found(state, sample=number) for number, state in enumerate(states)] for states in drawn]
        drawn, value = tools.samples(problems, self.n), tools.value
        assert value is None or isinstance(value, ScorerValue)
        scored = iter(value.step_scores([state for states in drawn for state in states]) if value else ())
        results: list[list[Found]] = []
        for states in drawn:
            results.append([])
            for number, state in enumerate(states):
                columns: dict[str, Any] = {"step_chars": list(accumulate(map(len, state.steps)))}
                if value is not None:
                    columns["step_scores"] = steps = list(next(scored))
                    columns["scores"] = {each: value.reduced(state, steps, each) for each in get_args(Reduction)}
                    tools.costs[state.problem.index]["unscored"] += columns["scores"][value.reduction] is None
                results[-1].append(replace(found(state, sample=number), columns=columns))
        return results


@dataclass(eq=False)
class _Bench:
    """What does the units of a job."""

    config: SearchJobConfig
    models: Mapping[str, OpenedBenchmark]
    """The policy, which has no name, and those that methods name."""
    scorer: StepScorer | None

    def tools(self) -> Tools:
        """Fresh ones, which have spent nothing and remember nothing."""
        config, sampling, costs = self.config, self.config.drawn, Costs()
        generators = {
            name: SampledSteps(
                model.engine,
                model.policy,
                sampling,
                segmenter=config.segmenter,
                max_step_tokens=config.max_step_tokens,
                max_tokens=sampling.longest,
                costs=costs,
                template=model.template,
            )
            for name, model in self.models.items()
        }
        value = None if self.scorer is None else ScorerValue(self.scorer, costs=costs)
        return Tools(generators[""], self.models[""].grader, value, costs, generators=generators)

    def settings(self) -> dict[str, Any]:
        """The part of the job's settings that says what is done."""
        config, tools = self.config, self.tools()
        models = {
            name: {**tools.generators[name].provenance(), "prompt": model.template.prompt_id(model.policy.tokenizer)}
            for name, model in self.models.items()
            if name
        }
        return {
            "steps": tools.generator.provenance(),
            "samples": config.samples,
            "difficulty_samples": config.difficulty_samples,
            "methods": {method.name: as_yaml(method) for method in config.all_methods},
            "scorer": tools.value and {**tools.value.provenance(), "max_rows": config.max_rows},
        } | ({"models": models} if models else {})

    def units(self) -> dict[str, Unit]:
        """All units by name: group by group, those of a group in the order of the batches."""
        config, prompts = self.config, self.models[""].prompts
        choosing = [each for each in config.all_methods if isinstance(each, BestOfN)]
        groups: list[list[Search]] = [[_Samples(n=config.samples, shared=True), *choosing]]
        groups += [[_Samples(n=config.difficulty_samples, shared=False)]] * bool(config.difficulty_samples)
        groups += [[each] for each in config.all_methods if each not in choosing]
        return {
            f"{group[0].name}-{number:06d}": (group, batch)
            for group in groups
            for number, batch in enumerate(fixed_batches(prompts, group[0].at_once, config.engine.at_once))
        }

    def work(self, unit: Unit) -> list[dict[str, Any]]:
        """The rows of a unit, each with what its own method has spent."""
        for model in self.models.values():
            model.engine.forget()
        (methods, batch), opened, tools = unit, self.models[""], self.tools()
        seed, rows = self.config.drawn.seed, list[dict[str, Any]]()
        problems = [Problem(i, opened.rows[i], tuple(opened.prompts[i].prompt_ids.tolist()), seed) for i in batch]
        for method in methods:
            tools.costs.clear()
            results = method.run(problems, tools)
            if not all(results):
                raise ConfigError(f"methods: {method.name} found nothing for a problem: a method gives at least one")
            if isinstance(method, BestOfN):  # the others stand in the pool's row
                results = [own[:1] for own in results]
            judged = judge([problem.row for problem in problems], results, opened.grader)
            for problem, own, samples in zip(problems, results, judged, strict=True):
                for sample, each in zip(samples, own, strict=True):
                    sample |= {"score": each.score, **each.columns}
                spent = tools.costs[problem.index]
                tokens = {"generated": tools.costs.generated(problem.index), "scored": spent["scored_tokens"]}
                row = {**opened.problem(problem.index), "method": method.name, "samples": samples, "tokens": tokens}
                row |= {"scorer_calls": spent["scorer_calls"], "unscored": spent["unscored"]}
                row |= {name: spent[name] for name in ("drafted", "passes", "no_room") if spent[name]}
                rows.append(row | {"trace": list(own[0].trace)})
        return rows
