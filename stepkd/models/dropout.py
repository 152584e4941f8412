"""Dropout off for good: methods that compare a policy with a reference want the same view of both."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from stepkd.errors import ModelError
from stepkd.models.head import backbone_of

PROBE = 64
"""Tokens that are read to see whether training mode computes what evaluation mode does."""
_LEAST = {torch.bfloat16: 1e-2, torch.float16: 1e-2}
"""Relative differences that are more than a GPU's order of summation, by dtype; others 1e-5."""


@torch.no_grad()
def disable_dropout(causal_lm: Any) -> bool:
    """Make a model compute in training mode what it computes in evaluation mode.

    Rates of dropout, dropped layers and router jitter become 0 wherever a module or the config holds one. Whether that
    was all is measured: a pass in evaluation mode and two in training mode must agree with evaluation as it was.

    Args:
        causal_lm: the transformers model, adapters injected, whole on this rank; left in the mode it had.

    Returns:
        Whether a rate was above 0.

    Raises:
        ModelError: something else is random, or depends on a rate; the module is named.
    """
    modes = [(module, module.training) for module in causal_lm.modules()]
    config = causal_lm.config
    try:
        expected = _read(causal_lm.eval())
        changed = [_zero_rates(each) for each in (*causal_lm.modules(), config, config.get_text_config())]
        for mode in (False, True, True):
            found = _read(causal_lm.train(mode))
            if not _agree(found[""], expected[""], causal_lm.dtype):
                names = (n for n in found if n and not _agree(found[n], expected.get(n), causal_lm.dtype))
                raise ModelError(
                    f"with its dropout and jitter rates at 0, {type(causal_lm).__name__} computes something else in "
                    f"{'training' if mode else 'evaluation'} mode, first in {next(names, 'its backbone')}: this method "
                    "compares the policy with another view of it and needs a model without randomness of its own"
                )
    finally:
        for module, mode in modes:
            module.training = mode
    return any(changed)


def _zero_rates(holder: Any) -> bool:
    """Set what a module or config calls a rate to 0; whether one was above."""
    own = "drop" in type(holder).__name__.lower()
    rates = [
        name
        for name, value in vars(holder).items()
        if isinstance(value, float) and value > 0 and ("drop" in name or "jitter" in name or (own and name == "p"))
    ]
    for name in rates:
        setattr(holder, name, 0.0)
    return bool(rates)


def _read(causal_lm: Any) -> dict[str, Tensor]:
    """Last hidden states (under an empty name) and, in order, the sum of what every module gives for a few tokens."""
    sums: dict[str, Tensor] = {}

    def note(name: str, module: Any, arguments: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) and output else output
        if isinstance(first, Tensor):
            sums[name] = first.double().sum()

    hooks = [each.register_forward_hook(partial(note, name)) for name, each in causal_lm.named_modules() if name]
    weight = causal_lm.get_input_embeddings().weight
    number = min(PROBE, getattr(causal_lm.config.get_text_config(), "max_position_embeddings", None) or PROBE)
    ids = (torch.arange(1, number + 1, device=weight.device) % weight.shape[0]).unsqueeze(0)
    try:
        output = backbone_of(causal_lm)(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {"": output.last_hidden_state.double()} | sums


def _agree(found: Tensor, expected: Tensor | None, dtype: torch.dtype) -> bool:
    if expected is None:  # a module that was skipped
        return False
    return bool((found - expected).norm() <= _LEAST.get(dtype, 1e-5) * expected.norm())
