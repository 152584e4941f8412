"""Fitting as a function, and the Trainer's commands: LightningCLI with stepkd's run folders, guard and defaults.

:func:`fit` and :func:`check_fit` take recipes and settings, :func:`run` the words of ``stepkd fit``, ``validate``,
``test`` and ``predict``. All of them parse, refuse and train alike.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, reduce
from importlib import import_module
from operator import or_
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
import yaml
from jsonargparse import Namespace, set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import Callback, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from stepkd.data.config import DataConfig
from stepkd.data.datamodule import StepData
from stepkd.errors import ConfigError, MachineError, StepkdError
from stepkd.models.source import find_checkpoint, no_model
from stepkd.modules.base import StepModule
from stepkd.modules.dpo import DPOModule
from stepkd.modules.gkd import GKDModule
from stepkd.modules.kdrl import KDRLModule
from stepkd.modules.kto import ImplicitPRMModule, KTOModule, StepKTOModule
from stepkd.modules.prm import PRMModule
from stepkd.modules.sft import SFTModule
from stepkd.runs.files import write_file
from stepkd.runs.launcher import check_launch, trainer_defaults
from stepkd.runs.logger import JsonlLogger, place_loggers
from stepkd.runs.process import Preempted, quiet_libraries
from stepkd.runs.rundir import RunDir, changed_settings, find_last_checkpoint, free_path, recipe_settings, short_name
from stepkd.safe import refuse_credentials
from stepkd.settings import OneLineErrors, explain, show_help, user_mistake, with_recipe_files
from stepkd.training.checkpoints import (
    AtomicCheckpointIO,
    BestCheckpoint,
    CheckpointConfig,
    CompletionFile,
    LastCheckpoint,
    RunFacts,
)
from stepkd.training.failures import explained
from stepkd.training.progress import StepProgress
from stepkd.training.trainer_settings import check_trainer_settings
from stepkd.yaml_files import nested

DATA_MODULES = (StepData,)
METHODS = (SFTModule, PRMModule, DPOModule, KTOModule, StepKTOModule, ImplicitPRMModule, GKDModule, KDRLModule)
"""Imported so that ``--data.help`` and ``--model.help`` list them and ``--data`` and ``--model`` take their names."""
_HINTS = inspect.unwrap(Trainer.__init__).__annotations__
for _name, _hint in _HINTS.items():
    # ``typing`` keeps one order of two types for a whole process, that of the library which named them first. With
    # float before int, ``limit_val_batches: 1`` would be 1.0, all batches.
    if {int, float} <= set(get_args(_hint)):
        _HINTS[_name] = reduce(or_, [int, float, *(each for each in get_args(_hint) if each not in (int, float))])
DEFAULTS = {"max_epochs": -1, "num_sanity_val_steps": 0, "log_every_n_steps": 1, "enable_model_summary": False}


class FitResult(NamedTuple):
    """How a fit ended."""

    folder: Path
    """The run folder."""
    status: Literal["finished", "stopped"]
    """``stopped``: SIGTERM ended it with its state saved, for a later start with ``resume``."""
    steps: int
    """Optimiser steps that the run has taken, those before a resume included."""


class CheckedFit(NamedTuple):
    """What the settings of a fit describe; nothing is loaded yet."""

    module: StepModule
    data: Any
    """The data module."""
    trainer: dict[str, Any]
    """Arguments of the Trainer."""


def fit(
    recipes: Sequence[str | Path] = (),
    settings: Mapping[str, Any] | None = None,
    *,
    out: str | Path,
    resume: bool = False,
    overwrite: bool = False,
) -> FitResult:
    """Train as ``stepkd fit`` does; only progress is printed.

    Args:
        recipes: files, or names of ``stepkd recipes list``; later ones override earlier ones.
        settings: nested as in a recipe, or by dotted name (``trainer.max_steps``); they override all recipes.
        out: the run folder.
        resume: continue the run in it; starts fresh when there is nothing to continue.
        overwrite: delete what an earlier run left in it.

    Raises:
        StepkdError: what ``stepkd fit`` would report. The run folder tells of a failure too, or is removed where
            nothing had begun.
    """
    flags = [f"--out={out}", f"--resume={str(resume).lower()}", f"--overwrite={str(overwrite).lower()}"]
    cli = _run(["fit", *_words(recipes, settings), *flags], quiet=True)
    assert cli.run_dir is not None
    return FitResult(cli.run_dir.path, cli.status, cli.trainer.global_step)


def validate(recipes: Sequence[str | Path] = (), settings: Mapping[str, Any] | None = None) -> dict[str, float]:
    """Measure as ``stepkd validate`` does.

    Args:
        recipes, settings: as for :func:`fit`.

    Returns:
        What it measured: ``val/loss``, ``val/accuracy``, ...

    Raises:
        StepkdError: what ``stepkd validate`` would report.
    """
    cli = _run(["validate", *_words(recipes, settings), "--verbose=false"], quiet=True)
    return {name: float(value) for name, value in cli.trainer.callback_metrics.items()}


def check_fit(
    recipes: Sequence[str | Path] = (), settings: Mapping[str, Any] | None = None, *, words: Sequence[str] = ()
) -> CheckedFit:
    """Parse the settings of a fit and build its module and data, without a model, a trainer or a run folder.

    Args:
        recipes, settings: as for :func:`fit`.
        words: more of them as words of ``stepkd fit``.

    Raises:
        StepkdError: what ``stepkd fit`` would refuse before it reads data or loads a model.
    """
    cli = StepkdCLI()
    try:
        cli.start([*_words(recipes, settings), *words], run=False)
    except (ValueError, TypeError) as error:
        if (mistake := user_mistake(error)) is not None:
            raise mistake from error
        raise
    return CheckedFit(cli.model, cli.datamodule, cli.config.trainer.as_dict())


def _words(recipes: Sequence[str | Path], settings: Mapping[str, Any] | None) -> list[str]:
    words = [word for recipe in recipes for word in ("--config", str(recipe))]
    return [*words, "--config", yaml.safe_dump(nested(settings), sort_keys=False)] if settings else words


def run(words: Sequence[str]) -> int:
    """Parse and run one Trainer command; see ``stepkd fit --help``.

    Returns:
        Its exit code.
    """
    asks_help = any(word == "-h" or word.partition("=")[0].endswith("help") for word in words)
    set_parsing_settings(docstring_parse_attribute_docstrings=asks_help)  # a second that a run need not wait
    return _run(words).exit_code


def _run(words: Sequence[str], *, quiet: bool = False) -> StepkdCLI:
    cli = StepkdCLI(quiet=quiet)
    try:
        cli.start(words)
    except Preempted as stopped:
        cli.mark_stopped(stopped)
    except BaseException as error:  # an interrupted run is recorded too
        last = None if cli.last is None else cli.last.path
        told: StepkdError | None = explained(error, getattr(cli, "model", None), last)
        if isinstance(error, MisconfigurationException):
            told = ConfigError(str(error))
        cli.mark_failed(told or error)
        root = told or user_mistake(error)
        if root is not None and root is not error:
            raise root from error
        if isinstance(error, SystemExit | KeyboardInterrupt) and cli.subcommand is not None:
            raise KeyboardInterrupt from error  # Lightning turns Ctrl-C into an exit
        raise
    return cli


@dataclass(frozen=True)
class RunOptions:
    """This start of a run; nothing here changes what the run learns"""

    out: str | None = None
    """Run folder, which fit and predict need; a path that does not exist yet, or with resume that of the run."""
    resume: bool = False
    """Continue the run in ``out``; one that has no checkpoint yet starts afresh."""
    resume_with: str | None = None
    """Resume although these settings changed, names with commas between them, for instance optimizer.lr,data; any
    others that decide what the run learns are refused."""
    overwrite: bool = False
    """Delete the earlier run in ``out``, whatever it holds, and start again."""


class _RecipeParser(OneLineErrors, LightningArgumentParser):
    """Lightning's parser, with our errors, and a help that shows what is stepkd's own."""

    elsewhere = ("trainer",)

    def format_help(self, *args: Any) -> str:
        """Help without Lightning's own settings."""
        if self.part:
            return super().format_help(*args)
        self.usage = f"stepkd {self.prog.split()[-1]} --config RECIPE [--config OVERLAY ...] [--SETTING VALUE ...]"
        for action in self._actions:
            action.help = _REWORDED.get(action.dest, action.help)
        return f"{super().format_help(*args)}\n{_ELSEWHERE}\n"


