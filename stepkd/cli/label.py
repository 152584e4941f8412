r"""Label the steps of solutions, compare two labellings, convert labelled rows, or make preference pairs.

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

--to without --convert samples: it is a job like labelling itself. A killed job is resumed by the same command, with any
number of processes, and ends with the same result. --out then holds labels.jsonl (or pairs.jsonl), summary.json,
settings.json and, where one was fitted, threshold.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepkd.cli.options import TEMPLATE_HELP, say_share_is_done, start_job
from stepkd.errors import ConfigError

if TYPE_CHECKING:
    from stepkd.labels.quality import LabelQuality

SAMPLED = {"step_preference": "rollouts", "tree_preference": "problems"}
"""Kinds of ``--to`` that sample, and the option that gives their rows."""
VERBS = {"solutions": "preparing solutions", "labels": "labelling", "pairs": "building pairs of"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``stepkd label``; their names are those of the settings, which know the defaults."""
    add = parser.add_argument_group("what").add_argument
    add("--problems", metavar="SPEC", help="problems to sample solutions of (file or data settings)")
    add("--rollouts", metavar="SPEC", help="solutions there are: a file, an earlier --out, data settings")
    add("--model", help="policy that samples, continues and tokenises; default: the one rollouts name")
    add("--limit", type=int, metavar="N", help="only the first N rows")
    add("--out", help="folder of the job (file of rows with --consensus and --convert)")
    add("--overwrite", action="store_true", help="delete an earlier job in --out and start again")
    add = parser.add_argument_group("labeller").add_argument
    add("--labeller", help="monte_carlo (default), checker, arithmetic, outcome, judge or prm")
    add("--rollouts-per-step", type=int, metavar="J", help="continuations per step (default 8)")
    add("--reduce", help="any (default), mean or first_error")
    add("--early-stop", action="store_true", help="no further continuations after a step's first success")
    add("--propagate-positive", action="store_true", help="steps before a correct one are correct too")
    add("--label-temperature", type=float, metavar="T", help="of continuations; default: --temperature")
    add("--given", help="checker: correct by the problem (truth) or by the steps (claims)")
    add("--outcome-scope", help="outcome: label the last step (default) or all")
    add("--judge", metavar="MODEL", help="judge, prm: the model that scores (as in stepkd score --scorer)")
    add("--judge-template", help="PRM: its prompt template (a name or YAML file); default: its own")
    add("--reference", action="store_true", help="judge: show it the gold solution")
    add(
        "--threshold",
        type=float,
        help="a step is correct from this score, or (--convert) this chance, on (default 0.5)",
    )
    add("--soft", action="store_true", help="judge, prm: label by scores; --convert: take the values")
    add = parser.add_argument_group("steps").add_argument
    add("--segmenter", help="default: the rows' own steps, else newline")
    add("--quantile", type=float, help="of a threshold fitted here (default 0.02)")
    add("--teacher", metavar="MODEL", help="second model, for the reject segmenter")
    add = parser.add_argument_group("sampling").add_argument
    add("--samples", type=int, metavar="K", help="solutions per problem (default 4)")
    add("--temperature", type=float, help="default 1 (step_preference: 0.8); 0 is greedy")
    add("--top-p", type=float, help="default 1, which is off (step_preference: 0.95)")
    add("--top-k", type=int, help="default 0, which is off")
    add("--max-new-tokens", type=int, help="default: the data's benchmark's")
    add("--stop", action="append", metavar="TEXT", help="ends a completion; may be repeated")
    add("--keep-duplicates", dest="dedupe", action="store_false", help="label equal solutions of a problem each")
    add("--template", help=TEMPLATE_HELP)
    add("--extractors", nargs="+", help="how answers are found, in order; default: the benchmark's")
    add("--deadline", dest="deadline_s", type=float, metavar="S", help="limit per graded answer (default 2)")
    add("--seed", type=int, help="default 0")
    add = parser.add_argument_group("machine").add_argument
    add("--dtype", choices=("float32", "bfloat16", "float16", "float64"), help="default: as stored")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    add("--batch-size", dest="max_rows", type=int, metavar="ROWS", help="completions decoded at once (default 64)")
    add("--wait", type=float, default=1800.0, metavar="S", help="longest wait for other processes (default 1800)")
    add = parser.add_argument_group("labelled rows").add_argument
    add("--consensus", nargs=2, metavar=("A", "B"), help="keep what two labellings agree on (rows of A)")
    add("--mode", default="first_error", help="agreement on first_error (default) or on steps")
    add("--truth", metavar="FILE", help="true labels: report precision and recall of both against them")
    add("--neutral", help="a rating of 0 becomes right (default), wrong or mask")
    _add_pair_arguments(parser)


