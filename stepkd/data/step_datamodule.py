"""The LightningDataModule of reward models: step-labelled rows in, loaders of optimiser-step batches out."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any, cast

from stepkd.data.datamodule import StepData
from stepkd.data.encode import Example
from stepkd.data.spec import DataSpec, Rows
from stepkd.data.step_encode import StepEncoder, StepExample
from stepkd.data.step_labels import LabelRule
from stepkd.errors import ConfigError, DataError

logger = logging.getLogger(__name__)


class StepLabelData(StepData):
    """Solutions with step labels: step texts (TRL's stepwise supervision), or labelled rollouts with their token ids.

    Args:
        train: rows to train on; evaluation-only data is refused unless the spec allows it.
        validation: held-out rows with labels.
        test: rows for ``stepkd test``.
        labels: how labels become targets.
        segmenter: cuts solutions that come as one text without steps.
        allow_one_class: train although all labels are the same; without it that is an error: nothing can be learnt.
        **settings: ``template`` (the one that the solutions were sampled with is the natural choice), ``max_length``
            (markers included) and what else :class:`~stepkd.data.datamodule.StepData` takes.
    """

    def __init__(
        self,
        train: Rows | None = None,
        validation: Rows | None = None,
        test: Rows | None = None,
        labels: LabelRule | None = None,
        segmenter: str = "newline",
        allow_one_class: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(
            train, validation, test, None, segmenter=segmenter, boundary="separate", append_eos=True, **settings
        )
        self.segmenter_name = segmenter
        self.labels = labels or LabelRule()
        self.ratings = self.labels.kind == "rating"
        self.allow_one_class = allow_one_class

    default_template = "math"

    def make_encoder(self) -> StepEncoder:
        """The encoder for the module's tokenizer, markers and classes."""
        module = self._module
        if not hasattr(module, "step_head_ids"):
            raise DataError(
                f"StepLabelData serves reward models, and {type(module).__name__} is none: use stepkd.data.StepData"
            )
        meaning = module.head_spec.meaning
        if (self.labels.scope == "outcome") != (meaning == "outcome"):
            raise ConfigError(
                f"data.labels.scope is {self.labels.scope!r} and model.head.meaning is {meaning!r}: an outcome reward "
                "model sets both to 'outcome', a process reward model neither"
            )
        return StepEncoder(
            module.tokenizer,
            self.template,
            format=module.head_spec.format,
            marker_id=module.step_head_ids.marker,
            max_length=self.max_length,
            num_classes=module.head_spec.num_classes,
            labels=self.labels,
            segmenter=self.segmenter_name,
        )

    def _load(self, name: str, spec: DataSpec) -> list[Example]:
        encoder = self.make_encoder()
        rows = self._rows(name, spec)  # a source knows its contract, a file's columns tell it
        examples = encoder.examples(rows)
        labelled = cast(list[StepExample], examples)
        counts = class_counts(labelled, encoder.num_classes)
        different = {target for example in labelled for target in example.targets if target is not None}
        if self._module.head_spec.meaning == "value" and self.labels.after_error != "keep":
            logger.warning(
                "labels of future success (head.meaning: value) are cut off after the first wrong step "
                "(labels.after_error: %s): the last step, which scores are reduced by, is then learnt from nearly "
                "right solutions only; keep them, or reduce by the minimum",
                self.labels.after_error,
            )
        if name == "train" and len(different) < 2 and not self.allow_one_class:
            raise DataError(
                f"all {sum(counts.values())} training labels are the same ({next(iter(counts))}): a reward model "
                "trained on them learns a constant. Give rows with right and wrong steps, or set data.allow_one_class",
                column="labels",
            )
        dropped = {key: count for key, count in sorted(encoder.counts.items()) if count}
        logger.info(
            "%s: %d solutions, labels %s%s", name, len(examples), dict(counts), f", {dropped}" if dropped else ""
        )
        return examples

    def _identity(self, example: Example) -> tuple[Any, ...]:
        """With the targets: changed labels are other data."""
        labelled = cast(StepExample, example)
        return (*super()._identity(example), labelled.read_at, labelled.targets)


def class_counts(examples: list[StepExample], num_classes: int) -> Counter[str]:
    """How many labelled steps there are per class (soft labels by their more likely class)."""
    names = ("wrong", "right") if num_classes == 2 else ("wrong", "neutral", "right")
    return Counter(
        names[max(range(num_classes), key=target.__getitem__)]
        for example in examples
        for target in example.targets
        if target is not None
    )
