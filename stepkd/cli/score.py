r"""Score the steps of solutions: completions or step-labelled rows in, the same rows with scores out.

  stepkd score --scorer runs/prm --completions runs/samples --out runs/prm-scores
  stepkd score --scorer judge:HuggingFaceTB/SmolLM2-135M-Instruct --completions rows.jsonl --out runs/judged
  stepkd score --scorer QwenPRM --scorer.path Qwen/Qwen2.5-Math-PRM-7B --scorer.dtype bfloat16 \
      --completions rows.jsonl --reduction min --fit-temperature held_out.jsonl --out runs/scores

Every row of --out's results.jsonl has `step_scores` (a number in [0, 1] per step, null where there is none), `score`
(one number for the solution, null when it cannot be told) and `scorer` (what it came from). A killed run is resumed by
the same command, with any number of processes (torchrun, accelerate, srun).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stepkd.evaluation.config import ScoreConfig

CRITIQUES = "{critiques} critiques ({without_verdict} without a verdict), {generated_tokens} tokens generated"
"""What is said of a critic's cost."""


def run(config: ScoreConfig) -> int:
    """Run ``stepkd score``."""
    from stepkd.evaluation.score_rows import SOLUTIONS, TEMPERATURE, score_file
    from stepkd.runs.job import RESULTS_NAME

    config, job = config.start({SOLUTIONS: "scoring solutions", TEMPERATURE: "fitting the temperature"})
    summary = score_file(config, options=job)
    if not summary:
        return job.share_is_done("scored rows")
    job.say(*_summary_lines(summary), f"\nscored rows: {Path(config.out) / RESULTS_NAME}")
    return 0


def _summary_lines(summary: dict[str, Any]) -> Iterator[str]:
    """What was scored, and what was not."""
    yield f"{summary['rows']} solutions of {summary['problems']} problems, {summary['steps']} steps"
    yield f"mean score ({summary['reduction']}): {_number(summary['mean_score'])}"
    means = [summary["mean_score_correct"], summary["mean_score_incorrect"]]
    if means != [None, None]:
        yield "  of correct solutions {}, of incorrect ones {}".format(*map(_number, means))
    if "critiques" in summary:
        yield CRITIQUES.format(**summary["critiques"])
    if summary["temperature"] is not None:
        yield f"temperature: {summary['temperature']:.4g}"
    if cut := summary["unscored_rows"] - summary["unreadable_rows"]:
        yield f"not scored: {cut} solutions that do not fit into the model's context or scorer.max_length (score null)"
    if summary["unreadable_rows"]:
        yield (
            f"not scored: {summary['unreadable_rows']} solutions that could not be read (score null, see score_error), "
            f"for instance: {summary['unreadable_reason']}"
        )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
