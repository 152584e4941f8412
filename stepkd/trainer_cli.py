"""``stepkd fit | validate | test | predict``: LightningCLI with stepkd's run folders, guard and defaults."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from stepkd.commands.recipes import with_recipe_files
from stepkd.commands.suggestions import explain
from stepkd.data import FeedbackData, PairData, StepData, StepLabelData
from stepkd.data.templates import PromptTemplate
from stepkd.errors import ConfigError, MachineError, StepkdError
from stepkd.models.source import find_checkpoint, no_model
from stepkd.models.trained_template import save_template
from stepkd.modules import StepModule
from stepkd.modules.rollout_file import RolloutFile
from stepkd.runs import RunDir, check_launch, trainer_defaults
from stepkd.runs.checkpoint_files import find_last_checkpoint
from stepkd.runs.files import write_file
from stepkd.runs.logger import JsonlLogger, place_loggers
from stepkd.runs.preemption import Preempted
from stepkd.runs.quiet import quiet_libraries
from stepkd.runs.resume import check_changes, newest_config, recipe_settings, short_name
from stepkd.runs.rundir import check_version, free_path
from stepkd.safe import check_import
from stepkd.training.checkpoint_io import AtomicCheckpointIO
from stepkd.training.failure import explained
from stepkd.training.last_checkpoint import BestCheckpoint, LastCheckpoint
from stepkd.training.preemption_callback import SaveWhenPreempted
from stepkd.training.progress import StepProgress
from stepkd.training.trainer_settings import check_trainer_settings
from stepkd.yaml_files import read_yaml

DATA_MODULES = (StepData, StepLabelData, PairData, FeedbackData)
"""Imported so that ``--data.help`` lists them and ``--data`` takes their names."""
DEFAULTS = {"max_epochs": -1, "num_sanity_val_steps": 0, "log_every_n_steps": 1, "enable_model_summary": False}


@dataclass(frozen=True)
class CheckpointSpec:
    """When checkpoints are written."""

    every_n_steps: int = 100
    """``last.ckpt`` is written every so many optimiser steps, and at the end."""
    keep_previous: int = 0
    """How many earlier ones stay beside it, as ``step=N.ckpt``: where a torn ``last.ckpt`` sends ``--resume``."""
    monitor: str | None = "val/loss"
    """``best.ckpt`` is the checkpoint with the best value of this; needs validation data. Null: there is none."""
    mode: str = "min"
    """Whether a smaller (``min``) or larger (``max``) value is better."""
    preempted_exit_code: int = 0
    """Exit code of a run that SIGTERM stopped with its state saved, 0 to 255. Some schedulers read 0 as finished and do
    not start the job again. Under torchrun and accelerate the agent's own code is what they see."""

    def __post_init__(self) -> None:
        if self.every_n_steps < 1:
            raise ConfigError(f"checkpoint.every_n_steps={self.every_n_steps}: must be at least 1")
        if self.keep_previous < 0:
            raise ConfigError(f"checkpoint.keep_previous={self.keep_previous}: must not be negative")
        if self.mode not in ("min", "max"):
            raise ConfigError(f"checkpoint.mode={self.mode!r}: must be min or max")
        if not 0 <= self.preempted_exit_code <= 255:
            raise ConfigError(f"checkpoint.preempted_exit_code={self.preempted_exit_code}: must lie in 0 to 255")


