"""How like its teacher a student is, beside how good: the two can part (arXiv 2505.15442).

On the student's own samples of the validation problems, token by token: the KLs in both directions, how often both find
the same argmax token, and the gap of their entropies. By answers: who is correct, and whether the two agree when
neither is. And on the data's own solutions, where there are some, how well either knows when its most likely token is
the one that stands there (ECE).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor

from stepkd.data.completion import Completion
from stepkd.data.encode import with_completion
from stepkd.errors import ConfigError
from stepkd.grading.judge import judge, vote_keys
from stepkd.grading.pool import Grader
from stepkd.losses import chunked_head, entropy, forward_kl, reverse_kl, tempered
from stepkd.models.policy import Policy
from stepkd.modules.components import ForwardPass
from stepkd.sampling.engine import Engine, SamplingConfig
from stepkd.steps.segment import get_segmenter
from stepkd.teachers.config import Needs
from stepkd.teachers.local import LocalTeacher
from stepkd.teachers.routed import NOTHING
from stepkd.teachers.signals import Compared, Signals, Teacher

Sums = dict[str, tuple[float, float]]
"""Name -> sum and number of what it is a mean of."""

TOKENS = ("forward_kl", "reverse_kl", "agreement", "entropy_gap")
"""Means over the tokens of samples, the gap that of student minus teacher."""
CALIBRATED = ("ece", "teacher_ece")
BINS = 15
"""Equally wide bins of confidence for the expected calibration error."""
ANSWERS = ("both_correct", "student_correct", "teacher_correct", "same_incorrect", "different_incorrect")


@dataclass(frozen=True)
class FidelityConfig:
    """What validation measures of a student's likeness to its teacher."""

    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(max_new_tokens=256))
    """How the samples are drawn that tokens are compared on: one per problem, at a temperature above 0. Its
    seed is the run's."""
    answers: bool = True
    """Whether both also answer greedily, and are graded; the teacher does so once."""

    def needs(self) -> Needs:
        """What it asks of a teacher."""
        answers: Needs = {"writes": "fidelity.answers compares the answers of two models"}
        return {"fresh": "fidelity compares on fresh samples"} | (answers if self.answers else {})

    def __post_init__(self) -> None:
        if self.sampling.n != 1 or self.sampling.temperature == 0:
            raise ConfigError(
                f"fidelity.sampling: n={self.sampling.n}, temperature={self.sampling.temperature}: one sample per "
                "problem, at a temperature above 0"
            )


