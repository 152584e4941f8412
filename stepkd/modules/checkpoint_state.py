"""What a checkpoint holds beside Lightning's own state, and whether it fits the run that wants to go on with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING, Any, cast

from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor

from stepkd.data.batching import Position
from stepkd.data.templates import PromptTemplate
from stepkd.errors import ModelError
from stepkd.models import spec_to_dict
from stepkd.models.adapter import misfit
from stepkd.runs.resume import check_changes, flat

if TYPE_CHECKING:
    from stepkd.modules.base import StepModule

CHECKPOINT_FORMAT = 1


def check_frozen_model(what: str, earlier: str, now: str, setting: str) -> None:
    """Refuse to go on beside another frozen model than the run so far.

    Args:
        what: what the model is to the run, for the message.
        earlier, now: fingerprints of its weights.
        setting: where the recipe names it.

    Raises:
        ModelError: they differ.
    """
    if earlier != now:
        raise ModelError(
            f"the run was begun {what} (weights {earlier} then, {now} now): give the old {setting} again, or start a "
            "new run in another --out"
        )


def pack(module: StepModule, checkpoint: dict[str, Any]) -> None:
    """Reduce a checkpoint to the trainable weights and add the ``stepkd`` section (plain values and tensors only)."""
    trainable = {f"policy.{name}" for name, _ in module.model.trainable_parameters()}
    checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trainable}
    section: dict[str, Any] = {
        "format": CHECKPOINT_FORMAT,
        "module": _class_name(module),
        "policy": spec_to_dict(module.policy_spec),
        "position": asdict(module.position),
        "seed": module.seed,
        "data": _data_fingerprint(module),
        "base": module.base_identity,
        "settings": _settings(module),
    }
    template = getattr(module.datamodule, "template", None)
    if isinstance(template, PromptTemplate):
        section["template"] = asdict(template)
    if module.model.step_head is not None:
        section["step_head"] = asdict(module.model.step_head.spec)
    if module.ema is not None:
        section["ema"] = module.ema.state_dict()
    if state := module.method_state():
        section["method_state"] = state
    checkpoint["stepkd"] = section


def unpack(module: StepModule, checkpoint: dict[str, Any]) -> tuple[Position, dict[str, Tensor] | None]:
    """Check a checkpoint against the module.

    Weights must always fit. To train on, every setting that decides what comes next must be the same too: method,
    its settings, precision, data and batches; ``module.resume_with`` names exceptions.

    Returns:
        The data position and the weight average (or None).

    Raises:
        ModelError: other weights than the module trains.
        ConfigError: other settings, with both values.
    """
    section = checkpoint.get("stepkd")
    if not isinstance(section, dict) or section.get("format") != CHECKPOINT_FORMAT:
        raise ModelError(f"not a stepkd checkpoint of format {CHECKPOINT_FORMAT}: it has no such 'stepkd' section")
    expected = {f"policy.{name}": parameter for name, parameter in module.model.trainable_parameters()}
    averages = {f"policy.{name}": value for name, value in section["ema"].items()} if "ema" in section else expected
    if differing := misfit(expected, checkpoint["state_dict"]) or misfit(expected, averages):
        raise ModelError(
            f"the checkpoint holds other weights than this recipe trains ({differing}): use the policy (path, lora) "
            "and the head it was made with"
        )
    if module.trainer.state.fn == "fit":
        _check_resume(module, section)
        _settle(checkpoint, section["position"], module)
        named = {name.partition(".")[0] for name in module.resume_with}
        if "policy" not in named:
            then = section.get("base", module.base_identity)
            check_frozen_model("with an adapter on another base model", then, module.base_identity, "policy.path")
        state = section.get("method_state", {})
        module.restore_method_state({name: value for name, value in state.items() if name not in named})
    else:
        module.adopt_method_state(section.get("method_state", {}))
    return Position(**section["position"]), section.get("ema")


def _check_resume(module: StepModule, section: dict[str, Any]) -> None:
    then = section.get("settings", {})
    now = _settings(module) if then else {}
    rows = "data.rows_and_batches"
    then |= {"method": section["module"], "seed": section["seed"], rows: section["data"]}
    now |= {"method": _class_name(module), "seed": module.seed, rows: _data_fingerprint(module)}
    then |= flat(section["policy"], "policy") | flat(section.get("step_head"), "head")
    head = module.model.step_head
    now |= flat(spec_to_dict(module.policy_spec), "policy") | flat(head and asdict(head.spec), "head")
    data = [rows] if any(name.partition(".")[0] == "data" for name in module.resume_with) else []
    check_changes(then, now, [*module.resume_with, *data], "this run")


def _settings(module: StepModule) -> dict[str, Any]:
    """The module's arguments, as plain values under dotted names, and the Trainer's precision."""
    return flat(_plain(module.arguments)) | {"trainer.precision": str(module.trainer.precision)}


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        value = {name: getattr(value, name) for name in value.__dataclass_fields__}
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or type(value) in (bool, int, float, str):
        return value
    kind = value if hasattr(value, "__qualname__") else type(value)
    return f"{kind.__module__}.{kind.__qualname__}"


def _settle(checkpoint: dict[str, Any], position: dict[str, int], module: StepModule) -> None:
    """Count nothing twice: a batch that was given up, the epoch that the run's end broke off, a callback's patience."""
    loop = checkpoint["loops"]["fit_loop"]
    batches, epochs = loop["epoch_loop.batch_progress"], loop["epoch_progress"]
    for counts in (batches["total"], batches["current"]):
        if counts["started"] > counts["processed"]:
            counts["ready"] = counts["started"] = counts["processed"]
    if epochs["current"]["processed"] > position["epoch"]:
        for counts in (epochs["total"], epochs["current"]):
            counts["processed"] -= 1
            counts["completed"] = counts["processed"]
    for callback in cast(Any, module.trainer).callbacks:
        if isinstance(callback, EarlyStopping) and callback.state_key in checkpoint["callbacks"]:
            checkpoint["callbacks"][callback.state_key]["patience"] = callback.patience


def _class_name(module: StepModule) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _data_fingerprint(module: StepModule) -> str | None:
    data = module.datamodule
    return data.fingerprint() if hasattr(data, "fingerprint") else None
