r"""Label the steps of solutions, compare two labellings, or convert labelled rows.

  stepkd label --labeller monte_carlo --model MODEL --problems gsm8k:split=train --samples 8 --rollouts-per-step 8 \
      --out runs/labels
  stepkd label --labeller judge --judge MODEL --rollouts runs/labels --out runs/judged
  stepkd label --labeller checker --model MODEL --problems task:task=modular,n=500 --out runs/true
  torchrun --standalone --nproc_per_node 8 -m stepkd label ...       (shards the work over 8 processes)
  stepkd label --consensus runs/labels runs/judged --truth runs/true --out agreed.jsonl
  stepkd label --convert agreed.jsonl --to trl --out trl.jsonl
  stepkd label --convert runs/labels --to binary --out feedback.jsonl           (KTO and Step-KTO; also: unpaired)
  stepkd label --convert runs/labels --to preference --max-pairs 2 --out pairs.jsonl                        (DPO)
  stepkd label --rollouts runs/true --to step_preference --continuations 20 --check-step --out runs/pairs   (Step-DPO)
  stepkd label --problems gsm8k:split=train --model MODEL --to tree_preference --out runs/tree              (MCTS-DPO)

--to without --convert samples: it is a job like labelling itself. A killed job goes on where it stood when the same
command is given again, with any number of processes, and ends with the same result. --out then holds labels.jsonl (or
pairs.jsonl), summary.json, manifest.json and, where one was fitted, threshold.json.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepkd.commands.label_pairs import PAIR_JOBS, add_pair_arguments, print_pair_summary
from stepkd.commands.score import TEMPLATE_HELP
from stepkd.errors import ConfigError
from stepkd.runs.progress import WorkLine

if TYPE_CHECKING:
    from stepkd.labels.quality import LabelQuality
    from stepkd.labels.settings import LabelSpec
    from stepkd.runs import LaunchInfo


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``stepkd label``."""
    what = parser.add_argument_group("what")
    what.add_argument("--problems", metavar="SPEC", help="problems to sample solutions of (file or data settings)")
    what.add_argument("--rollouts", metavar="SPEC", help="solutions there are: a file, an earlier --out, data settings")
    what.add_argument("--model", help="policy that samples, continues and tokenises; default: the one rollouts name")
    what.add_argument("--limit", type=int, metavar="N", help="only the first N rows")
    what.add_argument("--out", help="folder of the job (file of rows with --consensus and --convert)")
    what.add_argument("--overwrite", action="store_true", help="delete an earlier job in --out and start again")
    who = parser.add_argument_group("labeller")
    who.add_argument(
        "--labeller", default="monte_carlo", help="monte_carlo (default), checker, arithmetic, outcome, judge or prm"
    )
    who.add_argument("--rollouts-per-step", type=int, default=8, metavar="J", help="continuations per step (default 8)")
    who.add_argument("--reduce", default="any", help="any (default), mean or first_error")
    who.add_argument("--early-stop", action="store_true", help="no further continuations after a step's first success")
    who.add_argument("--propagate-positive", action="store_true", help="steps before a right one are right too")
    who.add_argument("--label-temperature", type=float, metavar="T", help="of continuations; default: --temperature")
    who.add_argument("--given", default="truth", help="checker: right by the problem (truth) or by the steps (claims)")
    who.add_argument("--outcome-scope", default="last", help="outcome: label the last step (default) or all")
    who.add_argument("--judge", metavar="MODEL", help="judge, prm: the model that scores (as in stepkd score --model)")
    who.add_argument("--judge-template", help="PRM: its prompt template (a name or YAML file); default: its own")
    who.add_argument("--reference", action="store_true", help="judge: show it the gold solution")
    who.add_argument(
        "--threshold",
        type=float,
        default=0.5,
        help="a step is correct from this score, or (--convert) this chance, on (default 0.5)",
    )
    who.add_argument("--soft", action="store_true", help="judge, prm: label by scores; --convert: take the values")
    steps = parser.add_argument_group("steps")
    steps.add_argument("--segmenter", help="default: the rows' own steps, else newline")
    steps.add_argument("--quantile", type=float, default=0.02, help="of a threshold fitted here (default 0.02)")
    steps.add_argument("--teacher", metavar="MODEL", help="second model, for the reject segmenter")
    _add_sampling(parser)
    after = parser.add_argument_group("labelled rows")
    after.add_argument("--consensus", nargs=2, metavar=("A", "B"), help="keep what two labellings agree on (rows of A)")
    after.add_argument("--mode", default="first_error", help="agreement on first_error (default) or on steps")
    after.add_argument("--truth", metavar="FILE", help="true labels: report precision and recall of both against them")
    after.add_argument("--neutral", default="right", help="a rating of 0 becomes right (default), wrong or mask")
    add_pair_arguments(parser)


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    how = parser.add_argument_group("sampling")
    how.add_argument("--samples", type=int, default=4, metavar="K", help="solutions per problem (default 4)")
    how.add_argument("--temperature", type=float, help="default 1 (step_preference: 0.8); 0 is greedy")
    how.add_argument("--top-p", type=float, help="default 1, which is off (step_preference: 0.95)")
    how.add_argument("--top-k", type=int, default=0)
    how.add_argument("--max-new-tokens", type=int, help="default: the data's benchmark's")
    how.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends a completion; may be repeated")
    how.add_argument("--keep-duplicates", action="store_true", help="label equal solutions of a problem each")
    how.add_argument("--template", help=TEMPLATE_HELP)
    how.add_argument("--extractors", nargs="+", help="how answers are found, in order; default: the benchmark's")
    how.add_argument("--deadline", type=float, default=2.0, metavar="S", help="limit per graded answer (default 2)")
    how.add_argument("--seed", type=int, default=0)
    run_on = parser.add_argument_group("machine")
    run_on.add_argument("--dtype", choices=("float32", "bfloat16", "float16", "float64"), help="default: as stored")
    run_on.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    run_on.add_argument("--batch-size", type=int, default=64, metavar="ROWS", help="completions decoded at once")
    run_on.add_argument(
        "--wait", type=float, default=1800.0, metavar="S", help="longest wait for other processes (default 1800)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run ``stepkd label``."""
    modes = [name for name in ("consensus", "convert") if getattr(arguments, name)]
    if len(modes) > 1:
        raise ConfigError("--consensus and --convert are two commands: give one of them")
    sampled = arguments.to in PAIR_JOBS
    if sampled and arguments.convert:
        rows = "problems" if arguments.to == "tree_preference" else "rollouts"
        raise ConfigError(f"--to {arguments.to} samples continuations: give the rows as --{rows}, not as --convert")
    if not sampled and (arguments.to is not None) != (arguments.convert is not None):
        raise ConfigError(
            f"--convert FILE and --to KIND go together (--to {' and '.join(PAIR_JOBS)} stand alone: they sample)"
        )
    if arguments.truth and not arguments.consensus:
        raise ConfigError("--truth goes with --consensus A B")
    if not arguments.out:
        raise ConfigError("give --out: a folder for a labelling job, a file of rows for --consensus and --convert")
    if arguments.consensus:
        return _consensus(arguments)
    if arguments.convert:
        return _convert(arguments)
    return _job(arguments)


def _job(arguments: argparse.Namespace) -> int:
    """A labelling job or a pair job."""
    from rich.console import Console

    from stepkd.runs import check_launch
    from stepkd.runs.process import quiet_libraries

    quiet_libraries()
    launch = check_launch()
    console = Console()

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    options: dict[str, Any] = {
        "rank": launch.rank,
        "world_size": launch.world_size,
        "launch": _launch_id(os.environ),
        "overwrite": arguments.overwrite,
        "wait_s": arguments.wait,
        "report": _reporter(console, launch),
        "say": say,
    }
    made = "labels" if arguments.to is None else "pairs"
    if arguments.to is None:
        from stepkd.labels.job import run_label_job

        summary = run_label_job(_spec(arguments, launch), **options)
    else:
        summary = PAIR_JOBS[arguments.to](arguments, common_settings(arguments, launch), options)
    if summary is None:
        say(f"rank {launch.rank} has done its share; the last rank to finish writes the {made}")
        return 0
    (print_summary if arguments.to is None else print_pair_summary)(console, summary)
    say(f"\n{made}, summary and manifest: {arguments.out}")
    return 0


def _spec(arguments: argparse.Namespace, launch: LaunchInfo) -> LabelSpec:
    from stepkd.labels.settings import LabelSpec

    same = (
        *("problems", "rollouts", "labeller", "rollouts_per_step", "reduce", "early_stop", "propagate_positive"),
        *("label_temperature", "given", "outcome_scope", "judge", "judge_template", "reference", "threshold", "soft"),
        *("samples", "segmenter", "quantile", "teacher"),
    )
    return LabelSpec(
        **{name: getattr(arguments, name) for name in same},
        **common_settings(arguments, launch),
        dedupe=not arguments.keep_duplicates,
    )


def common_settings(arguments: argparse.Namespace, launch: LaunchInfo) -> dict[str, Any]:
    """What every job has settings for (:class:`~stepkd.labels.settings.JobSpec`), as given."""
    same = ("out", "model", "limit", "top_k", "max_new_tokens", "template", "dtype", "seed")
    left_open = {name: getattr(arguments, name) for name in ("temperature", "top_p")}
    return {name: getattr(arguments, name) for name in same} | {
        **{name: value for name, value in left_open.items() if value is not None},
        "stop": tuple(arguments.stop),
        "extractors": tuple(arguments.extractors) if arguments.extractors else None,
        "deadline_s": arguments.deadline,
        "device": _device(arguments.device, launch),
        "max_rows": arguments.batch_size,
    }


def _device(name: str, launch: LaunchInfo) -> str:
    """One GPU per process where there are several."""
    import torch

    if name == "auto" and launch.local_world_size > 1 and torch.cuda.is_available():
        return f"cuda:{launch.local_rank % torch.cuda.device_count()}"
    return name


def _launch_id(environ: Mapping[str, str]) -> str | None:
    """A word that all processes of this launch share and no other launch has, where the launcher gives one."""
    run = environ.get("TORCHELASTIC_RUN_ID", "none")
    if run != "none":
        return f"elastic:{run}"
    job, step = environ.get("SLURM_JOB_ID"), environ.get("SLURM_STEP_ID")
    return f"slurm:{job}.{step}" if job and step else None


def _reporter(console: Any, launch: LaunchInfo) -> Any:
    rank = f"rank {launch.rank}: " if launch.world_size > 1 else ""
    verbs = {"solutions": "preparing solutions", "labels": "labelling", "pairs": "building pairs of"}
    line = WorkLine(console, redraw=launch.world_size == 1)

    def report(phase: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        shown = "".join(f"  {name} {value:.1%}" for name, value in figures.items())
        line.show(f"{rank}{verbs[phase]}", done, total, shown)

    return report


def print_summary(console: Any, summary: Mapping[str, Any]) -> None:
    """Counts, label balance per step, and what it cost."""
    from rich.table import Table

    dropped = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in summary["dropped"].items())
    lines = [
        f"{summary['labelled']} of {summary['solutions']} solutions of {summary['problems']} problems labelled"
        + (f" (dropped: {dropped})" if dropped else ""),
        f"answers: {summary['right_answers']} right ({summary['right_answers_with_a_wrong_step']} of them with a wrong "
        f"step), {summary['wrong_answers']} wrong; {summary['cut_off']} solutions cut off",
    ]
    if summary["threshold"] is not None:
        lines.append(f"segmenter threshold: {summary['threshold']:.6g}")
    for name in ("sampling", "labelling"):
        facts = [f"{value:,} {key.replace('_', ' ')}" for key, value in summary[name].items() if value]
        lines += [f"{name}: {', '.join(facts)}"] if facts else []
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    table = Table()
    for column in ("step", "solutions", "right", "wrong", "unlabelled", "share right"):
        table.add_column(column, justify="right")
    shown = summary["by_position"][:12]
    for row in [*shown, {"position": None} | summary["balance"]]:
        counts = [row[name] for name in ("right", "wrong", "unlabelled")]
        share = "-" if row["right_share"] is None else f"{row['right_share']:.1%}"
        label = "all" if row["position"] is None else str(row["position"] + 1)
        table.add_row(label, str(sum(counts)), *map(str, counts), share)
    console.print(table)


def _consensus(arguments: argparse.Namespace) -> int:
    from stepkd.labels.consensus import consensus_filter, report_on
    from stepkd.runs.files import write_jsonl

    names = tuple(arguments.consensus)
    first, second = (_labelled(name) for name in names)
    agreed = consensus_filter(first, second, mode=arguments.mode, names=(names[0], names[1]))
    _print_counts(agreed.counts)
    if not agreed.rows:
        raise ConfigError("the two labellings agree on no solution: nothing was written")
    if arguments.truth:
        kept = {"A": first, "B": second, "agreed": agreed.rows}
        for name, quality in report_on(_labelled(arguments.truth), kept).items():
            _print_quality(name, quality)
    written = write_jsonl(Path(arguments.out), agreed.rows)
    print(f"{written} rows in {arguments.out}")
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    from stepkd.labels.convert import CONVERTERS, convert_rows
    from stepkd.labels.feedback import ConvertOptions

    same = ("soft", "neutral", "threshold", "seed", "chosen_steps")
    limit = {} if arguments.max_pairs is None else {"max_pairs": arguments.max_pairs}
    options = ConvertOptions(**{name: getattr(arguments, name) for name in same}, **limit)
    converted = convert_rows(_labelled(arguments.convert), arguments.to, options)
    written = CONVERTERS[arguments.to].write(converted.rows, Path(arguments.out))
    _print_counts(converted.counts)
    print(f"{written} rows in {arguments.out}")
    return 0


def _labelled(word: str) -> list[dict[str, Any]]:
    from stepkd.data.spec import load_rows, parse_spec

    return load_rows(parse_spec(word))


def _print_counts(counts: Mapping[str, int]) -> None:
    print(", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items()))


def _print_quality(name: str, quality: LabelQuality) -> None:
    facts: Sequence[str] = (
        *("precision", "recall", "error_precision", "error_recall", "balanced_accuracy", "always_positive"),
        *("first_error_accuracy", "recoverable"),
    )
    shown = {fact: getattr(quality, fact) for fact in facts}
    texts = [
        f"{fact.replace('_', ' ')} {'-' if value is None else f'{value.value:.1%}'}" for fact, value in shown.items()
    ]
    print(f"{name}: {', '.join(texts)}  ({quality.solutions} solutions, {quality.steps} steps up to the first error)")