class SuggestingParser(LightningArgumentParser):
    """A parser that takes no abbreviations, and raises our errors."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> None:
        """Raise ConfigError."""
        if denied := re.search(r"Importing '([^']+)' is not allowed", message):
            try:
                check_import(denied.group(1), "the recipe")
            except ConfigError as refused:
                raise refused from ex
        raise ConfigError(message) from ex


class StepkdCLI(LightningCLI):
    """LightningCLI whose runs live in a folder that is never silently overwritten."""

    run_dir: RunDir | None = None
    last: LastCheckpoint | None = None

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Settings of stepkd beside Lightning's own."""
        switch: dict[str, Any] = {"type": bool, "default": False, "nargs": "?", "const": True}
        parser.add_argument("--out", type=str | None, default=None, help="run folder; required by fit and predict")
        parser.add_argument("--resume", **switch, help="continue the run in --out")
        parser.add_argument(
            "--resume_with",
            type=str | None,
            default=None,
            metavar="NAME,...",
            help="resume although these settings changed, for instance optimizer.lr,data (any others that decide what "
            "the run learns are refused)",
        )
        parser.add_argument("--overwrite", **switch, help="delete the earlier run in --out")
        parser.add_dataclass_arguments(CheckpointSpec, "checkpoint")
        parser.link_arguments("seed_everything", "model.init_args.seed")
        parser.link_arguments("seed_everything", "data.init_args.seed")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, with recipes by file or by name, and say of a mistake where it is and what was meant."""
        words = with_recipe_files(sys.argv[1:] if args is None else args)
        try:
            super().parse_arguments(parser, words)
        except ConfigError as error:
            if "--safe allows" in str(error):
                raise
            own = getattr(self, "_subcommand_parsers", {}).get(words[0], parser)
            raise ConfigError(explain(own, words, str(error))) from error

    def before_instantiate_classes(self) -> None:
        """Guard the launch and open the run folder before anything slow happens."""
        if self.subcommand is None:
            return  # only parsed and built (run=False)
        config = self.config[self.subcommand]
        settings = config.trainer.as_dict()
        check_trainer_settings(settings, self.subcommand)
        _find_model(config, self.subcommand)
        info = check_launch(os.environ, settings)
        for name, value in trainer_defaults(info, settings).items():
            config.trainer[name] = value
        if info.bf16 and info.is_rank_zero:
            source = "the recipe's" if settings.get("precision") else "the launcher's"
            print(f"trainer.precision: {config.trainer.precision}, {source} (accelerate asks for mixed precision bf16)")
        if config.trainer.accelerator == "auto" and not torch.cuda.is_available():
            config.trainer.accelerator = "cpu"  # never Apple's MPS: it has no float64, which sampling needs
        if self.subcommand in ("fit", "predict"):
            if config.out is None:
                raise ConfigError(f"stepkd {self.subcommand} writes files: give --out FOLDER, for instance runs/first")
            if self.subcommand == "predict" and config.resume:
                raise ConfigError("stepkd predict cannot go on with a rollout file: use --overwrite or another --out")
            config.resume = config.resume or config.resume_with is not None
            changed = self._changes(Path(config.out)) if config.resume and info.is_rank_zero else []
            self.run_dir = RunDir.open(
                config.out, resume=config.resume, overwrite=config.overwrite, kind=self.subcommand
            )
            if info.is_rank_zero and self.run_dir.message:
                print("\n  ".join([self.run_dir.message, *changed]))
            if self.subcommand == "fit" and self.run_dir.resume_from is not None:
                config.ckpt_path = str(self.run_dir.resume_from)
            _check_monitor(config)
            if info.is_rank_zero:
                self._write_config(self.run_dir.path)
        config.weights_only = True
        place_loggers(config.trainer.logger, Path() if self.run_dir is None else self.run_dir.path)

    def _write_config(self, folder: Path) -> None:
        write_file(
            free_path(folder / "config.yaml"),
            lambda temporary: Path(temporary).write_text(self._config_text(), encoding="utf-8"),
        )

    def _config_text(self) -> str:
        assert self.subcommand is not None
        config = self.config[self.subcommand].clone()
        for name in ("out", "resume", "resume_with", "overwrite", "ckpt_path", "weights_only"):
            config.pop(name, None)  # belongs to this start of the run, not to the recipe
        parser = self._parser(self.subcommand)
        return str(parser.dump(config, skip_none=False, skip_link_targets=False, skip_validation=True))

    def _changes(self, out: Path) -> list[str]:
        """What differs from the run that is resumed, where a checkpoint is left of it."""
        check_version(out)
        earlier = newest_config(out)
        if earlier is None or find_last_checkpoint(out / "checkpoints") is None:
            return []
        then = recipe_settings(read_yaml(earlier, "run's settings"))
        now = recipe_settings(yaml.safe_load(self._config_text()))
        return check_changes(then, now, self._named(), str(out))

    def _named(self) -> list[str]:
        """What ``--resume_with`` names, under short names."""
        given = self.config[self.subcommand].get("resume_with") or ""
        return [short_name(name.strip()) for name in given.split(",") if name.strip()]

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add logger, progress display and checkpoints of the run folder."""
        if self.subcommand is None:
            return super().instantiate_trainer(**kwargs)
        config = self.config[self.subcommand]
        self.model.checkpoint = config.get("ckpt_path")
        own = self._get(self.config_init, "trainer").callbacks or []
        has_bar = any(isinstance(each, ProgressBar) for each in (own if isinstance(own, list) else [own]))
        callbacks: list[Callback] = [] if has_bar or config.trainer.enable_progress_bar is False else [StepProgress()]
        if self.run_dir is not None and self.subcommand == "fit":
            callbacks.append(_RunFacts(self.run_dir.path, recipe_settings(yaml.safe_load(self._config_text()))))
            if config.trainer.get("default_root_dir") is None:
                kwargs["default_root_dir"] = str(self.run_dir.path)
            if (given := self._get(self.config_init, "trainer").logger) is not False:
                given = [] if given in (None, True) else list(given) if isinstance(given, Iterable) else [given]
                ours = [] if any(isinstance(each, JsonlLogger) for each in given) else [JsonlLogger(self.run_dir.path)]
                kwargs["logger"] = [*given, *ours]
            spec = config.checkpoint
            self.last = LastCheckpoint(self.run_dir.checkpoints / "last.ckpt", spec.every_n_steps, spec.keep_previous)
            callbacks.append(SaveWhenPreempted(self.last))
            if _has_validation(config) and spec.monitor is not None:
                callbacks.append(_best(self.run_dir, spec))
            callbacks.append(self.last)  # after the best one, so that the state it saves knows the newest best score
        elif config.trainer.get("logger") is None:
            kwargs["logger"] = False
        if self.run_dir is not None and self.subcommand == "predict":
            callbacks.append(RolloutFile(self.run_dir.path / "rollouts.jsonl"))
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
        if self.run_dir is None:
            return
        assert self.last is not None
        self.last.save(self.trainer)
        self.run_dir.mark("finished")
        if self.trainer.is_global_zero:
            print(f"\nfinished after {self.trainer.global_step} steps: {self.run_dir.path}")
            for line in self.model.next_commands(str(self.config["fit"].out)):
                print(f"  {line}")


