"""What a checkpoint holds beside Lightning's own state, and whether it fits the run that wants to go on with it."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from torch import Tensor

from stepkd.data.loader import Position
from stepkd.data.templates import PromptTemplate
from stepkd.errors import ModelError
from stepkd.models import spec_to_dict
from stepkd.models.adapter import misfit
from stepkd.models.step_head_io import step_head_from_dict

if TYPE_CHECKING:
    from stepkd.modules.base import StepModule

CHECKPOINT_FORMAT = 1
_POLICY_SETTINGS = ("path", "revision", "lora", "quantization", "init_seed")


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
    }
    template = getattr(getattr(module.trainer, "datamodule", None), "template", None)
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

    Weights must always fit. To go on training, everything that decides what comes next must be the same too: method,
    policy, seed, data and batches.

    Returns:
        The data position and the weight average (or None).

    Raises:
        ModelError: naming what differs, with both values.
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
        then = section.get("base", module.base_identity)
        check_frozen_model("with an adapter on another base model", then, module.base_identity, "policy.path")
        module.restore_method_state(section.get("method_state", {}))
    else:
        module.adopt_method_state(section.get("method_state", {}))
    return Position(**section["position"]), section.get("ema")


def _check_resume(module: StepModule, section: dict[str, Any]) -> None:
    here = spec_to_dict(module.policy_spec)
    pairs = {f"policy.{name}": (section["policy"].get(name), here[name]) for name in _POLICY_SETTINGS}
    head = module.model.step_head
    pairs["step head"] = (
        section.get("step_head") and step_head_from_dict(section["step_head"]),
        None if head is None else head.spec,
    )
    pairs["method"] = (section["module"], _class_name(module))
    pairs["seed"] = (section["seed"], module.seed)
    pairs["data (rows, lengths, batch size and order)"] = (section["data"], _data_fingerprint(module))
    differing = [f"  {name}: {then!r} then, {now!r} now" for name, (then, now) in pairs.items() if then != now]
    if differing:
        raise ModelError(
            "this run cannot go on from that checkpoint, because what decides its next batches or weights changed:\n"
            + "\n".join(differing)
            + "\nGive the old settings again, or start a new run in another --out"
        )


def _class_name(module: StepModule) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _data_fingerprint(module: StepModule) -> str | None:
    data: Any = getattr(module.trainer, "datamodule", None)
    return data.fingerprint() if hasattr(data, "fingerprint") else None