def _add_pair_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("other kinds of rows").add_argument
    add("--convert", metavar="FILE", help="labelled rows to convert (a file, or the folder of a job)")
    add(
        "--to",
        metavar="KIND",
        help="of --convert: stepwise, trl, math_shepherd, balanced, binary, unpaired or preference; of --rollouts: "
        "step_preference; of --problems: tree_preference",
    )
    add("--max-pairs", type=int, metavar="N", help="per problem, or per solution (default 1; tree_preference: 8)")
    add("--chosen-steps", help="preference: chosen solutions may hold incorrect steps (any, default) or not (clean)")
    add("--from", dest="take", help="step_preference: solutions wrong (default) or all")
    add("--continuations", type=int, metavar="N", help="step_preference: per correct prefix (default 20)")
    add(
        "--check-step",
        action="store_true",
        help="step_preference: the better step must be correct, by --judge MODEL or else the tiny world's checker",
    )
    add = parser.add_argument_group("tree_preference: Monte-Carlo tree search (after arXiv 2405.00451)").add_argument
    add("--iterations", type=int, metavar="N", help="walks per decision (default 64)")
    add("--root-factor", type=int, metavar="N", help="times as many at the root (default 4)")
    add("--actions", type=int, metavar="N", help="steps sampled at a node (default 2)")
    add("--root-actions", type=int, metavar="N", help="steps sampled at the root; default: --actions")
    add("--depth", type=int, metavar="N", help="look-ahead in steps (default 3)")
    add("--max-steps", type=int, metavar="N", help="longest solution in steps (default 32)")
    add("--max-step-tokens", type=int, metavar="N", help="longest step (default 128)")
    add("--until", help="a walk ends where the solution does (end, the default) or at a new node (leaf)")
    add("--exploration", type=float, metavar="C", help="of PUCT (default 1)")
    add("--gamma", type=float, help="discount of what follows a step (default 1)")
    add("--outcome", type=float, metavar="X", help="for a correct end, against an incorrect one (default 1)")
    add("--damp-after", type=int, metavar="DEPTH", help="smaller estimates deeper down (default: off)")
    add(
        "--value",
        help="of a state: rollout (--rollouts-per-step continuations; default), scorer (--judge MODEL) or "
        "self_evaluation (the policy, or --judge, asked with the reference shown)",
    )
    add("--reduction", help="of scores: product, last (the newest step's), min or mean; default: by their meaning")
    add("--choose", help="the worse side: worst (default) or second best")
    add(
        "--keep-unsolved",
        dest="solved_only",
        action="store_false",
        help="pairs of trees without a correct solution, too",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run ``stepkd label``."""
    to = arguments.to
    if arguments.consensus and arguments.convert:
        raise ConfigError("--consensus and --convert are two commands: give one of them")
    if to in SAMPLED and arguments.convert:
        raise ConfigError(f"--to {to} samples continuations: give the rows as --{SAMPLED[to]}, not as --convert")
    if to not in SAMPLED and (to is not None) != (arguments.convert is not None):
        raise ConfigError(
            f"--convert FILE and --to KIND go together (--to {' and '.join(SAMPLED)} stand alone: they sample)"
        )
    if arguments.truth and not arguments.consensus:
        raise ConfigError("--truth goes with --consensus A B")
    if not arguments.out:
        raise ConfigError("give --out: a folder for a labelling job, a file of rows for --consensus and --convert")
    if arguments.consensus:
        return _consensus(arguments)
    return _convert(arguments) if arguments.convert else _job(arguments)


def _job(arguments: argparse.Namespace) -> int:
    """A labelling job or a pair job."""
    if arguments.to == "step_preference" and arguments.rollouts is None:
        raise ConfigError("--to step_preference needs labelled rollouts: --rollouts FOLDER (an --out of stepkd label)")
    if arguments.to == "step_preference" and arguments.problems is not None:
        raise ConfigError("--to step_preference starts from labelled rollouts: label --problems first, then drop it")
    if arguments.to == "tree_preference" and (arguments.problems is None or arguments.rollouts is not None):
        raise ConfigError("--to tree_preference searches solutions of problems: give --problems SPEC, not --rollouts")

    from stepkd.labels.job import run_label_job
    from stepkd.labels.pair_job import run_pair_job
    from stepkd.labels.settings import PAIR_JOBS, LabelConfig
    from stepkd.yaml_files import settings_from

    console, launch, options = start_job(arguments, VERBS)
    given = vars(arguments)
    if arguments.to is None:
        made, summary = "labels", run_label_job(settings_from(LabelConfig, given), options=options)
    else:
        made, summary = "pairs", run_pair_job(settings_from(PAIR_JOBS[arguments.to], given), options=options)
    if summary is None:
        return say_share_is_done(console, launch, made)
    (print_summary if arguments.to is None else print_pair_summary)(console, summary)
    _say(console, f"\n{made}, summary and settings: {arguments.out}")
    return 0


def print_summary(console: Any, summary: Mapping[str, Any]) -> None:
    """Counts, label balance per step, and what it cost."""
    _say(
        console,
        f"{summary['labelled']} of {summary['solutions']} solutions of {summary['problems']} problems labelled"
        + _dropped(summary),
        f"answers: {summary['right_answers']} right ({summary['right_answers_with_a_wrong_step']} of them with a wrong "
        f"step), {summary['wrong_answers']} wrong; {summary['cut_off']} solutions cut off",
        "" if summary["threshold"] is None else f"segmenter threshold: {summary['threshold']:.6g}",
        *(f"{name}: {facts}" for name in ("sampling", "labelling") if (facts := _facts(summary[name]))),
    )
    rows = []
    for row in [*summary["by_position"][:12], {"position": None} | summary["balance"]]:
        counts = [row[name] for name in ("right", "wrong", "unlabelled")]
        share = "-" if row["right_share"] is None else f"{row['right_share']:.1%}"
        rows.append(["all" if row["position"] is None else row["position"] + 1, sum(counts), *counts, share])
    _table(console, ("step", "solutions", "right", "wrong", "unlabelled", "share right"), rows)


def print_pair_summary(console: Any, summary: Mapping[str, Any]) -> None:
    """Counts, what was left out and why, and where in the solutions the pairs are."""
    common = ("items", "items_with_pairs", "pairs", "problems", "dropped", "by_position", "facts")
    more = {name: value for name, value in summary.items() if name not in common and value is not None}
    _say(
        console,
        f"{summary['pairs']} pairs of {summary['problems']} problems, from {summary['items_with_pairs']} of "
        f"{summary['items']} items" + _dropped(summary),
        _facts(summary["facts"]),
        ", ".join(f"{name.replace('_', ' ')} {_shown(name, value)}" for name, value in more.items()),
    )
    rows = [[part["position"] + 1, part["pairs"], f"{part['share']:.1%}"] for part in summary["by_position"][:12]]
    _table(console, ("step", "pairs", "share"), rows)


def _dropped(summary: Mapping[str, Any]) -> str:
    reasons = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in summary["dropped"].items())
    return f" (dropped: {reasons})" if reasons else ""


def _facts(facts: Mapping[str, int]) -> str:
    return ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in facts.items() if value)


def _shown(name: str, value: float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.1%}" if name.endswith("share") else f"{value:.2f}"


def _say(console: Any, *lines: str) -> None:
    for line in filter(None, lines):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _table(console: Any, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    from rich.table import Table

    table = Table()
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*map(str, row))
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
    from stepkd.yaml_files import settings_from

    options = settings_from(ConvertOptions, vars(arguments))
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
    facts = (
        *("precision", "recall", "error_precision", "error_recall", "balanced_accuracy", "always_positive"),
        *("first_error_accuracy", "recoverable"),
    )
    shown = [(fact.replace("_", " "), getattr(quality, fact)) for fact in facts]
    texts = [f"{fact} {'-' if value is None else f'{value.value:.1%}'}" for fact, value in shown]
    print(f"{name}: {', '.join(texts)}  ({quality.solutions} solutions, {quality.steps} steps up to the first error)")
