"""PolicyModule: the model that a method trains, and what a checkpoint holds of it."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import cached_property, wraps
from typing import Any, TypeVar, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.parsing import collect_init_args

from stepkd.data.batching import Position
from stepkd.data.templates import PromptTemplate
from stepkd.errors import ConfigError, ModelError
from stepkd.losses import DEFAULT_CHUNK
from stepkd.models.adapter import misfit
from stepkd.models.checkpoint import base_fingerprint, load_policy
from stepkd.models.head import disable_dropout
from stepkd.models.load import load_tokenizer, training_spec
from stepkd.models.policy import Policy
from stepkd.models.sharding import shard
from stepkd.models.source import trained_template
from stepkd.models.spec import PolicyConfig
from stepkd.modules.distributed import check_strategy, clip_in_engine
from stepkd.modules.optim import OptimizerConfig
from stepkd.modules.validation import SampledAccuracy, ValidationConfig
from stepkd.runs.job import flat
from stepkd.runs.process import STOP_REQUEST
from stepkd.runs.progress import PhaseTracker
from stepkd.runs.rundir import check_changes, short_name
from stepkd.sampling.config import IN_PROCESS, EngineConfig, Transformers
from stepkd.sampling.engine import Engine
from stepkd.yaml_files import as_yaml

logger = logging.getLogger(__name__)
T = TypeVar("T")

CHECKPOINT_FORMAT = 2


def telling(make: Callable[[Any], T]) -> Callable[[Any], T]:
    """For what a module makes when it is first asked for it: where that raises AttributeError, ``torch.nn.Module``
    would say that the module lacks the property, and the cause would be lost; so it becomes a RuntimeError from it."""

    @wraps(make)
    def made(module: Any) -> T:
        try:
            return make(module)
        except AttributeError as error:
            raise RuntimeError(f"{type(module).__name__}.{make.__name__} cannot be made: {error}") from error

    return made


class PolicyModule(LightningModule):
    """A policy with the settings that every method has.

    Args:
        policy: the model to train.
        optimizer: optimiser and schedule.
        validation: how validation samples and scores; its loss is always measured.
        micro_batch_tokens: most tokens (padding included) in one forward pass: trades memory for speed, never changes
            the gradient.
        chunk_size: positions whose logits exist at the same time.
        loss_weights: factor, >= 0, of each named sum of the loss (see the method's components); missing ones are 1.
        seed: keys dropout and sampling noise. Dropout is drawn per rank and micro-batch, so with ``lora.dropout`` the
            gradient does depend on the split; nothing else does.
    """

    scores_steps = False
    """Whether the method trains a step head; any other method refuses a reward model as its policy."""
    without_dropout = ""
    """Why the policy's dropout is switched off; empty: it is not."""
    resume_with: tuple[str, ...] = ()
    """Settings that decide what a run learns and may differ all the same from those of the run that is resumed."""
    checkpoint: str | None = None
    """The checkpoint that the command line starts from."""

    engine: EngineConfig = IN_PROCESS
    """Where training samples."""

    strict_loading = False  # checkpoints hold trainable weights only; on_load_checkpoint checks their names itself

    def __init__(
        self,
        policy: PolicyConfig,
        optimizer: OptimizerConfig | None = None,
        validation: ValidationConfig | None = None,
        micro_batch_tokens: int = 8192,
        chunk_size: int = DEFAULT_CHUNK,
        loss_weights: dict[str, float] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if micro_batch_tokens < 1 or chunk_size < 1:
            raise ConfigError(f"micro_batch_tokens={micro_batch_tokens}, chunk_size={chunk_size}: both at least 1")
        self.policy_spec = policy
        self.optimizer_spec = optimizer or OptimizerConfig()
        self.validation_spec = validation or ValidationConfig()
        self.micro_batch_tokens = micro_batch_tokens
        self.chunk_size = chunk_size
        self.loss_weights = dict(loss_weights or {})
        if incorrect := {k: v for k, v in self.loss_weights.items() if not 0 <= v < float("inf")}:
            raise ConfigError(f"loss_weights={incorrect}: each must be 0 (off) or positive")
        self.seed = seed
        self.arguments: dict[str, Any] = {}
        for given in collect_init_args(cast(Any, inspect.currentframe()), [], classes=(PolicyModule,)):
            self.arguments |= given
        self.phases = PhaseTracker()
        self.position = Position()
        self.policy: Policy | None = None
        self.frozen: dict[str, str] = {}
        """Group of settings, or a setting's path -> fingerprint of the frozen model that it is about: checkpoints name
        them, and no run is resumed beside another one."""
        self._tokenizer: Any = None

    # ---- what a method defines -------------------------------------------------------------------------------------

    def complete_model(self) -> None:
        """Called once the policy is loaded: add what the method needs beside it, and note its :attr:`frozen`."""

    def method_state(self) -> dict[str, Any]:
        """State of the method that a checkpoint must hold (running averages, ...): plain values and tensors."""
        return {}

    def restore_method_state(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`method_state` gave, to train on."""
        self.adopt_method_state(state)

    def adopt_method_state(self, state: dict[str, Any]) -> None:
        """Take from it what validation, test and prediction need; nothing has to fit the run that wrote it."""

    # ---- model -----------------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Any:
        """The policy's tokenizer; available before the weights are loaded."""
        if self.policy is not None:
            return self.policy.tokenizer
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.policy_spec)
        return self._tokenizer

    @property
    def model(self) -> Policy:
        """The loaded policy."""
        if self.policy is None:
            raise RuntimeError("the policy is loaded by configure_model(): call it first when using a module by hand")
        return self.policy

    # ---- what samples ------------------------------------------------------------------------------------------------

    @cached_property
    @telling
    def sampled_accuracy(self) -> SampledAccuracy:
        """What samples and grades validation and prediction."""
        return SampledAccuracy(self.model, self.validation_spec, self.seed)

    @cached_property
    @telling
    def sampling_engine(self) -> Engine:
        """What training samples with; a request to stop ends its completions, but not those of validation."""
        breaks_off = lambda: bool(STOP_REQUEST) and self.trainer.training  # noqa: E731
        return self.engine.build(self.model, breaks_off)

    @property
    def validation_engine(self) -> Engine:
        """What validation samples with: the engine of training, where that is not this process, with these weights."""
        return self.sampling_engine if self._validates_elsewhere else self.sampled_accuracy.engine

    @property
    def _validates_elsewhere(self) -> bool:
        # Beside a training a step's number does not say whose weights they are.
        is_elsewhere = not isinstance(self.engine, Transformers) and self.trainer.state.fn == TrainerFn.FITTING
        return is_elsewhere and self.samples_in_validation

    @property
    def samples_in_validation(self) -> bool:
        """Whether validation samples from the policy."""
        return self.validation_spec.sampling is not None

    @property
    def datamodule(self) -> Any:
        """The run's data module; None without one."""
        return getattr(self._trainer, "datamodule", None)

    @property
    def template(self) -> PromptTemplate | None:
        """The prompt template of the run's data; None without one."""
        found = getattr(self.datamodule, "template", None)
        return found if isinstance(found, PromptTemplate) else None

    def trained_template(self) -> PromptTemplate | None:
        """The prompt template that the checkpoint, or else the policy, was trained with; None: nothing says it."""
        found = None if self.checkpoint is None else trained_template(self.checkpoint)
        return found or trained_template(self.policy_spec.path, self.policy_spec.revision)

    def setup(self, stage: str) -> None:
        """Refuse a strategy that would train incorrectly; tell an engine that holds the gradients where to clip."""
        check_strategy(self.trainer.strategy)
        clip_in_engine(self.trainer.strategy, self.optimizer_spec.max_grad_norm)

    def configure_model(self) -> None:
        """Load the policy, and what the method needs beside it (once)."""
        if self.policy is not None:
            return
        spec = self.policy_spec
        self.policy_spec = training_spec(spec)
        if spec != self.policy_spec:
            logger.info("policy.dtype null: all weights are trained, so they are loaded in float32")
        self.policy = load_policy(self.policy_spec)
        self.frozen["policy"] = base_fingerprint(self.policy)
        if self.policy.step_head is not None and not self.scores_steps:
            raise ConfigError(
                f"policy.path={self.policy_spec.path} is a reward model (it has a step head), and "
                f"{type(self).__name__} trains a policy: start from the language model it was made of"
            )
        if self.without_dropout and disable_dropout(self.policy.causal_lm):
            logger.info("dropout is switched off: %s", self.without_dropout)
        self.complete_model()

    def shard(self, mesh: Any) -> None:
        """Shard the model over a mesh of ranks (FSDP2); called by the strategy once the module is complete."""
        mixed = str(self.trainer.precision) == "bf16-mixed"
        shard(self.model, mesh, param_dtype=torch.bfloat16 if mixed else None)

    def gathered(self) -> AbstractContextManager[Any]:
        """A block without gradients in which ranks may use the model differently often, however it is sharded."""
        return self.model.gathered()

    def check_data_fits(self, name: str, context: int | None, new_tokens: int = 0) -> None:
        """Refuse data, or prompts with so many new tokens, that are longer than a model's context (None: unlimited)."""
        longest, examples = getattr(self.datamodule, "max_length", 0), getattr(self.datamodule, "examples", {})
        prompt = max((len(each.prompt_ids) for each in examples.get("train", ())), default=0)
        sampled = min(prompt + new_tokens, self.model.max_length or 2**63) if prompt and new_tokens else 0
        if context is not None and max(longest, sampled) > context:
            what = f"data.max_length={longest}" if longest > context else f"a prompt with {new_tokens} new tokens"
            raise ConfigError(
                f"{what} exceeds the {name}'s context of {context} tokens ({max(longest, sampled)}): lower it, or take "
                f"a {name} of a longer context"
            )

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep trainable weights only, and everything that cannot be recomputed (plain values and tensors)."""
        trainable = {f"policy.{name}" for name, _ in self.model.trainable_parameters()}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trainable}
        section: dict[str, Any] = {
            "format": CHECKPOINT_FORMAT,
            "module": self._class_name(),
            "policy": asdict(self.policy_spec),
            "position": asdict(self.position),
            "seed": self.seed,
            "data": self._data_fingerprint(),
            "base": self.frozen["policy"],
            "frozen": dict(self.frozen),
            "settings": self._settings(),
        }
        if self.template is not None:
            section["template"] = asdict(self.template)
        if self.model.step_head is not None:
            section["step_head"] = self.model.step_head.spec.to_dict()
        if self.model.engine_noise:
            section["engine_noise"] = dict(self.model.engine_noise)
        if state := self.method_state():
            section["method_state"] = state
        checkpoint["stepkd"] = section

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint fits this module, and restore what is not weights.

        Weights must always fit. To train on, every setting that decides what comes next must be the same too: method,
        its settings, precision, data and batches; ``resume_with`` names exceptions.

        Raises:
            ModelError: other weights than the module trains, or another frozen model beside them.
            ConfigError: other settings, with both values.
        """
        section = checkpoint.get("stepkd")
        if not isinstance(section, dict) or section.get("format") != CHECKPOINT_FORMAT:
            raise ModelError(f"not a stepkd checkpoint of format {CHECKPOINT_FORMAT}: it has no such 'stepkd' section")
        expected = {f"policy.{name}": parameter for name, parameter in self.model.trainable_parameters()}
        if differing := misfit(expected, checkpoint["state_dict"]):
            raise ModelError(
                f"the checkpoint holds other weights than this recipe trains ({differing}): use the policy (path, "
                "lora) and the head it was made with"
            )
        state = section.get("method_state", {})
        if self.trainer.state.fn == "fit":
            self._check_resume(section)
            self._mend_counters(checkpoint, section["position"])
            self.model.engine_noise |= section.get("engine_noise", {})
            named = {name.partition(".")[0] for name in self.resume_with}
            for name, now in self.frozen.items():
                if name not in named and (then := section["frozen"].get(name, now)) != now:
                    paths = name if "." in name else " and ".join(dict.fromkeys((f"{name}.path", "policy.path")))
                    raise ModelError(
                        f"the run was begun with another {name} model (weights {then} then, {now} now): give the old "
                        f"{paths} again, or start a new run in another --out"
                    )
            self.restore_method_state({name: value for name, value in state.items() if name not in named})
        else:
            self.adopt_method_state(state)
        self.position = Position(**section["position"])

    def _check_resume(self, section: dict[str, Any]) -> None:
        head, rows = self.model.step_head, "data.rows_and_batches"
        then = {"method": section["module"], "seed": section["seed"], rows: section["data"], **section["settings"]}
        now = {"method": self._class_name(), "seed": self.seed, rows: self._data_fingerprint(), **self._settings()}
        then |= flat(section["policy"], "policy") | flat(section.get("step_head"), "head")
        now |= flat(asdict(self.policy_spec), "policy") | flat(head and head.spec.to_dict(), "head")
        data = [rows] if any(name.partition(".")[0] == "data" for name in self.resume_with) else []
        check_changes(then, now, [*self.resume_with, *data], "this run")

    def _settings(self) -> dict[str, Any]:
        """The module's arguments, as plain values under dotted names, and the Trainer's precision."""
        found = {short_name(name): _plain(value) for name, value in flat(as_yaml(self.arguments)).items()}
        own = self.validation_spec.grading.decides().get("grader", {})
        found |= {f"validation.grader.{name}": value for name, value in own.items()}
        return found | {"trainer.precision": str(self.trainer.precision)}

    def _mend_counters(self, checkpoint: dict[str, Any], position: dict[str, int]) -> None:
        """Have Lightning count nothing twice, neither a batch given up nor the epoch that the run's end broke off; and
        early stopping take the patience of this start."""
        loop = checkpoint["loops"]["fit_loop"]
        batches, epochs = loop["epoch_loop.batch_progress"], loop["epoch_progress"]
        for counts in (batches["total"], batches["current"]):
            if counts["started"] > counts["processed"]:
                counts["ready"] = counts["started"] = counts["processed"]
        if epochs["current"]["processed"] > position["epoch"]:
            for counts in (epochs["total"], epochs["current"]):
                counts["processed"] -= 1
                counts["completed"] = counts["processed"]
        for callback in cast(Any, self.trainer).callbacks:
            if isinstance(callback, EarlyStopping) and callback.state_key in checkpoint["callbacks"]:
                checkpoint["callbacks"][callback.state_key]["patience"] = callback.patience

    def _class_name(self) -> str:
        return f"{type(self).__module__}.{type(self).__qualname__}"

    def _data_fingerprint(self) -> str | None:
        return self.datamodule.fingerprint() if hasattr(self.datamodule, "fingerprint") else None


def _plain(value: Any) -> Any:
    """A setting as a checkpoint holds it: a function or another object by its name."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if value is None or type(value) in (bool, int, float, str, dict):
        return value
    kind = value if hasattr(value, "__qualname__") else type(value)
    return f"{kind.__module__}.{kind.__qualname__}"
