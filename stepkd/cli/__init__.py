"""The ``stepkd`` command: one entry point for everything.

``fit``, ``validate``, ``test`` and ``predict`` go to Lightning's command line (recipes, ``--config``); every other
command is one file in :mod:`stepkd.cli`. Nothing heavy is imported before the command is known.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, get_type_hints

import stepkd
from stepkd.errors import ConfigError, MachineError, StepkdError, disk_error, nearest
from stepkd.runs.process import leave_group, rank_name, tell_agent

TRAINER_COMMANDS = {
    "fit": "train a model from a recipe",
    "validate": "held-out loss and sampled accuracy of a checkpoint",
    "test": "the same on the recipe's test data",
    "predict": "sample completions into a file",
}
COMMANDS = {
    "evaluate": "benchmark a model: gsm8k, math500, ...",
    "evaluate-prm": "judge a step scorer: ProcessBench F1, calibration, on any step-labelled set",
    "search": "compare test-time methods at their cost: best-of-N, beam search, DVTS, ...",
    "best-of-n": "accuracy of choosing among N samples by scorers, by vote and by both",
    "compare": "compare two evaluations problem by problem",
    "benchmarks": "list the benchmarks",
    "label": "label the steps of solutions: Monte-Carlo, exact checker, outcome, judge, reward model",
    "consensus": "keep of one labelling what another one agrees on, with the quality of both",
    "convert": "labelled rows to other kinds of rows: TRL's, Math-Shepherd's, feedback, pairs, demonstrations",
    "pairs": "make step preference pairs by sampling: Step-DPO's, or from searched trees",
    "score": "score the steps of solutions with a reward model, a judge or the exact checker",
    "cache-teacher": "write a teacher's most likely tokens for given completions, to distil without it",
    "iterate": "generate, label, train, evaluate, K times over, with one table of all models",
    "quickstart": "train and evaluate tiny models on this machine in minutes, nothing to download",
    "claims": "run the experiments that measure each method's effect, with verdicts",
    "recipes": "list, show or copy the recipes",
    "doctor": "look at this machine, its launcher and whether a recipe fits, before a job burns hours",
    "report": "write what runs left as one HTML page: curves, accuracy, plots, every solution step by step",
    "samples": "show solutions on the terminal, step by step",
    "export": "write a trained model as a folder that plain transformers loads",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; None takes those of the process.

    Returns:
        Exit code: 0 success, 1 failure while running, 2 a mistake in the command, the recipe or the data, 141 when the
        reader of the output (``head``) left.
    """
    try:
        try:
            return _main(list(sys.argv[1:] if argv is None else argv))
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        try:
            print(flush=True)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the interpreter's end
            return 141
        raise  # another pipe


def _main(arguments: list[str]) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in ("httpx", "fsspec", "urllib3", "datasets", "torch"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if "--safe" in arguments or os.environ.get("STEPKD_SAFE") == "1":
        arguments = [argument for argument in arguments if argument != "--safe"]
        import_module("stepkd.safe").enter()
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        print(f"stepkd {stepkd.__version__}")
        return 0
    _find_own_modules()
    command, *rest = arguments
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # libraries' bars would fill a log file with carriage returns
    try:
        if command in TRAINER_COMMANDS:
            code = int(import_module("stepkd.training.fit").run([command, *rest]))
            leave_group()
            return code
        if command in COMMANDS:
            module = import_module(f"stepkd.cli.{command.replace('-', '_')}")
            return _run(module, command, rest)
    except StepkdError as error:
        if not tell_agent(error):
            print(f"stepkd {command}{rank_name()}: {error}", file=sys.stderr)
        return 1 if isinstance(error, MachineError) else 2
    except Exception as error:
        words = disk_error(error)
        tell_agent(words or error)
        if words is None:
            raise
        print(f"stepkd {command}{rank_name()}: {words}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            f"\nstepkd {command}: interrupted; fit, evaluate, evaluate-prm, search, label, pairs, score, "
            "cache-teacher, iterate, claims and quickstart can be resumed",
            file=sys.stderr,
        )
        return 130
    hint = nearest(command, [*TRAINER_COMMANDS, *COMMANDS])
    print(f"stepkd: no command {command!r}.{hint} `stepkd --help` lists them", file=sys.stderr)
    return 2


def _run(module: Any, command: str, words: list[str]) -> int:
    """Parse a command's settings and run it; of a command with ``ACTIONS``, its first word chooses their class."""
    from stepkd.cli.parser import parse

    if (kinds := getattr(module, "ACTIONS", None)) is None:
        kind = get_type_hints(module.run)["config"]
        return int(module.run(parse(kind, words, command=command, description=module.__doc__)))
    word = words[0] if words else ""
    if word in ("", "-h", "--help"):
        lines = "\n".join(f"  {name:<10} {kind.__doc__}" for name, kind in kinds.items())
        print(f"usage: stepkd {command} {{{','.join(kinds)}}}\n\n{module.__doc__}\n{lines}")
        raise SystemExit(0 if word else 2)
    if word not in kinds:
        raise ConfigError(f"{word!r} is none of {', '.join(kinds)}.{nearest(word, kinds)}")
    described = f"{kinds[word].__doc__}"
    return int(module.run(parse(kinds[word], words[1:], command=f"{command} {word}", description=described)))


def _find_own_modules() -> None:
    """Put the current folder on the search path, behind all that is installed: one's own rewards, modules, callbacks.

    Not under ``--safe``, unless stepkd itself is there (a checkout that is not installed).
    """
    here = os.getcwd()
    in_checkout = os.path.dirname(os.path.dirname(os.path.abspath(stepkd.__file__))) == here
    if here not in sys.path and (in_checkout or os.environ.get("STEPKD_SAFE") != "1"):
        sys.path.append(here)


def _overview() -> str:
    commands = "\n".join(f"  {name:<14} {text}" for name, text in {**COMMANDS, **TRAINER_COMMANDS}.items())
    return f"""stepkd {stepkd.__version__}: step-level supervision for language-model reasoning

usage: stepkd COMMAND [options]        (stepkd COMMAND --help for each)

{commands}

  --safe         with any command: recipes may name no code outside stepkd and Lightning's own parts

first steps:
  stepkd quickstart
  stepkd recipes list
  stepkd fit --config tiny/sft --out runs/first"""
