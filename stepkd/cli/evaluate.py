r"""Benchmark a model or a step scorer, or compare two evaluations.

  stepkd evaluate --model runs/sft --benchmark gsm8k --data data/gsm8k --limit 200 --out runs/sft-gsm8k
  stepkd evaluate --model HuggingFaceTB/SmolLM2-135M-Instruct --benchmark math500 \
      --samples 8 --temperature 0.8 --out runs/smollm2-math500
  stepkd evaluate --compare runs/base-gsm8k runs/sft-gsm8k
  stepkd evaluate --benchmark processbench --model runs/prm --data data/processbench --out runs/prm-processbench
  stepkd evaluate --best-of-n prm=runs/prm-scores.jsonl orm=runs/orm-scores.jsonl --out runs/best-of-n

A killed run is resumed by the same command, with any number of processes (torchrun, accelerate, srun), and ends with
the same result. --out then holds results.jsonl, summary.json and settings.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from stepkd.cli import judging_prm
from stepkd.cli.options import (
    TEMPLATE_HELP,
    add_model_arguments,
    given_options,
    say_share_is_done,
    start_job,
)
from stepkd.errors import ConfigError

SAMPLING_ONLY = (
    *("samples", "temperature", "top_p", "top_k", "max_new_tokens", "stop", "ks"),
    *("style", "system", "few_shot", "extractors", "deadline_s"),
)
"""Options that say how solutions are sampled and graded."""
SCORING_ONLY = (
    *("subsets", "threshold", "tune_on", "no_figures"),
    *("temperature_from", "head", "reference", "answers", "separator"),
)
"""Options that say how given steps are scored and judged."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``stepkd evaluate``."""
    what = parser.add_argument_group("what")
    what.add_argument("--model", help="run folder, checkpoint, model folder, hub id, .gguf file or tiny preset")
    what.add_argument("--benchmark", default="gsm8k", help="name (`--list` shows them; default: gsm8k)")
    what.add_argument("--data", help="file, folder, or settings (key=value,...); default: the benchmark's hub data set")
    what.add_argument("--limit", type=int, metavar="N", help="only the first N problems")
    what.add_argument("--out", help="folder for settings, per-problem results and summary")
    what.add_argument("--overwrite", action="store_true", help="delete an earlier evaluation in --out and start again")
    what.add_argument("--compare", nargs=2, metavar=("A", "B"), help="paired comparison of two evaluation folders")
    what.add_argument("--list", action="store_true", help="list the benchmarks")
    how = parser.add_argument_group("sampling")
    how.add_argument("--samples", type=int, default=1, metavar="K", help="completions per problem (default: 1)")
    how.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    how.add_argument("--top-p", type=float, default=1.0)
    how.add_argument("--top-k", type=int, default=0)
    how.add_argument("--max-new-tokens", type=int, help="default: the benchmark's")
    how.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends a completion; may be repeated")
    how.add_argument("--seed", type=int, default=0)
    how.add_argument("--ks", type=int, nargs="+", metavar="K", help="k of pass@k and maj@k; default: powers of two")
    ask = parser.add_argument_group("prompt and grading")
    ask.add_argument("--template", help=TEMPLATE_HELP)
    ask.add_argument("--style", choices=("auto", "chat", "plain"), help="override the template's style")
    ask.add_argument("--system", help="system prompt")
    ask.add_argument("--few-shot", type=int, metavar="N", help="number of built-in worked examples, 0 to 4")
    ask.add_argument("--extractors", nargs="+", help="how answers are found, in order; default: the benchmark's")
    ask.add_argument(
        "--convention",
        choices=("stepkd", "prm800k"),
        default="stepkd",
        help="when two answers are equal: stepkd's "
        "rules (default), or also refusing what PRM800K's official grader refuses (2/4 for 1/2, 10/2 for 5)",
    )
    ask.add_argument(
        "--deadline",
        type=float,
        default=2.0,
        metavar="S",
        dest="deadline_s",
        help="hard limit per graded answer (default 2)",
    )
    add_model_arguments(parser.add_argument_group("machine"), "completions decoded at once (default 32)")
    judging_prm.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run ``stepkd evaluate``."""
    if arguments.list:
        return _list()
    if arguments.compare:
        return _compare(arguments)
    if arguments.best_of_n:
        return judging_prm.run_best_of_n(arguments)
    if not arguments.model or not arguments.out:
        raise ConfigError("give --model and --out (or --compare A B, or --list)")
    from stepkd.data.benchmarks import PROCESS_BENCHMARKS
    from stepkd.evaluation.runner import PROBLEMS, EvaluationConfig, evaluate
    from stepkd.yaml_files import settings_from

    _check_used(arguments, PROCESS_BENCHMARKS)
    if arguments.benchmark in PROCESS_BENCHMARKS:
        return judging_prm.run_process(arguments)
    console, launch, options = start_job(arguments, {PROBLEMS: "evaluating"})
    summary = evaluate(
        settings_from(EvaluationConfig, vars(arguments) | {"template": _template(arguments)}), options=options
    )
    if not summary:
        return say_share_is_done(console, launch, "results")
    print_summary(console, summary)
    console.print(f"\nper-problem rows, settings and summary: {arguments.out}", markup=False, soft_wrap=True)
    return 0


def _check_used(arguments: argparse.Namespace, process_benchmarks: Collection[str]) -> None:
    """Refuse options of the other kind of benchmark, which would be silently without effect."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    process = arguments.benchmark in process_benchmarks
    if unused := given_options(arguments, parser, SAMPLING_ONLY if process else SCORING_ONLY):
        why = (
            "steps that are there are scored and nothing is sampled" if process else "solutions are sampled and graded"
        )
        raise ConfigError(f"--benchmark {arguments.benchmark} has no use for {', '.join(unused)}: {why}; drop it")


