"""``stepkd search``: test-time methods on a benchmark, compared at their cost; a job of fixed units
(:mod:`stepkd.runs.job`).

The folder holds ``settings.json`` (what decides the numbers; ``methods`` is name -> class and settings, ``scorer`` what
scored), ``parts/``, and at the end ``results.jsonl`` and ``summary.json``. A unit is a batch of problems under one
method, or the batch's shared samples with all methods that choose among them. A killed job resumes and ends with the
same bytes.

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

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, get_args

from stepkd.data.sources import get_benchmark
from stepkd.data.templates import PromptTemplate
from stepkd.errors import ConfigError
from stepkd.evaluation.config import SearchJobConfig
from stepkd.evaluation.metrics import default_ks
from stepkd.evaluation.runner import OpenedBenchmark, open_benchmark, running
from stepkd.evaluation.search_summary import DIFFICULTY, POOL, summarise_search
from stepkd.grading.judge import judge
from stepkd.models.checkpoint import load_trained, tokenizer_fingerprint, weights_fingerprint
from stepkd.models.policy import Policy
from stepkd.models.source import template_for
from stepkd.runs.job import ALONE, RESULTS_NAME, SUMMARY_NAME, Job, JobOptions
from stepkd.sampling.config import Transformers
from stepkd.sampling.engine import Engine
from stepkd.sampling.transformers_engine import fixed_batches
from stepkd.scorers.load import load_scorer, pick_device
from stepkd.scorers.scorer import Reduction, StepScorer, default_reduction
from stepkd.search.best_of_n import BestOfN
from stepkd.search.generate import SampledSteps, ScorerValue
from stepkd.search.state import Costs, Found, Problem, Search, State, Tools, found
from stepkd.steps.segment import get_segmenter, segmenter_settings
from stepkd.yaml_files import as_yaml

UNITS = "search"
"""The one phase of the job."""
_ELSEWHERE = (-1,)
"""Path of the states that the samples of :data:`DIFFICULTY` are drawn from; methods name theirs by numbers from 0."""

Unit = tuple[Search | str, Sequence[int]]
"""A method, :data:`POOL` or :data:`DIFFICULTY`, and the numbers of the problems."""


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
    bench = _Bench(config, opened, scorer, {name: _other_model(name, config, opened) for name in names})
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
        config.ks or default_ks(config.samples),
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


class _Model(NamedTuple):
    """What writes for a method."""

    engine: Engine
    policy: Policy
    template: PromptTemplate


def _other_model(name: str, config: SearchJobConfig, opened: OpenedBenchmark) -> _Model:
    """A model that a method names beside the policy, sampled in this process wherever the policy is.

    Raises:
        ConfigError: it has another tokenizer.
        ModelError: nothing loadable there.
    """
    dtype = str(next(opened.policy.parameters()).dtype).removeprefix("torch.")
    policy = load_trained(name, dtype=dtype, attention=config.attention)
    if tokenizer_fingerprint(policy.tokenizer) != tokenizer_fingerprint(opened.policy.tokenizer):
        raise ConfigError(
            f"methods: {name} has another tokenizer than {config.model}: take a draft with the same "
            "one, or a refiner that was trained from that model"
        )
    template = template_for(name, get_benchmark(config.benchmark).template, None)
    engine = Transformers(config.engine.at_once).for_job(policy, pick_device(config.device))
    return _Model(engine, policy, template)


@dataclass(eq=False)
class _Bench:
    """What does the units of a job."""

    config: SearchJobConfig
    opened: OpenedBenchmark
    scorer: StepScorer | None
    models: Mapping[str, _Model]

    def tools(self) -> Tools:
        """Fresh ones, which have spent nothing and remember nothing."""
        costs, opened = Costs(), self.opened
        generator = self._generator(_Model(opened.engine, opened.policy, opened.template), costs)
        value = None if self.scorer is None else ScorerValue(self.scorer, costs=costs)
        others = {name: self._generator(model, costs) for name, model in self.models.items()}
        return Tools(generator, opened.grader, value, costs, generators=others)

    def _generator(self, model: _Model, costs: Costs) -> SampledSteps:
        config, sampling = self.config, self.config.drawn
        return SampledSteps(
            model.engine,
            model.policy,
            sampling,
            segmenter=config.segmenter,
            max_step_tokens=config.max_step_tokens,
            max_tokens=sampling.longest,
            costs=costs,
            template=model.template,
        )

    def settings(self) -> dict[str, Any]:
        """The part of the job's settings that says what is done."""
        config, sampling, value = self.config, self.config.drawn, self.tools().value
        segmenter = {"name": config.segmenter.partition(":")[0], **segmenter_settings(get_segmenter(config.segmenter))}
        others = {
            name: {"weights": weights_fingerprint(policy), "prompt": template.prompt_id(policy.tokenizer)}
            for name, (_, policy, template) in self.models.items()
        }
        return {
            "sampling": {name: each for name, each in asdict(sampling).items() if name not in ("seed", "n")},
            "seed": sampling.seed,
            "segmenter": segmenter,
            "max_step_tokens": config.max_step_tokens,
            "samples": config.samples,
            "difficulty_samples": config.difficulty_samples,
            "methods": {method.name: as_yaml(method) for method in config.all_methods},
            "scorer": None if value is None else {**value.provenance(), "max_rows": config.max_rows},
        } | ({"models": others} if others else {})

    def units(self) -> dict[str, Unit]:
        """All units by name: group by group, those of a group in the order of the batches."""
        config = self.config
        groups: list[tuple[str, Search | str, int]] = [(POOL, POOL, config.samples)]
        if config.difficulty_samples:
            groups.append((DIFFICULTY, DIFFICULTY, config.difficulty_samples))
        groups += [(each.name, each, each.at_once) for each in config.all_methods if not isinstance(each, BestOfN)]
        return {
            f"{name}-{number:06d}": (what, batch)
            for name, what, width in groups
            for number, batch in enumerate(fixed_batches(self.opened.prompts, width, config.engine.at_once))
        }

    def work(self, unit: Unit) -> list[dict[str, Any]]:
        """The rows of a unit."""
        for engine in (self.opened.engine, *(model.engine for model in self.models.values())):
            engine.forget()
        what, batch = unit
        prompts = self.opened.prompts
        seed = self.config.drawn.seed
        problems = [Problem(i, self.opened.rows[i], tuple(prompts[i].prompt_ids.tolist()), seed) for i in batch]
        tools = self.tools()
        if isinstance(what, Search):
            return self._method_rows(what, problems, tools)
        if what == POOL:
            return self._pool_rows(problems, tools)
        starts = [State(problem, path=_ELSEWHERE) for problem in problems]
        drawn = tools.generator.complete(starts, self.config.difficulty_samples)
        return self._rows(
            DIFFICULTY, problems, [[found(each, sample=j) for j, each in enumerate(states)] for states in drawn], tools
        )

    def _rows(
        self, name: str, problems: Sequence[Problem], completions: Sequence[Sequence[Found]], tools: Tools
    ) -> list[dict[str, Any]]:
        judged = judge([problem.row for problem in problems], completions, self.opened.grader)
        rows = []
        for problem, samples in zip(problems, judged, strict=True):
            spent = tools.costs[problem.index]
            tokens = {"generated": tools.costs.generated(problem.index), "scored": spent["scored_tokens"]}
            costs = {"tokens": tokens, "scorer_calls": spent["scorer_calls"], "unscored": spent["unscored"]}
            costs |= {name: spent[name] for name in Costs.APART if spent[name]}
            rows.append({**self.opened.told(problem.index), "method": name, "samples": samples, **costs, "trace": []})
        return rows

    def _method_rows(self, method: Search, problems: Sequence[Problem], tools: Tools) -> list[dict[str, Any]]:
        results = method.run(problems, tools)
        if not all(results):
            raise ConfigError(f"methods: {method.name} found nothing for a problem: a method gives at least one")
        if isinstance(method, BestOfN):  # the others stand in the pool's row
            results = [own[:1] for own in results]
        rows = self._rows(method.name, problems, results, tools)
        for row, own in zip(rows, results, strict=True):
            for sample, each in zip(row["samples"], own, strict=True):
                sample["score"] = each.score
            row["trace"] = list(own[0].trace)
        return rows

    def _pool_rows(self, problems: Sequence[Problem], tools: Tools) -> list[dict[str, Any]]:
        """The shared samples, and what chooses among them: drawn once, scored once, counted for each."""
        drawn = tools.samples(problems, self.config.samples)
        flat, value = [state for states in drawn for state in states], tools.value
        assert value is None or isinstance(value, ScorerValue)
        scored = iter([None] * len(flat) if value is None else value.step_scores(flat))
        scores = [[next(scored) for _ in states] for states in drawn]
        rows = self._rows(
            POOL, problems, [[found(each, sample=j) for j, each in enumerate(states)] for states in drawn], tools
        )
        for row, states, own in zip(rows, drawn, scores, strict=True):
            for sample, state, steps in zip(row["samples"], states, own, strict=True):
                sample["step_chars"] = list(accumulate(map(len, state.steps)))
                if value is not None:
                    sample |= _scores(value, state, steps)
                    row["unscored"] += sample["scores"][value.reduction] is None
        for method in self.config.all_methods:
            if isinstance(method, BestOfN):
                tools.costs.clear()
                rows += self._method_rows(method, problems, tools)
        return rows


def _scores(value: ScorerValue, state: State, scores: Sequence[float] | None) -> dict[str, Any]:
    """What a scorer says of a solution; those of ``scores`` belong to the steps with words."""
    given = iter(scores or ())
    by_step = [next(given, math.nan) if step.strip() else math.nan for step in state.steps]
    reduced = {each: None if scores is None else value.reduced(scores, each) for each in get_args(Reduction)}
    return {"step_scores": [None if math.isnan(score) else score for score in by_step], "scores": reduced}
