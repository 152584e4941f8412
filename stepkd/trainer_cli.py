"""``stepkd fit | validate | test | predict``: LightningCLI with stepkd's run folders, guard and defaults."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from difflib import get_close_matches
from inspect import signature
from typing import Any

from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from stepkd.data.datamodule import StepData
from stepkd.data.spec import DataSpec
from stepkd.data.templates import PromptTemplate
from stepkd.errors import ConfigError
from stepkd.launch import RunDir, check_launch, trainer_defaults
from stepkd.launch.checkpoint_io import AtomicCheckpointIO
from stepkd.launch.logger import JsonlLogger
from stepkd.launch.progress import StepProgress
from stepkd.launch.quiet import quiet_libraries
from stepkd.models import LoraSpec, PolicySpec
from stepkd.modules import OptimizerSpec, StepModule, ValidationSpec
from stepkd.modules.rollout_file import RolloutFile

DEFAULTS = {"max_epochs": -1, "num_sanity_val_steps": 0, "log_every_n_steps": 1, "enable_model_summary": False}


@dataclass(frozen=True)
class CheckpointSpec:
    """When checkpoints are written."""

    every_n_steps: int = 100
    """``last.ckpt`` is written every so many optimiser steps, and at the end."""
    monitor: str = "val/loss"
    """``best.ckpt`` is the checkpoint with the best value of this; needs validation data."""
    mode: str = "min"
    """Whether a smaller (``min``) or larger (``max``) value is better."""

    def __post_init__(self) -> None:
        if self.every_n_steps < 1:
            raise ConfigError(f"checkpoint.every_n_steps={self.every_n_steps}: must be at least 1")
        if self.mode not in ("min", "max"):
            raise ConfigError(f"checkpoint.mode={self.mode!r}: must be min or max")


class SuggestingParser(LightningArgumentParser):
    """A parser that answers an unknown key with the right one, and takes no abbreviations."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> None:  # type: ignore[override]
        """Raise ConfigError with the message and, for unknown keys, the nearest known one."""
        hints = suggestions(message)
        raise ConfigError(message if hints in message else f"{hints}\n{message}") from ex


def known_keys() -> dict[str, str]:
    """Leaf name -> dotted key, for every setting of the built-in classes."""
    keys = {name: f"trainer.{name}" for name in signature(Trainer.__init__).parameters}
    groups: list[tuple[str, Any]] = [
        ("checkpoint", CheckpointSpec),
        ("data.init_args", StepData),
        ("data.init_args.template", PromptTemplate),
        ("data.init_args.train", DataSpec),
        ("model.init_args", StepModule),
        ("model.init_args.validation", ValidationSpec),
        ("model.init_args.optimizer", OptimizerSpec),
        ("model.init_args.policy", PolicySpec),
        ("model.init_args.policy.lora", LoraSpec),
    ]
    for prefix, cls in groups:
        names = [f.name for f in fields(cls)] if is_dataclass(cls) else list(signature(cls.__init__).parameters)
        keys.update({name: f"{prefix}.{name}" for name in names})
    for name in ("trainer", "model", "data", "out", "resume", "overwrite", "seed_everything", "ckpt_path"):
        keys[name] = name
    keys.pop("self", None)
    return keys


def suggestions(message: str) -> str:
    """The nearest known key for every unknown one that a parser's message names; empty when there is none."""
    patterns = (
        r"does not accept (?:option|nested key|key) '([\w.]+)'",
        r"[Kk]ey [\"']([\w.]+)[\"'] is not (?:expected|valid)",
        r"No action for key [\"']([\w.]+)[\"']",
        r"unrecognized arguments: --([\w.]+)",
        r"NestedArg\(key='([\w.]+)'",
    )
    known = known_keys()
    hints: list[str] = []
    for pattern in patterns:
        for found in re.findall(pattern, message):
            for part in found.split("."):
                if part in known or part in ("init_args", "class_path"):
                    continue
                near = get_close_matches(part, known, n=1, cutoff=0.6)
                hint = f"{part!r} is not a setting; did you mean {near[0]!r} ({known[near[0]]})?" if near else ""
                if hint and hint not in hints:
                    hints.append(hint)
    return "\n".join(hints)


