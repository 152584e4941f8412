"""What methods with a teacher share, and GKD's loss.

Axes: B completions and N completion tokens of a micro-batch, C of one chunk, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor

from stepkd import losses
from stepkd.data.collate import Batch
from stepkd.data.datamodule import StepData
from stepkd.errors import ConfigError
from stepkd.losses import LossTerms, fused_sum, segment_sum, target_logps, tempered
from stepkd.modules import distillation_settings as settings
from stepkd.modules.base import StepModule
from stepkd.modules.components import Component, ForwardPass
from stepkd.modules.distillation_settings import DivergenceConfig
from stepkd.teachers.cache import write_cache
from stepkd.teachers.local import LocalTeacher
from stepkd.teachers.signals import Teacher

_CPU = torch.device("cpu")


DIVERGENCES: dict[type[DivergenceConfig], Callable[..., Tensor]] = {
    settings.JSD: losses.generalized_jsd,
    settings.ForwardKL: losses.forward_kl,
    settings.ReverseKL: losses.reverse_kl,
    settings.SkewForwardKL: losses.skew_forward_kl,
    settings.SkewReverseKL: losses.skew_reverse_kl,
    settings.BalancedKL: losses.balanced_kl,
    settings.NKD: losses.nkd,
}
"""The function of each: log-probabilities of student and teacher (C, W), where :attr:`DivergenceConfig.whole` says so
also the targets (C,), and the settings, to a divergence (C,) in nats."""
Average = Literal["tokens", "sequences"]


@dataclass
class Distillation(Component):
    """Divergence from a teacher and cross-entropy of the same tokens, in one pass over the logits."""

    divergence: DivergenceConfig
    average: Average
    """Whether every token of the global batch weighs the same, or every completion."""
    weights: Callable[[], tuple[float, float]] | None
    """Weights of divergence and cross-entropy as they are now; None: of the divergence alone, 1."""
    focuses: bool
    """Whether steps have weights."""

    names = ("kd",)

    def __post_init__(self) -> None:
        own = {} if self.divergence.tempers else {"temperature": self.divergence.temperature}
        own |= {name: value for name, value in vars(self.divergence).items() if name != "temperature"}
        function = DIVERGENCES.get(type(self.divergence))
        if function is None:
            names = ", ".join(each.__name__ for each in DIVERGENCES)
            raise ConfigError(f"divergence {type(self.divergence).__name__} has no function in DIVERGENCES ({names})")
        self._divergence = partial(function, **own)

    def count(self, batch: Batch) -> dict[str, float]:
        """The denominator of ``kd``.

        Args:
            batch: a micro-batch.

        Returns:
            For ``tokens`` the completion tokens (or the sum of their weights), for ``sequences`` the completions in
            which something counts.
        """
        weights_N = self._weights(batch)
        if self.average == "tokens":
            return {"kd": float(weights_N.sum())}
        return {"kd": float(len(batch.completion_N[weights_N > 0].unique()))}

    def terms(self, forward: ForwardPass) -> LossTerms:
        """``kd``: the summed divergence (and weighted cross-entropy) in nats.

        Metrics over all completion tokens: ``divergence`` alone, ``agreement`` (share of positions at which both find
        the same argmax token), ``ce`` where it has a weight, ``focus`` (share that counts) where steps have weights.
        """
        batch, signals = forward.batch, forward.signals
        kd_weight, ce_weight = (1.0, 0.0) if self.weights is None else self.weights()
        assert signals is not None

        def position(logits_CV: Tensor, targets_C: Tensor, *chunk: Tensor) -> Tensor:
            student, teacher, argmax_C = signals.compare(
                tempered(logits_CV, self.divergence.logits_temperature), *chunk
            )
            kd_C = self._divergence(student, teacher, *((targets_C,) if self.divergence.whole else ()))
            agree_C = (logits_CV.argmax(-1) == argmax_C).to(kd_C.dtype)
            if self.weights is None:
                return torch.stack([kd_C, kd_C.detach(), agree_C], dim=-1)
            ce_C = -target_logps(logits_CV, targets_C)
            total_C = kd_weight * kd_C + ce_weight * ce_C
            return torch.stack([total_C, kd_C.detach(), agree_C, ce_C.detach()], dim=-1)

        weights_N = self._weights(batch)
        if self.average == "sequences":
            totals_B = segment_sum(weights_N, batch.completion_N, len(batch.examples))
            weights_N = weights_N / totals_B.clamp_min(1e-300)[batch.completion_N]
        arguments = (forward.hidden_NH, weights_N, batch.targets_N, *signals.tensors)
        total, values = fused_sum(position, forward.head, *arguments, chunk_size=forward.chunk_size)
        number = torch.tensor(float(len(values)), device=values.device)
        metrics = {"divergence": (values[:, 1].sum(), number), "agreement": (values[:, 2].sum(), number)}
        if self.focuses:
            metrics["focus"] = ((weights_N > 0).double().sum(), number)
        if self.weights is not None:
            metrics["ce"] = (values[:, 3].sum(), number)
        return LossTerms({"kd": total}, metrics)

    @staticmethod
    def _weights(batch: Batch) -> Tensor:
        """(N,) weight of every target, float64: its step's, or 1 where steps have none."""
        steps = [each.step_weights or (1.0,) * len(each.step_ends) for each in batch.examples]
        weights_S = torch.tensor([w for own in steps for w in own], dtype=torch.float64, device=batch.step_N.device)
        return weights_S[batch.step_N]


