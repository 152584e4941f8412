r"""Compare test-time methods on a benchmark at what they cost: best-of-N, beam search, DVTS and others.

  stepkd search --config search/beam --model runs/sft --scorer runs/prm --benchmark gsm8k --limit 200 --out runs/beam
  stepkd search --config search/self_consistency --model HuggingFaceTB/SmolLM2-135M-Instruct --out runs/votes
  stepkd search --config tiny/search --out runs/tiny-search

Every method solves the same problems, greedy decoding beside it. The table has accuracy, generated and scored tokens
and scorer calls per problem, and the paired difference to greedy, and to best-of-N at the same number of generated
tokens, which is read from --samples shared solutions. A killed search is resumed by the same command, with any number
of processes. --out then holds results.jsonl (a row per problem and method, with its decisions), summary.json and
settings.json.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from stepkd.evaluation.config import SearchJobConfig


def run(config: SearchJobConfig) -> int:
    """Run ``stepkd search``."""
    from stepkd.evaluation.search import UNITS, search_benchmark

    config, job = config.start({UNITS: "searching"})
    summary = search_benchmark(config, options=job)
    if not summary:
        return job.share_is_done("results")
    print_summary(job.console, summary)
    job.say(*notes(summary), f"\nrows with decisions, settings and summary: {config.out}")
    return 0


def print_summary(console: Any, summary: Mapping[str, Any]) -> None:
    """Table of the methods, with intervals below the figures."""
    from rich.table import Column, Table

    from stepkd.statistics import percent, shown

    title = f"{summary['model']} on {summary['benchmark']}: {summary['problems']} problems, 95% intervals"
    console.print(title, highlight=False, markup=False)
    votes = next(iter(summary["methods"].values()))["minus_best_of_n"]
    heads = ["accuracy (%)", "tokens", "scored", "calls", "per 1,000 tokens", "- greedy"]
    heads += [f"- {vote} at its tokens" for vote in votes]
    hard = summary["difficulty"]
    heads += [f"pass rate {name} ({count})" for name, count in hard["bins"].items() if count] if hard else []
    table = Table("method", *(Column(head, justify="right") for head in heads))
    for name, method in summary["methods"].items():
        costs = [shown(method[cost], ".0f", gap=None) for cost in ("generated_tokens", "scored_tokens", "scorer_calls")]
        minus = [method["minus_greedy"], *method["minus_best_of_n"].values()]
        by_bin = [each for bin, each in method["by_difficulty"].items() if hard["bins"][bin]]
        table.add_row(
            name,
            percent(method["accuracy"], "\n"),
            *costs,
            percent(method["accuracy_per_1000_tokens"], "\n"),
            *("-" if each is None else shown(each, "+.1f", scale=100, gap="\n") for each in minus),
            *(percent(each, "\n") for each in by_bin),
        )
    console.print(table)


def notes(summary: Mapping[str, Any]) -> list[str]:
    """What a reader of the table must know."""
    from stepkd.statistics import percent

    pool, notes = summary["pool"], list[str]()
    for name, method in summary["methods"].items():
        if (needs := method["budget"]["samples"]) > pool["samples"]:
            notes.append(
                f"{name} draws as many tokens as {needs:.1f} samples, and is compared with best-of-{pool['samples']}: "
                f"--samples {math.ceil(needs)} would reach its budget"
            )
        for count, what in (
            (method["cut_off"], "answers were cut off"),
            (method["unscored"], "solutions have no score"),
        ):
            if count:
                notes.append(f"{name}: {count} {what}")
    for name, peak in pool["peaks"].items():
        if peak["k"] < pool["ks"][-1]:
            last = pool["ks"][-1]
            notes.append(
                f"best-of-N by {name} is highest at N={peak['k']}, and {percent(peak['fall'])} lower at N={last}"
            )
    return notes
