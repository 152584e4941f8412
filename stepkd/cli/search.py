r"""Compare test-time methods on a benchmark at what they cost: best-of-N, beam search, DVTS and others.

  stepkd search --config search/beam --model runs/sft --scorer runs/prm --benchmark gsm8k --limit 200 --out runs/beam
  stepkd search --config search/self_consistency --model HuggingFaceTB/SmolLM2-135M-Instruct --out runs/votes
  stepkd search --config search/tiny --out runs/tiny-search

Every method solves the same problems, greedy decoding beside it. The tables have accuracy, generated and scored tokens
and scorer calls per problem, and the paired difference to greedy, and to best-of-N at the same number of generated
tokens, which is read from --samples shared solutions. A killed search is resumed by the same command, with any number
of processes. --out then holds results.jsonl (a row per problem and method, with its decisions), summary.json and
settings.json.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
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
    job.say(
        *notes(summary),
        *times(config.out, summary["problems"]),
        f"\nrows with decisions, settings and summary: {config.out}",
    )
    return 0


def print_summary(console: Any, summary: Mapping[str, Any]) -> None:
    """Tables of the methods: accuracy at what cost, differences, and, where there is that, accuracy by difficulty."""
    from rich.table import Column, Table

    from stepkd.statistics import percent, shown

    def show(heads: list[str], cells: Callable[[Mapping[str, Any]], list[str]], caption: str | None = None) -> None:
        columns = (Column(head, justify="right") for head in heads)
        table = Table(Column("method", overflow="fold"), *columns, caption=caption, caption_justify="left")
        for name, method in methods.items():
            table.add_row(name, *cells(method))
        console.print(table)

    def costs(method: Mapping[str, Any]) -> list[str]:
        means = [shown(method[cost], ".0f", gap=None) for cost in ("generated_tokens", "scored_tokens", "scorer_calls")]
        return [percent(method["accuracy"], "\n"), *means, shown(method["accuracy_per_1000_tokens"], ".2f", gap=None)]

    def differences(method: Mapping[str, Any]) -> list[str]:
        samples, used = method["budget"]["samples"], method["budget"]["used"]
        at = f"{samples:.1f}" + (f"\n(at {used:.0f})" if method["budget"]["clamped"] else "")
        minus = (method["minus_greedy"], *method["minus_best_of_n"].values())
        sure = ["\n(no interval)" * bool(each and each["low"] is None) for each in minus]
        found = [shown(each, "+.1f", scale=100, gap="\n") + more for each, more in zip(minus, sure, strict=True)]
        return [found[0], at, *found[1:]]

    methods, hard = summary["methods"], summary["difficulty"]
    where = f"{summary['model']} on {summary['benchmark']}"
    console.print(f"{where}: {summary['problems']} problems, 95% intervals", highlight=False, markup=False)
    heads = ["accuracy (%)", "tokens", "scored", "calls", "correct per\n1,000 tokens"]
    show(heads, costs, "tokens and calls per problem")
    votes = next(iter(methods.values()))["minus_best_of_n"]
    caption = (
        "paired, in percentage points; * best-of-N at the same number of generated tokens, that of N samples, "
        "or where (at) says another N, the nearest that there is"
    )
    show(["- greedy", "N", *(f"- {vote} *" for vote in votes)], differences, caption)
    if hard:
        bins = {name: count for name, count in hard["bins"].items() if count}
        heads = [f"{name}\n({count})" for name, count in bins.items()]
        caption = "accuracy (%) by the policy's pass rate (problems)"
        show(heads, lambda method: [percent(method["by_difficulty"][name], "\n") for name in bins], caption)


def notes(summary: Mapping[str, Any]) -> list[str]:
    """What a reader of the tables must know, a line each."""
    from stepkd.statistics import percent

    pool, problems, found, cheap = summary["pool"], summary["problems"], list[str](), list[str]()
    for name, method in summary["methods"].items():
        if (needs := method["budget"]["samples"]) > pool["samples"]:
            found.append(
                f"{name} draws as many tokens as {needs:.1f} samples, and is compared with best-of-{pool['samples']}, "
                f"which draws fewer: --samples {math.ceil(needs)} would reach its budget"
            )
        cheap += [name] * (needs < 1)
        counts = {
            f"of {problems} answers were cut off: see --sampling.max_new_tokens, --max_step_tokens": method["cut_off"],
            "solutions had no score, and ranked last": method["unscored"],
            "prompts about drafts left no room for an answer": method["no_room"],
        }
        found += [f"{name}: {count} {what}" for what, count in counts.items() if count]
        if "drafted" in method:
            found.append(
                f"{name}: {method['drafted']['value']:.0f} tokens of the small model per problem, which are in no "
                f"table, and {method['passes']['value']:.0f} forward passes of the policy"
            )
    if cheap:
        found.append(f"compared with one sample, which draws more tokens than they do: {', '.join(cheap)}")
    for name in ("majority", pool["reduction"], f"{pool['reduction']}_vote"):
        if (peak := pool["peaks"].get(name)) and peak["k"] < pool["ks"][-1] and (peak["fall"]["low"] or 0) > 0:
            found.append(
                f"best-of-N by {name} is highest at N={peak['k']}, picked on the same problems, and "
                f"{percent(peak['fall'])} percentage points lower at N={pool['ks'][-1]}"
            )
    return found


def times(out: str, problems: int) -> list[str]:
    """Seconds per problem of every method by the job's log, in a line; none where there is no log."""
    from stepkd.runs.job import LOG

    seconds = defaultdict[str, float](float)
    for path in sorted((Path(out) / LOG).glob("rank-*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):  # a line that a kill cut off
                if "unit" in (entry := json.loads(line)):
                    seconds[entry["unit"].rpartition("-")[0]] += entry["seconds"]
    shown = ", ".join(f"{name} {total / problems:.2f}" for name, total in seconds.items())
    return [f"seconds per problem (pool: of all methods that choose among it): {shown}"] if shown else []