def _list() -> int:
    from stepkd.data.benchmarks import BENCHMARKS, PROCESS_BENCHMARKS

    for benchmark in BENCHMARKS.values():
        print(f"{benchmark.name:<14} {benchmark.help}")
    for name, text in PROCESS_BENCHMARKS.items():
        print(f"{name:<14} {text}")
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from stepkd.evaluation.metrics import compare_runs
    from stepkd.evaluation.runner import COMPARISON_NAME
    from stepkd.runs.files import write_json
    from stepkd.runs.job import SUMMARY_NAME

    folders = [Path(folder) / SUMMARY_NAME for folder in arguments.compare]
    summaries = [json.loads(path.read_text(encoding="utf-8")) for path in folders if path.is_file()]
    if len(summaries) == 2 and all(summary.get("kind") == "process" for summary in summaries):
        return judging_prm.compare_scorers(arguments, (summaries[0], summaries[1]))
    comparison = compare_runs(*arguments.compare, seed=arguments.seed)
    print(comparison)
    if arguments.out:
        write_json(Path(arguments.out) / COMPARISON_NAME, comparison.to_dict())
    return 0


def _template(arguments: argparse.Namespace) -> Any:
    """What is asked for, where anything is: a template, or changes to the one that is used without."""
    from stepkd.data.benchmarks import get_benchmark
    from stepkd.models.source import template_for

    names = ("style", "system", "few_shot")
    changes = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    if not changes:
        return arguments.template
    template = template_for(arguments.model, get_benchmark(arguments.benchmark).template, arguments.template)
    return dataclasses.replace(template, **changes)


def print_summary(console: Any, summary: dict[str, Any]) -> None:
    """Table of metrics with their intervals."""
    from rich.table import Table

    title = f"{summary['model']} on {summary['benchmark']}: {summary['problems']} problems"
    console.print(title, highlight=False, markup=False)
    table = Table()
    table.add_column("metric")
    table.add_column("value", justify="right")
    table.add_column(f"{summary['level']:.0%} interval", justify="right")
    for name, metric in summary["metrics"].items():
        scale, unit = (1.0, "") if name == "mean_tokens" else (100.0, "%")
        table.add_row(name, *(_format(metric, scale, unit)))
    console.print(table)


def _format(metric: dict[str, Any], scale: float, unit: str) -> tuple[str, str]:
    if metric["value"] is None:
        return "-", "-"
    value = f"{metric['value'] * scale:.1f}{unit}"
    if metric["low"] is None or metric["high"] is None:
        return value, "-"
    return value, f"{metric['low'] * scale:.1f} to {metric['high'] * scale:.1f}{unit}"
