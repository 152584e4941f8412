"""Dropout off for good: methods that compare a policy with a reference want the same view of both."""

from __future__ import annotations

from torch import nn

_RATES = ("attention_dropout", "attn_dropout", "dropout", "resid_dropout", "hidden_dropout", "activation_dropout")
"""Attributes in which transformers' modules keep a rate that they hand to a function."""


def disable_dropout(model: nn.Module) -> int:
    """Set every dropout rate of a model to 0, adapters included.

    Returns:
        How many rates were above 0.
    """
    changed = 0
    for module in model.modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            module.p = 0.0
            changed += 1
        for name in _RATES:
            rate = getattr(module, name, None)
            if isinstance(rate, float) and rate > 0:
                setattr(module, name, 0.0)
                changed += 1
    return changed
