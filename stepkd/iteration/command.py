"""Labelling and training as commands of stepkd: their options, and how they start under a launcher."""

from __future__ import annotations

import argparse
import shlex
import subprocess
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from stepkd.errors import ConfigError, StepkdError, nearest
from stepkd.labels.settings import LabelSpec

RENAMED = {"deadline_s": "--deadline", "max_rows": "--batch-size", "take": "--from"}
"""Settings whose option has another name."""
INHERITED = ("device", "dtype", "template", "extractors", "stop", "max_new_tokens", "max_rows", "deadline_s")
"""Settings of the labelling job that the pair job of the same iteration shares."""
DECIDED = frozenset(
    {"to", "out", "model", "problems", "rollouts", "seed", "convert", "consensus", "overwrite", "limit"}
)
"""Options of the pair job that the iteration gives."""
FROM_PROBLEMS = frozenset({"tree_preference"})
"""Pair jobs that draw their own solutions of the problems; the others read the labelled ones."""


def label_arguments(job: LabelSpec) -> list[str]:
    """The options of ``stepkd label`` that give this job."""
    settings = {name: value for name, value in vars(job).items() if name != "dedupe"}
    return option_words(settings) + ([] if job.dedupe else ["--keep-duplicates"])


def option_words(settings: Mapping[str, Any]) -> list[str]:
    """Settings as words of ``stepkd label``'s command line; None and empty ones are left out."""
    words: list[str] = []
    for name, value in settings.items():
        option = RENAMED.get(name, "--" + name.replace("_", "-"))
        if name == "stop":
            words += [part for text in value for part in (option, text)]
        elif isinstance(value, list | tuple):
            words += [option, *map(str, value)] if value else []
        elif isinstance(value, bool):
            words += [option] if value else []
        elif value is not None:
            words += [option, str(value)]
    return words


def pair_arguments(pairs: Mapping[str, Any], job: LabelSpec, *, out: str, seed: int) -> list[str]:
    """The command that makes preference pairs.

    Args:
        pairs: ``to``, and options of ``stepkd label`` by name.
        job: the labelling job of the same iteration, whose solutions are used.
        out: folder of the pair job.
        seed: keys what it draws.
    """
    source = {"problems": job.problems} if pairs["to"] in FROM_PROBLEMS else {"rollouts": job.out}
    settings = {name: getattr(job, name) for name in INHERITED} | dict(pairs)
    return ["label", *option_words(source | {"model": job.model, "out": out, "seed": seed} | settings)]


def check_pairs(pairs: Mapping[str, Any], job: LabelSpec) -> None:
    """Refuse settings of a pair job that ``stepkd label`` would not take.

    Raises:
        ConfigError: no such kind or option, or a value that is none.
    """
    from stepkd.labels.settings import PAIR_JOBS

    if pairs.get("to") not in PAIR_JOBS:
        hint = nearest(str(pairs.get("to")), PAIR_JOBS)
        raise ConfigError(f"pairs: to={pairs.get('to')!r} is no pair job.{hint} Known: {', '.join(PAIR_JOBS)}")
    known = sorted({action.dest for action in _parser()._actions} - DECIDED - {"help"})
    for name in pairs:
        if name != "to" and name not in known:
            raise ConfigError(f"pairs: no option {name!r}.{nearest(name, known)} Known: {', '.join(known)}")
    _parser().parse_args(pair_arguments(pairs, job, out="pairs", seed=0)[1:])


def run_label(arguments: Sequence[str]) -> None:
    """Run ``stepkd label`` in this process.

    Args:
        arguments: the command's words, ``label`` first.
    """
    from stepkd.commands import label

    label.run(_parser().parse_args(list(arguments[1:])))


def launch(launcher: str, arguments: Sequence[str], *, where: str, say: Callable[[str], None]) -> None:
    """Run one command of stepkd under a launcher.

    Args:
        launcher: the words before ``-m stepkd``.
        arguments: the command and its options.
        where: for the message.
        say: told the whole command.

    Raises:
        StepkdError: it failed; it has said why.
    """
    command = [*shlex.split(launcher), "-m", "stepkd", *arguments]
    say(f"  {shlex.join(command)}")
    code = subprocess.run(command, check=False).returncode
    if code:
        raise StepkdError(
            f"{where}: `stepkd {arguments[0]}` under the launcher ended with exit code {code}; its messages are above. "
            "Mend that and give the same command again"
        )


class _Parser(argparse.ArgumentParser):
    """The parser of ``stepkd label`` for words that stand in a settings file."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"pairs: {message}")


def _parser() -> argparse.ArgumentParser:
    from stepkd.commands import label

    parser = _Parser(prog="stepkd label", allow_abbrev=False)
    label.add_arguments(parser)
    return parser