class StepkdCLI(LightningCLI):
    """LightningCLI whose runs live in a folder that is never silently overwritten."""

    run_dir: RunDir | None = None

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Settings of stepkd beside Lightning's own."""
        parser.add_argument("--out", type=str | None, default=None, help="run folder; required by fit and predict")
        parser.add_argument(
            "--resume", type=bool, default=False, nargs="?", const=True, help="continue the run in --out"
        )
        parser.add_argument(
            "--overwrite", type=bool, default=False, nargs="?", const=True, help="delete the earlier run in --out"
        )
        parser.add_dataclass_arguments(CheckpointSpec, "checkpoint")
        parser.link_arguments("seed_everything", "model.init_args.seed")
        parser.link_arguments("seed_everything", "data.init_args.seed")

    def before_instantiate_classes(self) -> None:
        """Guard the launch and open the run folder before anything slow happens."""
        if self.subcommand is None:
            return  # only parsed and built (run=False)
        config = self.config[self.subcommand]
        settings = config.trainer.as_dict()
        _refuse_trainer_settings(settings, self.subcommand)
        info = check_launch(os.environ, settings)
        for name, value in trainer_defaults(info, settings).items():
            config.trainer[name] = value
        if self.subcommand in ("fit", "predict"):
            if config.out is None:
                raise ConfigError(f"stepkd {self.subcommand} writes files: give --out FOLDER, for instance runs/first")
            self.run_dir = RunDir.open(
                config.out, resume=config.resume, overwrite=config.overwrite, kind=self.subcommand
            )
            if info.is_rank_zero and self.run_dir.message:
                print(self.run_dir.message)
            if self.subcommand == "fit" and config.resume and self.run_dir.resume_from is not None:
                config.ckpt_path = str(self.run_dir.resume_from)
        config.weights_only = True
        self._write_config()

    def _write_config(self) -> None:
        if self.run_dir is None or not self.run_dir.info.is_rank_zero:
            return
        path = self.run_dir.path / "config.yaml"
        number = 1
        while path.exists():
            number += 1
            path = self.run_dir.path / f"config-{number}.yaml"
        assert self.subcommand is not None
        parser = self._parser(self.subcommand)
        text = parser.dump(self.config[self.subcommand], skip_none=False, skip_link_targets=False, skip_validation=True)
        path.write_text(text, encoding="utf-8")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add logger, progress display and checkpoints of the run folder."""
        if self.subcommand is None:
            return super().instantiate_trainer(**kwargs)
        config = self.config[self.subcommand]
        callbacks: list[Callback] = [StepProgress()]
        if self.run_dir is not None and self.subcommand == "fit":
            kwargs.setdefault("default_root_dir", str(self.run_dir.path))
            if config.trainer.get("logger") in (None, True):
                kwargs["logger"] = JsonlLogger(self.run_dir.path)
            callbacks += _checkpoints(self.run_dir, config.checkpoint, has_validation=_has_validation(config))
        else:
            kwargs.setdefault("logger", False)
        if self.run_dir is not None and self.subcommand == "predict":
            callbacks.append(RolloutFile(self.run_dir.path / "rollouts.jsonl"))
        self.trainer_defaults["callbacks"] = callbacks
        kwargs.setdefault("enable_checkpointing", self.subcommand == "fit")
        trainer = super().instantiate_trainer(**kwargs)
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        return trainer

    def after_fit(self) -> None:
        """Keep the final state, and say what to do next."""
        if self.run_dir is None:
            return
        last = self.run_dir.checkpoints / "last.ckpt"
        self.trainer.save_checkpoint(last)
        self.run_dir.mark_finished()
        if self.trainer.is_global_zero:
            print(f"\nfinished after {self.trainer.global_step} steps: {self.run_dir.path}")
            print(f"  evaluate: stepkd evaluate --model {self.config['fit'].out} --benchmark gsm8k --out ...")
            print(f"  export:   stepkd export {self.config['fit'].out} --to ...")


def _has_validation(config: Any) -> bool:
    return config.data is not None and config.data.init_args.get("validation") is not None


def _checkpoints(run: RunDir, spec: Any, *, has_validation: bool) -> list[Callback]:
    common: dict[str, Any] = {
        "dirpath": str(run.checkpoints),
        "save_top_k": 1,
        "enable_version_counter": False,
        "auto_insert_metric_name": False,
    }
    callbacks: list[Callback] = [
        ModelCheckpoint(
            filename="last", every_n_train_steps=spec.every_n_steps, save_on_train_epoch_end=False, **common
        )
    ]
    if has_validation:
        callbacks.append(
            ModelCheckpoint(
                filename="best", monitor=spec.monitor, mode=spec.mode, save_on_train_epoch_end=False, **common
            )
        )
    return callbacks


def _refuse_trainer_settings(settings: dict[str, Any], subcommand: str) -> None:
    """Settings that Lightning has and manual optimisation cannot honour."""
    if settings.get("gradient_clip_val"):
        raise ConfigError("trainer.gradient_clip_val has no effect here: set model.init_args.optimizer.max_grad_norm")
    if settings.get("accumulate_grad_batches", 1) != 1:
        raise ConfigError(
            "trainer.accumulate_grad_batches is not used: one batch is one optimiser step. Set "
            "data.init_args.global_batch_size, and model.init_args.micro_batch_tokens for memory"
        )
    if subcommand == "fit" and settings.get("max_steps", -1) == -1 and settings.get("max_epochs") in (None, -1):
        raise ConfigError("the run has no end: set trainer.max_steps (or trainer.max_epochs)")


def run(arguments: Sequence[str]) -> int:
    """Parse and run one Trainer command; see ``stepkd fit --help``."""
    quiet_libraries()
    try:
        _PendingCLI(
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
            run=True,
        )
    except Exception as error:
        _mark_failed(error)
        raise
    return 0


class _PendingCLI(StepkdCLI):
    """Remembers the run folder while the constructor runs the command, so that a failure can be recorded in it."""

    current: StepkdCLI | None = None

    def before_instantiate_classes(self) -> None:
        _PendingCLI.current = self
        super().before_instantiate_classes()


def _mark_failed(error: Exception) -> None:
    cli = _PendingCLI.current
    if cli is not None and cli.run_dir is not None:
        cli.run_dir.mark_failed(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