class Fidelity:
    """Compares a student with its teacher on validation problems.

    Args:
        spec: what is measured.
        module: whose ``model`` is the student, beside its ``teacher``; samples are keyed by its ``seed``, so that every
            validation has the same noise.
        grader: judges answers.
    """

    def __init__(self, spec: FidelityConfig, module: Any, grader: Grader) -> None:
        self.spec, self.module, self.grader = spec, module, grader
        self.student: Policy = module.model
        self.teacher: Teacher = module.teacher
        self._answers: dict[int, tuple[bool, str | None]] = {}

    def __call__(self, examples: Sequence[Completion], indices: Sequence[int]) -> Sums:
        """Sums over some problems; those of calibration by bins of confidence (:func:`with_calibration`).

        Args:
            examples: problems, with or without solutions.
            indices: number of each in the data set; keys its sample.
        """
        drawn = self._sample(self.module.validation_engine, [e.prompt_ids for e in examples], indices, "fidelity")
        own = (self.student.tokenizer, get_segmenter("whole"))
        samples = [with_completion(each, drawn.token_ids, *own) for each, drawn in zip(examples, drawn, strict=True)]
        values_NM = self._at_tokens(_likeness, samples)
        sums = {name: (float(values_NM[:, i].sum()), float(len(values_NM))) for i, name in enumerate(TOKENS)}
        values_NM = self._at_tokens(_confidence, [example for example in examples if len(example.token_ids)])
        for name, (sure_N, correct_N) in zip(CALIBRATED, values_NM.T.split(2), strict=True):
            bins_N = (sure_N * BINS).long().clamp(max=BINS - 1)
            gaps = torch.zeros(BINS, dtype=torch.float64).index_add_(0, bins_N, sure_N - correct_N)
            sums |= {f"{name}/{bin_}": (float(gap), float(len(sure_N))) for bin_, gap in enumerate(gaps)}
        if self.spec.answers:
            sums |= self._compared_answers(cast(LocalTeacher, self.teacher), examples, indices)
        return {f"fidelity/{name}": value for name, value in sums.items()}

    def _sample(
        self, engine: Engine, prompts: Sequence[Collection[int]], indices: Sequence[int], purpose: str, **how: Any
    ) -> list[Completion]:
        sampling = replace(self.spec.sampling, seed=self.module.seed, **how)
        return [each[0] for each in engine.generate(prompts, sampling, purpose=purpose, indices=indices)]

    @torch.no_grad()
    def _at_tokens(self, measure: Callable[[Tensor, Tensor, Compared], list[Tensor]], of: list[Completion]) -> Tensor:
        """(N, 4) float64: a measure of logits, targets and both distributions at every token of some completions."""
        found = [torch.zeros(0, 4, dtype=torch.float64)]
        for micro_batch in self.module.prepare_examples(of):
            forward = ForwardPass(self.student, micro_batch.to(self.student.device), self.module.chunk_size)
            signals = self.teacher.signals(forward.batch, temperature=1.0)

            def position(logits_CV: Tensor, targets_C: Tensor, *chunk: Tensor, signals: Signals = signals) -> Tensor:
                columns = measure(logits_CV, targets_C, signals.compare(tempered(logits_CV), *chunk))
                return torch.stack([column.double() for column in columns], dim=-1)

            arguments = (forward.hidden_NH, forward.batch.targets_N, *signals.tensors)
            found.append(chunked_head(position, forward.head, *arguments, chunk_size=forward.chunk_size).cpu())
        return torch.cat(found)

    def _compared_answers(self, teacher: LocalTeacher, examples: Sequence[Completion], indices: Sequence[int]) -> Sums:
        """Shares of :data:`ANSWERS`, which sum to 1: both greedy."""

        def answers(engine: Engine, prompts: Sequence[Collection[int]], places: Sequence[int]) -> Any:
            """Whether each answer is correct, and its equivalence class."""
            numbers, rows = [indices[i] for i in places], [examples[i].row for i in places]
            drawn = self._sample(engine, prompts, numbers, "fidelity answers", temperature=0.0)
            judged = judge(rows, [[each] for each in drawn], self.grader)
            return [(record["verdict"] == "correct", record["vote"]) for (record,) in judged]

        if new := [i for i, index in enumerate(indices) if index not in self._answers]:
            prompts = teacher.prompts([examples[i] for i in new])
            theirs = answers(teacher.engine(self.student.device), prompts, new)
            self._answers |= {indices[i]: answer for i, answer in zip(new, theirs, strict=True)}
        prompts = [example.prompt_ids for example in examples]
        own = answers(self.module.validation_engine, prompts, range(len(examples)))
        pairs = [(mine, self._answers[index]) for mine, index in zip(own, indices, strict=True)]
        votes = vote_keys([[mine[1], theirs[1]] for mine, theirs in pairs], self.grader)
        counts = Counter(
            _kind((mine[0], vote[0]), (theirs[0], vote[1])) for (mine, theirs), vote in zip(pairs, votes, strict=True)
        )
        return {f"answers_{name}": (float(counts[name]), float(len(examples))) for name in ANSWERS}


def _likeness(logits_CV: Tensor, targets_C: Tensor, compared: Compared) -> list[Tensor]:
    """:data:`TOKENS`."""
    student, teacher, argmax_C = compared
    gap_C = entropy(student) - entropy(teacher)
    return [forward_kl(student, teacher), reverse_kl(student, teacher), logits_CV.argmax(-1) == argmax_C, gap_C]


def _confidence(logits_CV: Tensor, targets_C: Tensor, compared: Compared) -> list[Tensor]:
    """Of student and teacher: the probability of the most likely token, and whether it is the target."""
    _, teacher, argmax_C = compared
    theirs_C = teacher[:, 0]
    if teacher.shape == logits_CV.shape:  # of rows of the most likely tokens alone, the first is it
        theirs_C = torch.where(teacher[:, -1] == NOTHING, theirs_C, teacher.amax(-1))
    own = [logits_CV.log_softmax(-1).amax(-1).exp(), logits_CV.argmax(-1) == targets_C]
    return [*own, theirs_C.exp(), argmax_C == targets_C]


def _kind(student: tuple[bool, str | None], teacher: tuple[bool, str | None]) -> str:
    same = "same_incorrect" if student[1] is not None and student[1] == teacher[1] else "different_incorrect"
    kinds = {(True, True): "both_correct", (True, False): "student_correct", (False, True): "teacher_correct"}
    return kinds.get((student[0], teacher[0]), same)


def with_calibration(values: dict[str, float]) -> dict[str, float]:
    """Metrics with the expected calibration error, in [0, 1], in place of its parts.

    ``fidelity/ece/<bin>`` is a bin's confidence minus correct, over the number of all tokens: the error is the sum of
    their absolute values.
    """
    for each in CALIBRATED:
        bins = [name for name in values if name.startswith(f"fidelity/{each}/")]
        error = math.fsum(abs(values[name]) for name in bins)
        values = {name: value for name, value in values.items() if name not in bins}
        values |= {f"fidelity/{each}": error} if bins else {}
    return values
