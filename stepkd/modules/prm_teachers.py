"""Reward models that teach, and what learns from them: MCMI trains a teacher, StepDistillation distils one into a
smaller model (with LELP where its head has sub-classes).

Axes: L labelled steps, C classes from worst to best, K their sub-classes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from stepkd.data.collate import Batch
from stepkd.data.templates import template_name
from stepkd.errors import ConfigError, ModelError, check_bounds
from stepkd.losses import LossTerms, class_centroids, likeliest, mcmi, subclass_directions, subclass_targets
from stepkd.models.checkpoint import load_trained, weights_fingerprint
from stepkd.models.head import evaluation_mode
from stepkd.models.policy import Policy
from stepkd.models.source import trained_template
from stepkd.modules.components import ForwardPass, StepLoss
from stepkd.sampling.annotate import check_same_vocabulary

READ = 2048
"""Solutions of the training data, evenly spread, that are read before the first step."""
POSITIONS = 65_536
"""Steps (or tokens, where an outcome is learnt at each) of theirs that are kept, by about: a bound on memory."""


@dataclass(frozen=True, eq=False)
class FittedLoss(StepLoss):
    """A loss with constants of the training data, which are computed before the first step; checkpoints hold them."""

    fitted: dict[str, Tensor] = field(default_factory=dict, init=False)
    """The constants by name; empty until :meth:`begin` or a checkpoint gives them."""
    frozen: dict[str, str] = field(default_factory=dict, init=False)
    """Fingerprint of a frozen model that it reads, under the path of its setting."""

    def bound(self, policy: Policy) -> FittedLoss:
        """One of this run alone."""
        return replace(self)

    def count(self, batch: Batch) -> dict[str, float]:
        """Labelled steps."""
        return {name: float(batch.read_L.numel()) for name in self.names}

    @abstractmethod
    def read(self, forward: ForwardPass) -> tuple[Tensor, ...]:
        """Tensors by labelled step of a micro-batch that :meth:`fit` is to see of all of them."""

    @abstractmethod
    def fit(self, policy: Policy, *tensors: Tensor) -> Mapping[str, Tensor]:
        """The constants of the model that is trained, by what :meth:`read` gave for all labelled steps."""

    def begin(self, module: Any) -> None:
        """Compute the constants, unless a checkpoint gave them.

        Args:
            module: the module that is about to train.

        Raises:
            ConfigError: there is no training data to read.
        """
        if self.fitted:
            return
        examples = getattr(module.datamodule, "examples", {}).get("train", ())
        if not examples:
            raise ConfigError(f"losses: {type(self).__name__} reads the training data first: train with StepData")
        batches = module.prepare_examples(examples[:: -(-len(examples) // READ)])
        every = max(1, sum(each.read_L.numel() for each in batches) // POSITIONS)
        with torch.no_grad(), module.gathered(), evaluation_mode(module.model):
            found = [self.read(module.forward_pass(each.to(module.device))) for each in batches[::every]]
        self.fitted.update(self.fit(module.model, *map(torch.cat, zip(*found, strict=True))))

    def constants(self, device: torch.device) -> dict[str, Tensor]:
        """What was fitted, on a device.

        Raises:
            ConfigError: nothing was: a validation of weights alone, which do not hold it.
        """
        if not self.fitted:
            raise ConfigError(
                f"losses: {type(self).__name__} has constants that training computes and checkpoints keep: validate "
                "with --ckpt_path of a run in place of its weights alone, or leave this loss out"
            )
        return {name: value.to(device) for name, value in self.fitted.items()}


@dataclass(frozen=True, eq=False)
class MCMI(FittedLoss):
    """Maximal conditional mutual information (arXiv 2401.08732): trains a reward model that is to teach, beside
    ``StepCrossEntropy``, with a small weight (``loss_weights: {mcmi: 0.1}``; a run of the authors' has 0.15), which has
    to be given: at 1 steps that are not sure are pushed away from their labels.

    It keeps predictions for steps of one label apart, which cross-entropy makes alike, so that soft labels say more.
    Begin with a trained model, as the paper does: what predictions are kept away from is their mean by label before the
    first step, over up to 2048 solutions, as in the authors' code. See :func:`stepkd.losses.mcmi`.
    """

    names = ("mcmi",)
    reads_head = False

    def read(self, forward: ForwardPass) -> tuple[Tensor, ...]:
        """Predictions and labels."""
        return forward.step_logps_LC, forward.batch.targets_LC

    def fit(self, policy: Policy, *tensors: Tensor) -> Mapping[str, Tensor]:
        """The centroids."""
        return {"centroids_CC": class_centroids(*tensors)}

    def terms(self, forward: ForwardPass) -> LossTerms:
        """``mcmi``: minus the distances from the centroids, in nats."""
        centroids_CC = self.constants(forward.step_logps_LC.device)["centroids_CC"]
        return mcmi(forward.step_logps_LC, forward.batch.targets_LC, centroids_CC)


@dataclass(frozen=True, eq=False)
class StepDistillation(FittedLoss):
    """Distillation of a trained reward model, step by step: soft cross-entropy with its probabilities.

    Of a head with ``subclasses`` above 1 it is LELP (arXiv 2409.20449, see :func:`stepkd.losses.subclass_directions`):
    each class of the teacher is split by its features, and the student learns the sub-classes. To it the labels
    of the data say which steps are read, and nothing else; ``LanguageModelling`` beside it and ``after_error:
    truncate`` go by what they say.
    """

    teacher: str
    """Run, export or folder of the reward model, of the student's vocabulary, steps, classes and ``head.meaning``."""
    temperature: float = 1.0
    """Divides projections on the directions of sub-classes, > 0; 1 is about their standard deviation (ours: the
    paper's scale was not found)."""
    _teachers: list[Policy] = field(default_factory=list, init=False)

    names = ("step_kd",)

    def __post_init__(self) -> None:
        check_bounds("losses.", self, temperature="(0, inf)")

    def bound(self, policy: Policy) -> StepDistillation:
        """With its teacher.

        Raises:
            ModelError: no reward model, or one that reads other tokens or steps.
            ConfigError: sub-classes are to be found in a head of several members.
        """
        own, teacher = replace(self), load_trained(self.teacher)
        check_same_vocabulary(policy.tokenizer, teacher.tokenizer)
        ours, theirs = policy.require_step_head().spec, None if teacher.step_head is None else teacher.step_head.spec
        has, wanted = (
            "no step head" if each is None else f"{each.num_classes} classes of {each.meaning} and {each.format}"
            for each in (theirs, ours)
        )
        if has != wanted:
            what = f"give a reward model of the student's, {wanted}"
            raise ModelError(f"losses.teacher={self.teacher} has {has}: {what}")
        if ours.subclasses > 1 and teacher.require_step_head().spec.members > 1:
            raise ConfigError(
                f"losses.teacher={self.teacher} has head.members above 1, and sub-classes are found by the one output "
                "layer of a head: set head.subclasses to 1, or take another teacher"
            )
        own._teachers.append(teacher.requires_grad_(False).eval())
        own.frozen["losses.teacher"] = weights_fingerprint(teacher)
        return own

    def begin(self, module: Any) -> None:
        """Check that the teacher can read the run's text, and find its sub-classes where the student's head has any.

        Raises:
            ConfigError: text that is longer than its context, or written under another prompt template than its own.
        """
        module.check_data_fits("teacher", self._teachers[0].max_length)
        trained = trained_template(self.teacher)
        if trained is not None and module.template not in (None, trained):
            names = template_name(trained), template_name(module.template)
            raise ConfigError(f"losses.teacher was trained with the template {names[0]}, data.template is {names[1]}")
        if module.model.require_step_head().spec.subclasses > 1:
            super().begin(module)

    def read(self, forward: ForwardPass) -> tuple[Tensor, ...]:
        """The teacher's log-probabilities (L, C) and its features (L, H)."""
        (teacher,), batch = self._teachers, forward.batch
        teacher.to(batch.read_L.device)
        with torch.no_grad():
            hidden_BTH = teacher.hidden(batch.input_ids_BT, batch.attention_mask_BT, batch.shared_BT)
            hidden_LH, head = hidden_BTH.flatten(0, 1)[batch.read_L], teacher.require_step_head()
            logps_LC = head.mean_logps(hidden_LH, teacher.head, chunk_size=forward.chunk_size)
            return logps_LC, head.features(hidden_LH)

    def fit(self, policy: Policy, *tensors: Tensor) -> Mapping[str, Tensor]:
        """The directions of the sub-classes."""
        (teacher,), (logps_LC, features_LH) = self._teachers, tensors
        weights_KH = teacher.require_step_head().output_weights(teacher.causal_lm.get_output_embeddings())
        count = policy.require_step_head().spec.subclasses
        directions_CDH, offsets_CD = subclass_directions(features_LH, logps_LC, weights_KH, count)
        return {"directions_CDH": directions_CDH, "offsets_CD": offsets_CD}

    def terms(self, forward: ForwardPass) -> LossTerms:
        """``step_kd``: summed cross-entropy (nats) with the teacher's probabilities; metric ``teacher_agreement``:
        share of steps whose most likely class is the teacher's."""
        logps_LC, features_LH = self.read(forward)
        targets_LK = logps_LC.softmax(-1)
        hidden_LH, head = forward.hidden_at(forward.batch.read_L), forward.policy.require_step_head()
        if head.spec.subclasses > 1:
            found = self.constants(features_LH.device)
            targets_LK = subclass_targets(logps_LC, features_LH, **found, temperature=self.temperature)
        logps_LK = head.subclass_logps(hidden_LH, forward.head, chunk_size=forward.chunk_size)
        own_LC = logps_LK.detach().unflatten(-1, (logps_LC.shape[-1], -1)).logsumexp(-1)
        same_L = likeliest(own_LC) == likeliest(logps_LC)
        agreement = (same_L.sum().float(), torch.tensor(float(len(same_L)), device=same_L.device))
        return LossTerms({"step_kd": -(targets_LK.to(logps_LK) * logps_LK).sum()}, {"teacher_agreement": agreement})
