"""The LightningDataModules of reward models and preference training: step labels, feedback, and pairs."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any, cast

from stepkd.data.datamodule import StepData
from stepkd.data.encode import Example
from stepkd.data.feedback import RIGHT, UNKNOWN, WRONG, FeedbackEncoder, FeedbackExample, PairEncoder, PairExample
from stepkd.data.rows import PREFERENCE, ROLLOUT, STEP_PREFERENCE, STEPWISE, UNPAIRED
from stepkd.data.spec import Rows
from stepkd.data.step_encode import StepEncoder, StepExample
from stepkd.data.step_labels import LabelRule
from stepkd.errors import ConfigError, DataError
from stepkd.steps.labels import tally

logger = logging.getLogger(__name__)


class StepLabelData(StepData):
    """Solutions with step labels: step texts (TRL's stepwise supervision), or labelled rollouts with their token ids.

    Args:
        train: rows to train on; evaluation-only data is refused unless the spec allows it.
        validation: held-out rows with labels.
        test: rows for ``stepkd test``.
        labels: how labels become targets.
        allow_one_class: train although all labels are the same; without it that is an error: nothing can be learnt.
        **settings: ``template`` (the one that the solutions were sampled with is the natural choice), ``max_length``
            (markers included), ``segmenter`` (cuts solutions that come as one text) and what else
            :class:`~stepkd.data.datamodule.StepData` takes.
    """

    def __init__(
        self,
        train: Rows | None = None,
        validation: Rows | None = None,
        test: Rows | None = None,
        labels: LabelRule | None = None,
        allow_one_class: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(train, validation, test, None, **settings)
        self.labels = labels or LabelRule()
        self.ratings = self.labels.kind == "rating"
        self.allow_one_class = allow_one_class

    contracts = ()  # a source knows its contract, a file's columns tell it
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
            segmenter=self.segmenter,
        )

    def check(self, name: str, examples: list[Example]) -> dict[str, int]:
        """Labelled steps per class (soft ones by the likelier class); training labels that all agree are refused."""
        head = self._module.head_spec
        labelled = cast(list[StepExample], examples)
        targets = [target for example in labelled for target in example.targets if target is not None]
        names = ("wrong", "right") if head.num_classes == 2 else ("wrong", "neutral", "right")
        counts = Counter(names[max(range(head.num_classes), key=target.__getitem__)] for target in targets)
        if head.meaning == "value" and self.labels.after_error != "keep":
            logger.warning(
                "labels of future success (head.meaning: value) are cut off after the first wrong step "
                "(labels.after_error: %s): the last step, which scores are reduced by, is then learnt from nearly "
                "right solutions only; keep them, or reduce by the minimum",
                self.labels.after_error,
            )
        if name == "train" and len(set(targets)) < 2 and not self.allow_one_class:
            raise DataError(
                f"all {len(targets)} training labels are the same ({next(iter(counts))}): a reward model "
                "trained on them learns a constant. Give rows with right and wrong steps, or set data.allow_one_class",
                column="labels",
            )
        return dict(counts)


class PreferenceData(StepData):
    """What feedback and pairs share: rows in one of a few contracts, and prompts whose examples stay together.

    Args:
        train, validation, test: rows; evaluation-only data is refused for training unless the spec allows it.
        keep_prompts_together: shuffle prompts in place of examples, so that completions of one prompt meet in a batch
            and the prompt is read once.
        overlap_ngram: as for :class:`~stepkd.data.datamodule.StepData`.
        **settings: ``template`` (that which the completions were sampled with), ``segmenter`` (cuts completions that
            come as one text) and what else :class:`~stepkd.data.datamodule.StepData` takes.
    """

    def __init__(
        self,
        train: Rows | None = None,
        validation: Rows | None = None,
        test: Rows | None = None,
        keep_prompts_together: bool = False,
        overlap_ngram: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__(train, validation, test, None, overlap_ngram=overlap_ngram, **settings)
        self.keep_prompts_together = keep_prompts_together


class FeedbackData(PreferenceData):
    """Completions with an outcome and step labels: labelled rollouts, stepwise rows, or unpaired rows (outcome only).

    Args:
        train, validation, test: rows.
        labels: how step labels become right or wrong; what follows the first wrong step keeps its label by default.
        allow_one_class: train although no outcome, or no step, is right (or wrong).
        **settings: ``template``, ``max_length`` (longer completions lose whole steps, and that is counted) and what
            else :class:`PreferenceData` takes.
    """

    contracts = (ROLLOUT.name, STEPWISE.name, UNPAIRED.name)
    feedback = "right and wrong completions"

    def __init__(
        self,
        train: Rows | None = None,
        validation: Rows | None = None,
        test: Rows | None = None,
        labels: LabelRule | None = None,
        allow_one_class: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(train, validation, test, **settings)
        self.labels = labels or LabelRule(after_error="keep")
        self.ratings = self.labels.kind == "rating"
        self.allow_one_class = allow_one_class

    def make_encoder(self) -> FeedbackEncoder:
        """The encoder for the policy's tokenizer."""
        return FeedbackEncoder(
            self._tokenizer(), self.template, self.segmenter, max_length=self.max_length, labels=self.labels
        )

    def check(self, name: str, examples: list[Example]) -> dict[str, int]:
        """Counts of outcomes and steps by label; training data of one class only is refused."""
        counts = feedback_counts(cast(list[FeedbackExample], examples))
        kinds = ("outcomes", "steps") if "step" in getattr(self._module, "loss_names", ()) else ("outcomes",)
        for kind in kinds:
            right, wrong = counts[f"right_{kind}"], counts[f"wrong_{kind}"]
            if name == "train" and right + wrong and not (right and wrong) and not self.allow_one_class:
                raise DataError(
                    f"all {right + wrong} labelled {kind} are {'right' if right else 'wrong'}: nothing contrasts with "
                    "them. Take a stronger or weaker sampler, more samples per problem, or set data.allow_one_class"
                )
            if name == "train" and kind == kinds[-1] and not right + wrong:
                raise DataError(
                    f"no row has labelled {kind}, and {type(self._module).__name__} learns from them: label the rows "
                    "(stepkd label), or use " + ("KTO, which needs none" if kind == "steps" else "other data")
                )
        return counts

    def label_counts(self) -> dict[str, int]:
        """Counts of :func:`feedback_counts` over the training data, for class weights by the ratio rule."""
        return feedback_counts(cast(list[FeedbackExample], self.examples["train"]))


class PairData(PreferenceData):
    """Pairs of completions, or of next steps after a shared prefix.

    Arguments are those of :class:`PreferenceData`; a pair with a side that does not fit into ``max_length`` is left out
    and counted, and a batch counts pairs.
    """

    contracts = (PREFERENCE.name, STEP_PREFERENCE.name)
    encoder_type = PairEncoder
    feedback = "pairs"

    def check(self, name: str, examples: list[Example]) -> dict[str, int]:
        """How many pairs have a prefix, and how many have visit counts."""
        pairs = cast(list[PairExample], examples)
        counts = Counter(
            {
                "with_prefix": sum(bool(pair.row.get("prefix")) for pair in pairs),
                "with_visits": sum(pair.visits is not None for pair in pairs),
            }
        )
        return {key: count for key, count in counts.items() if count}


def feedback_counts(examples: list[FeedbackExample]) -> dict[str, int]:
    """Correct and incorrect outcomes and steps, and conflicts (:func:`~stepkd.steps.labels.tally`)."""
    outcomes = Counter(example.outcome for example in examples)
    steps = Counter(label for example in examples for label in example.step_labels)
    return {
        "right_outcomes": outcomes[RIGHT],
        "wrong_outcomes": outcomes[WRONG],
        "right_steps": steps[RIGHT],
        "wrong_steps": steps[WRONG],
        "conflicts": tally(
            (example.outcome == RIGHT for example in examples),
            ([None if label == UNKNOWN else label == RIGHT for label in example.step_labels] for example in examples),
        ).flawed,
    }
