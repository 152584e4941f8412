"""Whether a model may skip columns of its cache: what continuing several prefixes of one reading needs.

A prefix of a sequence that was read whole is continued by hiding the columns behind its end. That is exact where a
token's keys and values depend on nothing after it, positions are given as ids, and every visible column counts the same
whatever its distance in columns. A sliding window counts columns, a recurrent state has none, and some relative
positions (ALiBi) are taken from the column's number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from stepkd.rollout.decode import Decoder

_KNOWN, _GAP = 4, 24  # tokens of the probe: read and kept, read and hidden


@dataclass(frozen=True)
class GapLimit:
    """How many columns a cache with a gap may have."""

    columns: int | None
    """Most columns, hidden ones included; 0: no gaps at all; None: any number."""
    reason: str = ""
    """Why there is a limit."""

    def allows(self, columns: int) -> bool:
        """Whether a cache that grows to this many columns may have gaps."""
        return self.columns is None or columns <= self.columns


@torch.no_grad()
def gap_limit(decoder: Decoder) -> GapLimit:
    """Find out what the model allows, from its cache's layers and from a short probe.

    The probe reads a few tokens past a gap, and once more without the gap; the hidden states must agree.

    Args:
        decoder: reads and decodes; its model is in evaluation mode.
    """
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    policy = decoder.policy
    ids = torch.arange(1, _KNOWN + _GAP + 2, device=policy.device)[None] % policy.vocab_size
    kept, following = ids[:, :_KNOWN], ids[:, -1:]
    plain = _read(decoder, torch.cat([kept, following], 1))
    layers = getattr(plain.past_key_values, "layers", None)
    if layers is None:
        return GapLimit(0, f"its cache is a {type(plain.past_key_values).__name__}")
    other = {type(each).__name__ for each in layers if type(each) not in (DynamicLayer, DynamicSlidingWindowLayer)}
    if other:
        return GapLimit(0, f"its cache holds layers of the kind {', '.join(sorted(other))}")
    windows = [each.sliding_window for each in layers if type(each) is DynamicSlidingWindowLayer]
    window = min(windows) - 1 if windows else None
    reach = f"its attention reaches back {min(windows)} tokens" if windows else ""
    room = [columns - _KNOWN - 1 for columns in (window, policy.max_length) if columns is not None]
    gap = min([_GAP, *room])
    if gap < 1:
        return GapLimit(0, reach or f"its context is {policy.max_length} tokens")
    expected = plain.last_hidden_state[:, -1]
    cache = _read(decoder, ids[:, : _KNOWN + gap]).past_key_values
    mask = torch.ones(1, _KNOWN + gap + 1, dtype=torch.long, device=policy.device)
    mask[:, _KNOWN:-1] = 0
    output = decoder.forward(following, mask, torch.full_like(following, _KNOWN), cache)
    difference = (output.last_hidden_state[:, -1].double() - expected.double()).norm() / expected.double().norm()
    # Half precision rounds differently in the two layouts (and may route a token to another expert).
    if not difference < (0.3 if expected.dtype in (torch.float16, torch.bfloat16) else 1e-3):
        return GapLimit(0, f"its hidden states change by {float(difference):.1%} across a gap in the attention mask")
    return GapLimit(window, reach)


def _read(decoder: Decoder, ids: torch.Tensor) -> Any:
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    return decoder.forward(ids, torch.ones_like(ids), positions, None)
