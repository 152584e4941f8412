r"""Score the steps of solutions: rollouts or step-labelled rows in, the same rows with scores out.

  stepkd score --model runs/prm --rollouts runs/sample/rollouts.jsonl --out scored.jsonl
  stepkd score --model judge:HuggingFaceTB/SmolLM2-135M-Instruct --rollouts rows.jsonl --out judged.jsonl
  stepkd score --model Qwen/Qwen2.5-Math-PRM-7B --rollouts rows.jsonl --out scored.jsonl \
      --reduction min --fit-temperature held_out.jsonl

Every row gets `step_scores` (a number in [0, 1] per step, null where there is none), `score` (one number for the
solution, null when it cannot be told) and `scorer` (what it came from). A killed run is resumed by the
same command, with any number of processes (torchrun, accelerate, srun); until it is finished, its parts lie in
`<out>.work`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from stepkd.cli.options import (
    TEMPLATE_HELP,
    add_model_arguments,
    add_scorer_arguments,
    say_share_is_done,
    scorer_from,
    start_job,
)
from stepkd.errors import check_choice

REDUCTIONS = ("auto", "product", "min", "mean", "last")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``stepkd score``."""
    what = parser.add_argument_group("what")
    what.add_argument(
        "--model",
        required=True,
        help="run folder, checkpoint, export or published reward model; or judge:MODEL, checker, arithmetic, prm:PATH, "
        "math-shepherd:PATH, qwen-prm:PATH, trl:PATH",
    )
    what.add_argument("--rollouts", required=True, help="file or data settings: rollouts, or rows with step texts")
    what.add_argument("--out", required=True, help="file of scored rows to write (.jsonl)")
    what.add_argument("--overwrite", action="store_true", help="replace an earlier result of this command in --out")
    how = parser.add_argument_group("scores")
    how.add_argument("--reduction", default="auto", help=f"{', '.join(REDUCTIONS)} (default: what suits the scorer)")
    how.add_argument(
        "--fit-temperature", metavar="ROWS", help="fit the temperature on these held-out labelled rows, and save it"
    )
    how.add_argument(
        "--segmenter", help="cuts solutions that come as one text (newline, blank_line, ...; default newline)"
    )
    how.add_argument("--template", help=TEMPLATE_HELP)
    add_scorer_arguments(how)
    run_on = parser.add_argument_group("machine")
    run_on.add_argument("--max-length", type=int, metavar="TOKENS", help="longest row; default: the model's context")
    add_model_arguments(run_on, "solutions read at once (default 32)")


def run(arguments: argparse.Namespace) -> int:
    """Run ``stepkd score``."""
    check_choice("reduction", arguments.reduction, REDUCTIONS)
    from stepkd.evaluation.score_rows import SOLUTIONS, TEMPERATURE, ScoreJob, score_file
    from stepkd.yaml_files import settings_from

    verbs = {SOLUTIONS: "scoring solutions", TEMPERATURE: "fitting the temperature"}
    console, launch, options = start_job(arguments, verbs)
    given = {
        "out": Path(arguments.out),
        "reduction": None if arguments.reduction == "auto" else arguments.reduction,
        "fit_on": arguments.fit_temperature,
    }
    job = settings_from(ScoreJob, vars(arguments) | {"model": scorer_from(arguments)} | given)
    summary = score_file(job, options=options)
    if not summary:
        return say_share_is_done(console, launch, "scored rows")
    print_summary(console, summary)
    console.print(f"\nscored rows: {job.out}", markup=False, soft_wrap=True)
    return 0


def print_summary(console: Any, summary: dict[str, Any]) -> None:
    """What was scored, and what was not."""
    lines = [
        f"{summary['rows']} solutions of {summary['problems']} problems, {summary['steps']} steps",
        f"mean score ({summary['reduction']}): {_number(summary['mean_score'])}",
    ]
    if summary["mean_score_right"] is not None or summary["mean_score_wrong"] is not None:
        right, wrong = _number(summary["mean_score_right"]), _number(summary["mean_score_wrong"])
        lines.append(f"  of right solutions {right}, of wrong ones {wrong}")
    if summary["temperature"] is not None:
        lines.append(f"temperature: {summary['temperature']:.4g}")
    cut = summary["unscored_rows"] - summary["unreadable_rows"]
    if cut:
        lines.append(
            f"not scored: {cut} solutions that do not fit into the model's context or --max-length (score null)"
        )
    if summary["unreadable_rows"]:
        lines.append(
            f"not scored: {summary['unreadable_rows']} solutions that could not be read (score null, see score_error), "
            f"for instance: {summary['unreadable_reason']}"
        )
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
