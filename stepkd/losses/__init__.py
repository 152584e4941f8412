"""Pure loss functions: tensors in, named sums and detached metrics out. Knows only torch."""

from stepkd.losses.linear import DEFAULT_CHUNK, VocabHead, chunked_head
from stepkd.losses.reduce import LossTerms, reduce, segment_sum
from stepkd.losses.token import cross_entropy, target_logps, token_logps

__all__ = [
    "DEFAULT_CHUNK",
    "LossTerms",
    "VocabHead",
    "chunked_head",
    "cross_entropy",
    "reduce",
    "segment_sum",
    "target_logps",
    "token_logps",
]