class DistillationModule(StepModule):
    """Base of methods whose ``teacher`` scores the policy's text; None: there is none.

    Dropout is off, so that the policy that samples is the one that learns.
    """

    teacher: Teacher | None = None
    teacher_temperature = 1.0
    """Divides the logits that it is read at."""
    new_tokens = 0
    """Most tokens of a completion that is sampled for the teacher to score; 0: none is sampled."""
    without_dropout = "the model that samples is the one that learns"

    @property
    def shares_prompts(self) -> bool:
        """Where the teacher's pass saves what the policy's saves: micro-batches have to fit both."""
        return super().shares_prompts and (self.teacher is None or self.teacher.shares_prompts)

    def forward_pass(self, micro_batch: Batch) -> ForwardPass:
        """With what the teacher says of the micro-batch."""
        forward = super().forward_pass(micro_batch)
        if self.teacher is not None and self.distils(micro_batch):
            forward.signals = self.teacher.signals(micro_batch, temperature=self.teacher_temperature)
        return forward

    def distils(self, micro_batch: Batch) -> bool:
        """Whether the loss of a micro-batch reads the teacher; where it does not, the teacher is not run on it."""
        return True

    def complete_model(self) -> None:
        """Bind the teacher to the policy."""
        if self.teacher is not None:
            self.teacher.follow(self.model)
            self.teacher.bind(self.model.tokenizer, self.model.vocab_size)
            self.frozen["teacher"] = self.teacher.identity()

    def check_run(self) -> None:
        """Have the teacher check the run, too, and refuse text that is longer than its context."""
        super().check_run()
        if self.teacher is not None:
            template = self.template if self.trainer.is_global_zero and self.trainer.training else None
            self.teacher.start(str(self.trainer.precision), template)
            self.check_data_fits("teacher", self.teacher.max_length, self.new_tokens)

    def shard(self, mesh: Any) -> None:
        """The teacher, too, if it asks for that."""
        super().shard(mesh)
        if self.teacher is not None:
            self.teacher.shard(mesh)

    def gathered(self) -> AbstractContextManager[Any]:
        """With the teacher whole, too."""
        whole = ExitStack()
        whole.enter_context(super().gathered())
        if self.teacher is not None:
            whole.enter_context(self.teacher.gathered())
        return whole

    def method_state(self) -> dict[str, Any]:
        """What a teacher that keeps up with the policy needs to be made again."""
        state = {} if self.teacher is None else self.teacher.state()
        return {"teacher": state} if state else {}

    def adopt_method_state(self, state: dict[str, Any]) -> None:
        """Take over the teacher's state."""
        if self.teacher is not None and "teacher" in state:
            self.teacher.restore(state["teacher"])


def cache_teacher(
    module: StepModule,
    data: StepData,
    out: str | Path,
    *,
    validation: bool = True,
    device: torch.device = _CPU,
    **how: Any,
) -> dict[str, Any]:
    """Write the cache that a distillation module with the teacher Cached reads, or resume.

    Args:
        module: a module with a divergence and a teacher in this process, not attached to a Trainer.
        data: its data; the completions of the training data are scored.
        out: folder of the cache.
        validation: score those of the validation data, too.
        device: where the teacher computes.
        **how: ``top_k``, ``precision`` and ``options`` of :func:`~stepkd.teachers.cache.write_cache`.

    Returns:
        See :func:`~stepkd.teachers.cache.write_cache`.

    Raises:
        ConfigError: another module or teacher; and what ``write_cache`` refuses.
    """
    teacher, loss = getattr(module, "teacher", None), module.components[0]
    if not isinstance(loss, Distillation) or not isinstance(teacher, LocalTeacher):
        raise ConfigError("a teacher's cache needs a distillation recipe (GKDModule) with the teacher Local")
    data.trainer = SimpleNamespace(lightning_module=module, global_rank=0, world_size=1)  # type: ignore[assignment]
    data.setup("fit")
    names = ("train", "validation") if validation else ("train",)
    teacher.bind(module.tokenizer)
    teacher.place(device)
    examples = [example for name in names for example in data.examples.get(name, [])]
    how |= {"max_tokens": module.micro_batch_tokens, "chunk_size": module.chunk_size}
    return write_cache(out, teacher, examples, temperature=loss.divergence.logits_temperature, **how)