_REWORDED = {
    "ckpt_path": "run folder or checkpoint: fit continues its training in --out, the other commands take its weights",
    "weights_only": argparse.SUPPRESS,  # always true
}
_ELSEWHERE = """all other settings:
  --trainer.help                 of Lightning's Trainer
  --model.help CLASS             of a method, for instance GKDModule; --data.help CLASS of its data
  --model CLASS --model.policy.help
                                 of one part of them"""


class StepkdCLI(LightningCLI):
    """LightningCLI whose runs live in a folder that is never silently overwritten; it does nothing before `start`.

    Args:
        quiet: print nothing about the run folder, and what to do next.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self.subcommand: str | None = None
        self.run_dir: RunDir | None = None
        self.last: LastCheckpoint | None = None
        self.status: Literal["finished", "stopped"] = "finished"

    def start(self, words: Sequence[str], *, run: bool = True) -> None:
        """Parse words of a command line, and run the command.

        Args:
            words: the command first; without ``run`` the settings of a fit alone.
            run: False: only build module and data.
        """
        quiet_libraries()
        self._asked = words[0] if run else ""
        super().__init__(
            StepModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_callback=None,
            parser_class=_RecipeParser,
            seed_everything_default=0,
            trainer_defaults=dict(DEFAULTS),
            args=list(words),
            run=run,
        )

    @property
    def exit_code(self) -> int:
        """0; of a run that was stopped, what its recipe asks for."""
        return 0 if self.status == "finished" else int(self.config["fit"].checkpoint.preempted_exit_code)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The one that was asked for; a parser takes long to build."""
        return {name: skipped for name, skipped in LightningCLI.subcommands().items() if name == self._asked}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Settings of stepkd beside Lightning's own."""
        parser.add_class_arguments(RunOptions)
        parser.add_class_arguments(CheckpointConfig, "checkpoint")
        parser.link_arguments("seed_everything", "model.init_args.seed")
        parser.link_arguments("seed_everything", "data.init_args.seed")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, with recipes by file or by name, and say of a mistake where it is and what was meant."""
        words = [*args]
        for i, word in enumerate(words):  # a switch alone is true
            if word in ("--resume", "--overwrite") and ([*words, "--"][i + 1]).startswith("--"):
                words[i] += "=true"
        words = with_recipe_files(words)
        own = getattr(self, "_subcommand_parsers", {}).get(words[0], parser) if words else parser
        try:
            show_help(own, words)
            super().parse_arguments(parser, words)
        except ConfigError as error:
            raise ConfigError(explain(own, words, str(error))) from error

    def before_instantiate_classes(self) -> None:
        """Guard the launch and open the run folder before anything slow happens."""
        if self.subcommand is None:
            check_trainer_settings(self.config.trainer.as_dict(), "fit")
            return
        config = self.config[self.subcommand]
        settings = config.trainer.as_dict()
        check_trainer_settings(settings, self.subcommand)
        _find_model(config, self.subcommand)
        info = check_launch(trainer_settings=settings)
        for name, value in trainer_defaults(info, settings).items():
            config.trainer[name] = value
        if info.bf16 and info.is_rank_zero:
            print(f"trainer.precision: {config.trainer.precision} (accelerate asks for mixed precision bf16)")
        if config.trainer.accelerator == "auto" and not torch.cuda.is_available():
            config.trainer.accelerator = "cpu"  # never Apple's MPS: it has no float64, which sampling needs
        refuse_credentials(self._settings())
        if self.subcommand in ("fit", "predict"):
            if config.out is None:
                raise ConfigError(f"stepkd {self.subcommand} writes files: give --out FOLDER, for instance runs/first")
            if self.subcommand == "predict" and config.resume:
                raise ConfigError(
                    "stepkd predict cannot continue with a completion file: use --overwrite or another --out"
                )
            config.resume = config.resume or config.resume_with is not None
            resumes = config.resume and info.is_rank_zero
            changed = changed_settings(Path(config.out), self._settings(), self._named()) if resumes else []
            self.run_dir = RunDir.open(
                config.out, resume=config.resume, overwrite=config.overwrite, kind=self.subcommand
            )
            if info.is_rank_zero and self.run_dir.message and not self.quiet:
                print("\n  ".join([self.run_dir.message, *changed]))
            if self.subcommand == "fit" and self.run_dir.resume_from is not None:
                config.ckpt_path = str(self.run_dir.resume_from)
            _check_monitor(config)
            if info.is_rank_zero:
                write_file(free_path(self.run_dir.path / "config.yaml"), self._config_text.encode())
        config.weights_only = True
        place_loggers(config.trainer.logger, Path() if self.run_dir is None else self.run_dir.path)

    @cached_property
    def _config_text(self) -> str:
        """The settings of this run, without those of this start of it."""
        assert self.subcommand is not None
        config = self.config[self.subcommand].clone()
        for name in ("out", "resume", "resume_with", "overwrite", "ckpt_path", "weights_only"):
            config.pop(name, None)  # belongs to this start of the run, not to the recipe
        for spec in vars(config.get("data.init_args") or Namespace()).values():
            if isinstance(spec, Namespace) and "source" in spec and spec.path:  # of the rows that are read
                with suppress(ConfigError):  # which is told where the data is built
                    read = DataConfig(**spec.as_dict())
                    spec.update(Namespace(source=read.source, options=read.options, hub=None))
        parser = self._parser(self.subcommand)
        return str(parser.dump(config, skip_unset=False, skip_link_targets=False, skip_validation=True))

    def _settings(self) -> dict[str, Any]:
        return recipe_settings(yaml.safe_load(self._config_text))

    def _named(self) -> list[str]:
        """What ``--resume_with`` names, under short names."""
        given = self.config[self.subcommand].get("resume_with") or ""
        return [short_name(name.strip()) for name in given.split(",") if name.strip()]

    def instantiate_classes(self) -> None:
        """Build module, data and, for a command that runs, the Trainer."""
        if self.subcommand is not None:
            return super().instantiate_classes()
        self.config_init = self.parser.instantiate(self.config)
        self.model, self.datamodule = self.config_init.model, self.config_init.data

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add logger, progress display and checkpoints of the run folder."""
        config = self.config[self.subcommand]
        self.model.checkpoint = config.get("ckpt_path")
        own = self._get(self.config_init, "trainer").callbacks or []
        has_bar = any(isinstance(each, ProgressBar) for each in (own if isinstance(own, list) else [own]))
        callbacks: list[Callback] = [] if has_bar or config.trainer.enable_progress_bar is False else [StepProgress()]
        if self.run_dir is not None and self.subcommand == "fit":
            callbacks.append(RunFacts(self.run_dir.path, self._settings()))
            if config.trainer.get("default_root_dir") is None:
                kwargs["default_root_dir"] = str(self.run_dir.path)
            if (given := self._get(self.config_init, "trainer").logger) is not False:
                given = [] if given in (None, True) else list(given) if isinstance(given, Iterable) else [given]
                ours = [] if any(isinstance(each, JsonlLogger) for each in given) else [JsonlLogger(self.run_dir.path)]
                kwargs["logger"] = [*given, *ours]
            spec = config.checkpoint
            self.last = LastCheckpoint(self.run_dir.checkpoints / "last.ckpt", spec.every_n_steps)
            if _has_validation(config) and spec.monitor is not None:
                callbacks.append(BestCheckpoint.of(self.run_dir.checkpoints, spec))
            callbacks.append(self.last)  # after the best one, so that the state it saves knows the newest best score
        elif config.trainer.get("logger") is None:
            kwargs["logger"] = False
        if self.run_dir is not None and self.subcommand == "predict":
            callbacks.append(CompletionFile(self.run_dir.path / "completions.jsonl"))
        self.trainer_defaults["callbacks"] = callbacks
        if self.subcommand != "fit":
            kwargs["enable_checkpointing"] = False
        trainer = super().instantiate_trainer(**kwargs)
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        if self.subcommand == "fit":
            self.model.resume_with = tuple(self._named())
        return trainer

    def after_predict(self) -> None:
        """Record the end."""
        assert self.run_dir is not None
        self.run_dir.mark("finished")

    def after_fit(self) -> None:
        """Keep the final state, and say what to do next."""
        assert self.run_dir is not None
        assert self.last is not None
        self.last.save(self.trainer)
        self.run_dir.mark("finished")
        if self.trainer.is_global_zero and not self.quiet:
            print(f"\nfinished after {self.trainer.global_step} steps: {self.run_dir.path}")
            for line in self.model.next_commands(str(self.config["fit"].out)) if self.last.every_n_steps else ():
                print(f"  {line}")

    def mark_stopped(self, stopped: Preempted) -> None:
        """Record that the run stopped on request, and say how to resume."""
        assert self.run_dir is not None
        self.status = "stopped"
        self.run_dir.mark("stopped", str(stopped))
        if self.trainer.is_global_zero and not self.quiet:
            steps = self.trainer.global_step
            held = f"holds the state after {steps} steps; give the same command with --resume to continue"
            if self.last is not None and not self.last.every_n_steps:
                held = "keeps no state (checkpoint.every_n_steps: null); with --resume it starts again from step 0"
            print(f"\n{stopped}: {self.run_dir.path} {held}", flush=True)

    def mark_failed(self, error: BaseException) -> None:
        """Record the failure in the run folder, or remove the folder when nothing had begun."""
        if self.run_dir is None:
            return
        mistake = user_mistake(error)
        if mistake is None or isinstance(mistake, MachineError) or not self.run_dir.abandon():
            text = str(error).splitlines()[0] if str(error) else ""
            self.run_dir.mark("failed", f"{type(error).__name__}: {text}")


