"""Supervised fine-tuning on solutions: the ground the other methods start from."""

from __future__ import annotations

from stepkd.modules.base import StepModule
from stepkd.modules.components import CrossEntropy


class SFTModule(StepModule):
    """Next-token cross-entropy on completion tokens, the end token included, averaged over the tokens of the whole
    batch (every token weighs the same, whatever its row's length or micro-batch).

    Arguments are those of :class:`~stepkd.modules.base.StepModule`.
    """

    components = (CrossEntropy(),)
