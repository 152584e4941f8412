"""Supervised fine-tuning on solutions: the ground the other methods start from."""

from __future__ import annotations

import math
from typing import Any

from stepkd.errors import ConfigError
from stepkd.modules.base import StepModule
from stepkd.modules.components import CrossEntropy
from stepkd.steps.format import marker_token_id


class SFTModule(StepModule):
    """Next-token cross-entropy on completion tokens, the end token included, averaged over the tokens of the whole
    batch (every token weighs the same, whatever its row's length or micro-batch).

    Args:
        token_weights: tokens that weigh more or less than 1, by their text, each >= 0; the average is over the sum of
            the weights, as that of ``torch.nn.functional.cross_entropy(weight=...)``. KG-TRACES (arXiv 2506.00783)
            gives weights to the tags of steps; its released code declares them and does not read them, so that this is
            a reconstruction. Two tokens that are learnt at one place and weigh differently are learnt with other odds:
            multiplied by the ratio of their weights.
        *arguments, **settings: ``policy``, ``optimizer``, ``validation`` and what else
            :class:`~stepkd.modules.base.StepModule` takes.
    """

    components = (CrossEntropy(),)

    def __init__(self, *arguments: Any, token_weights: dict[str, float] | None = None, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.token_weights = token_weights or {}
        if bad := {token: weight for token, weight in self.token_weights.items() if not 0 <= weight < math.inf}:
            raise ConfigError(f"token_weights={bad}: each must be a number, 0 or more")

    def complete_model(self) -> None:
        """Look the tokens up."""
        named = self.token_weights.items()
        ids = {marker_token_id(self.tokenizer, token, what="token_weights:"): weight for token, weight in named}
        self.components = (CrossEntropy(ids),)