class _RunFacts(Callback):
    """Tells every logger the run's settings, and writes its prompt template beside them."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        self.settings = settings

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before Lightning saves the loggers without settings."""
        for logger in trainer.loggers if trainer.enable_autolog_hparams else ():
            logger.log_hyperparams(self.settings)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Not before, because a folder in which nothing has begun is removed when the run fails."""
        template = getattr(getattr(trainer, "datamodule", None), "template", None)
        if trainer.is_global_zero and isinstance(template, PromptTemplate):
            save_template(template, self.folder)


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
    monitor, samples = config.checkpoint.monitor, (config.model.init_args.get("validation") or {}).get("samples", 0)
    if not _has_validation(config) or monitor is None:
        return
    if not monitor.startswith("val/"):
        raise ConfigError(f"checkpoint.monitor={monitor!r}: must be a validation value, for instance val/loss")
    module, _, name = config.model.class_path.rpartition(".")
    unsampled = getattr(getattr(import_module(module), name), "labels_give_accuracy", False)  # by the step labels
    if monitor == "val/accuracy" and not samples and not unsampled:
        raise ConfigError(
            "checkpoint.monitor is val/accuracy, but validation samples nothing: set "
            "model.init_args.validation.samples to 1 or more, or monitor val/loss (mode min)"
        )


def _has_validation(config: Any) -> bool:
    return config.data is not None and config.data.init_args.get("validation") is not None


def _best(run: RunDir, spec: Any) -> BestCheckpoint:
    return BestCheckpoint(
        dirpath=str(run.checkpoints),
        filename="best",
        monitor=spec.monitor,
        mode=spec.mode,
        save_top_k=1,
        enable_version_counter=False,
        auto_insert_metric_name=False,
        save_on_train_epoch_end=False,
    )


def run(arguments: Sequence[str]) -> int:
    """Parse and run one Trainer command; see ``stepkd fit --help``."""
    if any(word == "-h" or word.partition("=")[0].endswith("help") for word in arguments):
        set_parsing_settings(docstring_parse_attribute_docstrings=True)  # a second that a run need not wait
    _PendingCLI.current = None
    try:
        _start(_PendingCLI, arguments, run=True)
    except MisconfigurationException as error:
        mistake = ConfigError(str(error))
        _mark_failed(mistake)
        raise mistake from error
    except Preempted as stopped:
        return _after_preemption(stopped)
    except BaseException as error:  # an interrupted run is recorded too
        cli = _PendingCLI.current
        last = getattr(cli, "last", None)
        words = explained(error, getattr(cli, "model", None), None if last is None else last.path)
        _mark_failed(words or error)
        root = words or _user_mistake(error)
        if root is not None and root is not error:
            raise root from error
        if isinstance(error, SystemExit | KeyboardInterrupt) and cli is not None:
            raise KeyboardInterrupt from error  # Lightning turns Ctrl-C into an exit
        raise
    return 0


def check_fit(arguments: Sequence[str]) -> tuple[StepModule, Any]:
    """Parse the settings of a ``stepkd fit`` and build its module and data, without a model, a trainer or a run folder.

    Args:
        arguments: those of ``stepkd fit``, without ``--out``.

    Returns:
        Module and data module.

    Raises:
        StepkdError: what ``stepkd fit`` would refuse before it reads data or loads a model.
    """
    module, data, _ = check_fit_settings(arguments)
    return module, data


def check_fit_settings(arguments: Sequence[str]) -> tuple[StepModule, Any, dict[str, Any]]:
    """As :func:`check_fit`, with the Trainer's settings beside them."""
    try:
        parsed = _start(_ParsedCLI, arguments, run=False)
    except (ValueError, TypeError) as error:
        if (mistake := _user_mistake(error)) is not None:
            raise mistake from error
        raise
    return parsed.built.model, parsed.built.data, parsed.config.trainer.as_dict()


