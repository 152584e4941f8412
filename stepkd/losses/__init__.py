"""Pure loss functions: tensors in, named sums and detached metrics out. Knows only torch."""

from stepkd.losses.linear import DEFAULT_CHUNK, VocabHead, chunked_head
from stepkd.losses.prm import label_token_logps, step_cross_entropy, step_weights
from stepkd.losses.reduce import LossTerms, reduce, segment_sum
from stepkd.losses.token import cross_entropy, target_logps, token_logps

__all__ = [
    "DEFAULT_CHUNK",
    "LossTerms",
    "VocabHead",
    "chunked_head",
    "cross_entropy",
    "label_token_logps",
    "reduce",
    "segment_sum",
    "step_cross_entropy",
    "step_weights",
    "target_logps",
    "token_logps",
]