def _find_model(config: Any, subcommand: str) -> None:
    """Let ``--ckpt_path`` be a checkpoint, a run folder or (where nothing is trained) any other model."""
    if config.ckpt_path is None:
        return
    path = Path(config.ckpt_path).expanduser()
    found = find_checkpoint(path)
    if subcommand == "fit" and found != path:
        found = find_last_checkpoint(path / "checkpoints") or found
    if found is not None:
        config.ckpt_path = str(found)
    elif (path / "run.json").is_file():
        raise ConfigError(f"--ckpt_path: {no_model(path)}")
    elif subcommand == "fit":
        raise ConfigError(
            f"--ckpt_path continues a run, and {path} holds no checkpoint: to start from a model, --model.policy.path"
        )
    else:
        for name, value in {"path": config.ckpt_path, "revision": None, "tokenizer": None, "lora": None}.items():
            config.model.init_args.policy[name] = value
        config.ckpt_path = None


def _check_monitor(config: Any) -> None:
    """Refuse a monitored value that no validation of this recipe can give."""
    monitor, samples = config.checkpoint.monitor, (config.model.init_args.get("validation") or {}).get("sampling")
    if not _has_validation(config) or monitor is None:
        return
    if not monitor.startswith("val/"):
        raise ConfigError(f"checkpoint.monitor={monitor!r}: must be a validation value, for instance val/loss")
    module, _, name = config.model.class_path.rpartition(".")
    unsampled = getattr(getattr(import_module(module), name), "labels_give_accuracy", False)  # by the step labels
    if monitor == "val/accuracy" and not samples and not unsampled:
        raise ConfigError(
            "checkpoint.monitor is val/accuracy, but validation samples nothing: set "
            "model.init_args.validation.sampling (for instance {n: 1, temperature: 0.0}), or "
            "monitor val/loss (mode min)"
        )


def _has_validation(config: Any) -> bool:
    return config.data is not None and config.data.init_args.get("validation") is not None