def _start(kind: type[LightningCLI], arguments: Sequence[str], *, run: bool) -> Any:
    """A command line of ours, parsed and, with ``run``, run."""
    quiet_libraries()
    return kind(
        StepModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        save_config_callback=None,
        parser_class=SuggestingParser,
        seed_everything_default=0,
        trainer_defaults=dict(DEFAULTS),
        args=list(arguments),
        run=run,
    )


class _ParsedCLI(StepkdCLI):
    """Parses, and builds module and data but no trainer."""

    built: Any = None

    def before_instantiate_classes(self) -> None:
        check_trainer_settings(self.config.trainer.as_dict(), "fit")

    def instantiate_classes(self) -> None:
        self.built = self.parser.instantiate(self.config)


def _user_mistake(error: BaseException) -> StepkdError | None:
    """Our own error at the root of one that jsonargparse raised while it parsed or built the settings."""
    if isinstance(error, StepkdError):
        return error
    found: StepkdError | None = None
    current: BaseException | None = error if isinstance(error, ValueError | TypeError) else None
    while current is not None:
        found = current if isinstance(current, StepkdError) else found
        current = current.__cause__ or current.__context__
    return found


class _PendingCLI(StepkdCLI):
    """Remembers the run folder while the constructor runs the command, so that a failure can be recorded in it."""

    current: StepkdCLI | None = None

    def before_instantiate_classes(self) -> None:
        _PendingCLI.current = self
        super().before_instantiate_classes()


def _after_preemption(stopped: Preempted) -> int:
    """Record that the run stopped on request, say how to go on, and give the exit code that the recipe asks for."""
    cli = _PendingCLI.current
    assert cli is not None
    assert cli.run_dir is not None
    cli.run_dir.mark("stopped", str(stopped))
    if cli.trainer.is_global_zero:
        print(
            f"\n{stopped}: {cli.run_dir.path} holds the state after {cli.trainer.global_step} steps; give the same "
            "command with --resume to go on",
            flush=True,
        )
    return int(cli.config["fit"].checkpoint.preempted_exit_code)


def _mark_failed(error: BaseException) -> None:
    """Record the failure in the run folder, or remove the folder when nothing had begun."""
    cli = _PendingCLI.current
    if cli is None or cli.run_dir is None:
        return
    mistake = _user_mistake(error)
    if mistake is None or isinstance(mistake, MachineError) or not cli.run_dir.abandon():
        text = str(error).splitlines()[0] if str(error) else ""
        cli.run_dir.mark("failed", f"{type(error).__name__}: {text}")
