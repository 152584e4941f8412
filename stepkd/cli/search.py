r"""Compare test-time methods on a benchmark at what they cost: best-of-N, beam search, DVTS and others.

  stepkd search --config search/beam --model runs/sft --scorer runs/prm --benchmark gsm8k --limit 200 --out runs/beam
  stepkd search --config search/self_consistency --model HuggingFaceTB/SmolLM2-135M-Instruct --out runs/votes
  stepkd search --config tiny/search --out runs/tiny-search

Every method solves the same problems, greedy decoding beside it. The tables have accuracy, generated and scored tokens
and scorer calls per problem, and the paired difference to greedy, and to best-of-N at the same number of generated
tokens, which is read from --samples shared solutions. A killed search is resumed by the same command, with any number
of processes. --out then holds results.jsonl (a row per problem and method, with its decisions), summary.json and
settings.json.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
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
    """Tables of the methods: accuracy at what cost, differences, and, where there is that, accuracy by difficulty."""
    from rich.table import Column, Table

    from stepkd.statistics import percent, shown

    def show(heads: list[str], cells: Callable[[Mapping[str, Any]], list[str]], caption: str | None = None) -> None:
        columns = (Column(head, justify="right") for head in heads)
        table = Table(Column("method", no_wrap=True), *columns, caption=caption, caption_justify="left")
        for name, method in methods.items():
            table.add_row(name, *cells(method))
        console.print(table)

    def costs(method: Mapping[str, Any]) -> list[str]:
        means = [shown(method[cost], ".0f", gap=None) for cost in ("generated_tokens", "scored_tokens", "scorer_calls")]
        return [percent(method["accuracy"], "\n"), *means, percent(method["accuracy_per_1000_tokens"], None)]

    def differences(method: Mapping[str, Any]) -> list[str]:
        minus = [method["minus_greedy"], *method["minus_best_of_n"].values()]
        return ["-" if each is None else shown(each, "+.1f", scale=100, gap="\n") for each in minus]

    methods, hard = summary["methods"], summary["difficulty"]
    title = f"{summary['model']} on {summary['benchmark']}: {summary['problems']} problems, 95% intervals"
    console.print(title, highlight=False, markup=False)
    show(["accuracy (%)", "tokens", "scored", "calls", "% per 1,000\ntokens"], costs, "tokens and calls per problem")
    votes = next(iter(methods.values()))["minus_best_of_n"]
    caption = "paired, in percentage points; * best-of-N at the same number of generated tokens"
    show(["- greedy", *(f"- {vote} *" for vote in votes)], differences, caption)
    if hard:
        bins = {name: count for name, count in hard["bins"].items() if count}
        heads = [f"{name}\n({count})" for name, count in bins.items()]
        caption = "accuracy (%) by the policy's pass rate (problems)"
        show(heads, lambda method: [percent(method["by_difficulty"][name], "\n") for name in bins], caption)


def notes(summary: Mapping[str, Any]) -> list[str]:
    """What a reader of the tables must know, a line each."""
    from stepkd.statistics import percent

    pool, found = summary["pool"], list[str]()
    for name, method in summary["methods"].items():
        if (needs := method["budget"]["samples"]) > pool["samples"]:
            found.append(
                f"{name} draws as many tokens as {needs:.1f} samples, and is compared with best-of-{pool['samples']}: "
                f"--samples {math.ceil(needs)} would reach its budget"
            )
        counts = {"answers cut off": method["cut_off"], "solutions without a score": method["unscored"]}
        counts["prompts about drafts without room for an answer"] = method["no_room"]
        found += [f"{name}: {what}: {count}" for what, count in counts.items() if count]
        if "drafted" in method:
            found.append(
                f"{name}: {method['drafted']['value']:.0f} tokens of the small model per problem, which are in no "
                f"table, and {method['passes']['value']:.0f} forward passes of the policy"
            )
    last = pool["ks"][-1]
    for name, peak in pool["peaks"].items():
        if peak["k"] < last:
            fall = percent(peak["fall"])
            found.append(f"best-of-N by {name} is highest at N={peak['k']}, and {fall} lower at N={last}")
    return found
