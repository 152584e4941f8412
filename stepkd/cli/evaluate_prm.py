r"""Judge a step scorer: does it find the first incorrect step (ProcessBench F1), or every one (PRMBench's PRMScore),
are its scores calibrated, and do they follow a step's place or length?

  stepkd evaluate-prm --scorer runs/prm --out runs/prm-processbench
  stepkd evaluate-prm --scorer runs/prm --processbench data/processbench --sets gsm8k olympiadbench --out runs/prm-pb
  stepkd evaluate-prm --scorer judge:HuggingFaceTB/SmolLM2-135M-Instruct --sets prm800k:path=data/prm800k \
      --limit 200 --out runs/judge-prm800k
  stepkd evaluate-prm --scorer runs/prm --sets prmbench:path=data/prmbench --limit 12 --out runs/prm-prmbench
  stepkd evaluate-prm --config parity/qwen2.5-math-prm-7b --check_parity --out runs/parity-prm
  stepkd compare runs/prm-processbench runs/judge-processbench

Recipes of parity/ hold a published mean F1 of ProcessBench's subsets, which --check_parity compares as stepkd evaluate
does. A killed run is resumed by the same command, with any number of processes. --out then holds results.jsonl (a line
per solution with its step scores), summary.json, settings.json and figures.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stepkd.cli.score import CRITIQUES
from stepkd.evaluation.config import EvaluatePRMConfig
from stepkd.statistics import percent, shown


def run(config: EvaluatePRMConfig) -> int:
    """Run ``stepkd evaluate-prm``."""
    from stepkd.evaluation.score_rows import SOLUTIONS, evaluate_process

    config, job = config.start({SOLUTIONS: "scoring"})
    summary = evaluate_process(config, options=job)
    if not summary:
        return job.share_is_done("results")
    _print_process(job.console, summary)
    if config.figures:
        job.say(*(f"figure: {path}" for path in _write_figures(summary, Path(config.out))))
    job.say(f"\nper-solution scores, settings and summary: {config.out}")
    return config.parity(summary["mean"]["f1"] if config.reference else {}, job.say)


def _write_figures(summary: dict[str, Any], out: Path) -> Iterator[Path]:
    """Reliability and argmin figures of every set, each drawn when its path is asked for."""
    from stepkd.evaluation.figures import argmin_histogram, reliability_diagram
    from stepkd.evaluation.score_rows import figure_names

    for name, section in summary["sets"].items():
        reliability, argmin = figure_names(name)
        yield reliability_diagram(section["calibration"], out / reliability)
        if section["argmin"] is not None:
            yield argmin_histogram(section["argmin"], out / argmin)


def _print_process(console: Any, summary: dict[str, Any]) -> None:
    """One table of F1 with baselines per set, one of step metrics."""
    from rich.table import Table

    console.print(f"{summary['model']} on {summary['benchmark']}", highlight=False, markup=False)
    table = Table(title="first incorrect step, 95% intervals", title_justify="left")
    for column in ("set", "rule", "F1", "with an error", "all correct"):
        table.add_column(column, justify="left" if column in ("set", "rule") else "right", overflow="fold")
    for name, section in summary["sets"].items():
        label = f"{name}\n{section['solutions']} solutions"
        if section["unscored_solutions"]:
            how = "are misses" if "predicted" in section else "left out"
            label += f"\n({section['unscored_solutions']} more {how}:\na step has no score)"
        if section["unknown_first_error"]:
            label += f"\n({section['unknown_first_error']} not in F1: labels\nmissing before an error)"
        rules = [(f"below {section['fixed']['threshold']:.2f}", section["fixed"], "\n")]
        if "predicted" in section:
            rules.append(("the critic's own, by vote", section["predicted"], "\n"))
        if "tuned" in section:
            where = "here: optimistic" if section["tuned"]["optimistic"] else f"on {summary['tuned_on']}"
            rules.append((f"below {section['tuned']['threshold']:.2f},\ntuned {where}", section["tuned"], "\n"))
        baselines = [(f"{rule} (baseline)", found, None) for rule, found in section["baselines"].items() if found]
        for rule, found, gap in [*rules, *baselines]:
            shares = (percent(found[key], gap) for key in ("f1", "acc_error", "acc_correct"))
            table.add_row(label, rule, *shares, style="dim" if gap is None else None)
            label = ""
        table.add_section()
    if (mean := summary["mean"]) is not None and mean["sets"] > 1:
        shares = (percent(mean[key], "\n") for key in ("f1", "acc_error", "acc_correct"))
        own = any("predicted" in section for section in summary["sets"].values())
        rule = "the critic's own" if own else f"below {summary['threshold']:.2f}"
        table.add_row(f"mean of\n{mean['sets']} subsets", rule, *shares)
    console.print(table)
    for name, section in summary["sets"].items():
        if section["prm_score"] is not None:
            console.print(_prm_score_table(name, section["prm_score"]))
    steps = Table(title="steps up to and including the first error", title_justify="left")
    names = list(summary["sets"])
    steps.add_column("metric")
    for name in names:
        steps.add_column(name, justify="right", overflow="fold")
    for title, group, key, show in _STEP_ROWS:
        groups = (summary["sets"][name][group] for name in names)
        cells = ["-" if found is None else show(found[key]) for found in groups]
        if set(cells) != {"-"}:
            steps.add_row(title, *cells)
    console.print(steps)
    for name, section in summary["sets"].items():
        if "critiques" in section:
            console.print(f"{name}: {CRITIQUES.format(**section['critiques'])}", markup=False, highlight=False)
    for what, why in summary["undefined"].items():
        console.print(f"no {what.replace('_', ' ')}: {why}", markup=False, highlight=False)


def _prm_score_table(name: str, found: dict[str, Any]) -> Any:
    """PRMScore of all classes and of each, beside both accuracies."""
    from rich.table import Table

    table = Table(title=f"{name}: PRMScore over all steps, 95% intervals", title_justify="left")
    if ignored := found["all"]["ignored_errors"]:
        table.caption = f"{ignored} error numbers lie behind the last step and count no step"
    for column in ("class", "PRMScore", "correct steps", "incorrect steps", "always\npositive", "random"):
        table.add_column(column, justify="left" if column == "class" else "right", overflow="fold")
    for kind, each in found.items():
        label = f"{kind}\n{each['solutions']} solutions"
        shares = (percent(each[key], "\n") for key in ("score", "acc_correct", "acc_incorrect"))
        table.add_row(label, *shares, *(percent(each["baselines"][rule]) for rule in ("always positive", "random")))
    return table


_STEP_ROWS: tuple[tuple[str, str, str, Any], ...] = (
    ("steps", "steps", "steps", str),
    ("correct (%)", "steps", "positive_share", percent),
    ("AUROC", "steps", "auroc", shown),
    ("accuracy (%)", "steps", "accuracy", percent),
    ("balanced accuracy (%)", "steps", "balanced_accuracy", percent),
    ("ECE", "calibration", "ece", shown),
    ("Brier", "calibration", "brier", shown),
    ("Brier skill", "calibration", "skill_base_rate", shown),
    ("lowest score is last (%)", "argmin", "share_last", percent),
    ("  expected by chance", "argmin", "expected_last", percent),
    ("score against step number\n(correct steps, rank corr.)", "bias", "position", shown),
    ("score against step length\n(correct steps, rank corr.)", "bias", "length", shown),
    ("first error is called late\nby (steps)", "bias", "lateness", shown),
    ("score falls when dependent\nsteps are swapped (%)", "order_swap", "drop_rate", percent),
    ("score moves when independent\nsteps are swapped (%)", "independent_swap", "change_rate", percent),
)
"""Title, group and key in a set's summary, how it is shown; what no set has is left out."""
