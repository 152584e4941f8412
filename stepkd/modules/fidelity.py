"""How like its teacher a student is, beside how good: the two can part (arXiv 2505.15442).

On the student's own samples of the validation problems, token by token: the KLs in both directions, how often both find
the same argmax token, and the gap of their entropies. By answers: who is correct, and whether the two agree when
neither is. And on the data's own solutions, where there are some, how well either knows when its most likely token is
the one that stands there (ECE).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor

from stepkd.data.collate import Batch
from stepkd.data.completion import Completion
from stepkd.data.encode import with_completion
from stepkd.errors import ConfigError
from stepkd.grading.judge import judge, vote_keys
from stepkd.grading.pool import Grader
from stepkd.losses import chunked_head, entropy, forward_kl, reverse_kl, tempered
from stepkd.models.policy import Policy
from stepkd.sampling.sampler import Sampler, SamplingConfig
from stepkd.sampling.transformers_sampler import TransformersSampler
from stepkd.steps.segment import get_segmenter
from stepkd.teachers.config import Needs
from stepkd.teachers.local import LocalTeacher
from stepkd.teachers.signals import Signals, Teacher

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
        self.chunk_size: int = module.chunk_size
        self._answers: dict[int, tuple[bool, str | None]] = {}

    def __call__(self, examples: Sequence[Completion], indices: Sequence[int]) -> Sums:
        """Sums over some problems.

        Args:
            examples: problems, with or without solutions.
            indices: number of each in the data set; keys its sample.
        """
        prompts = [each.prompt_ids for each in examples]
        drawn = self._sample(TransformersSampler(self.student), prompts, indices, "fidelity")
        own = (self.student.tokenizer, get_segmenter("whole"))
        sums = self._tokens(
            [with_completion(each, rollout.token_ids, *own) for each, rollout in zip(examples, drawn, strict=True)]
        )
        sums |= self._calibration([example for example in examples if len(example.token_ids)])
        if self.spec.answers:
            sums |= self._compared_answers(cast(LocalTeacher, self.teacher), examples, indices)
        return {f"fidelity/{name}": value for name, value in sums.items()}

    def _sample(
        self, sampler: Sampler, prompts: Sequence[Collection[int]], indices: Sequence[int], purpose: str, **how: Any
    ) -> list[Completion]:
        sampling = replace(self.spec.sampling, seed=self.module.seed, **how)
        return [each[0] for each in sampler.sample(prompts, sampling, purpose=purpose, indices=indices)]

    @torch.no_grad()
    def _tokens(self, examples: list[Completion]) -> Sums:
        totals, *moments = torch.zeros(4, len(TOKENS), dtype=torch.float64)
        tokens = 0
        for prepared in self.module.prepare_examples(examples).micro_batches:
            batch = prepared.to(self.student.device)
            values = self._positions(batch)
            rows_N = batch.completion_N.cpu()
            of_problems_BM = totals.new_zeros(batch.num_completions, len(TOKENS))
            of_problems_BM.index_add_(0, rows_N, values.double().cpu())
            tokens_B = totals.new_zeros(batch.num_completions).index_add_(0, rows_N, totals.new_ones(len(values)))
            totals += of_problems_BM.sum(0)
            tokens += len(values)
            moments[0] += of_problems_BM.square().sum(0)
            moments[1] += (of_problems_BM * tokens_B[:, None]).sum(0)
            moments[2] += tokens_B.square().sum()
        sums = {name: (float(total), float(tokens)) for name, total in zip(TOKENS, totals, strict=True)}
        return sums | {
            f"moments/{name}/{part}": (float(moments[row][column]), float(len(examples)))
            for column, name in enumerate(TOKENS)
            for row, part in enumerate(("xx", "xn", "nn"))
        }

    def _positions(self, batch: Batch) -> Tensor:
        """(N, 4): the token measures."""
        signals = self.teacher.signals(batch, temperature=1.0)

        def position(logits_CV: Tensor, targets_C: Tensor, *chunk: Tensor) -> Tensor:
            student, teacher, argmax_C = signals.compare(tempered(logits_CV), *chunk)
            agree_C = (logits_CV.argmax(-1) == argmax_C).to(student.dtype)
            gap_C = entropy(student) - entropy(teacher)
            return torch.stack([forward_kl(student, teacher), reverse_kl(student, teacher), agree_C, gap_C], dim=-1)

        return self._each(position, batch, signals)

    @torch.no_grad()
    def _calibration(self, examples: list[Completion]) -> Sums:
        """By bins of confidence: how much surer than correct either is on given tokens (see
        :func:`fidelity_totals`)."""
        gaps, tokens = torch.zeros(len(CALIBRATED), BINS, dtype=torch.float64), 0
        for prepared in self.module.prepare_examples(examples).micro_batches:
            batch = prepared.to(self.student.device)
            signals = self.teacher.signals(batch, temperature=1.0)

            def position(logits_CV: Tensor, targets_C: Tensor, *chunk: Tensor, signals: Signals = signals) -> Tensor:
                _, teacher, argmax_C = signals.compare(tempered(logits_CV), *chunk)
                whole = teacher.shape == logits_CV.shape
                sure = logits_CV.log_softmax(-1).amax(-1), teacher.amax(-1) if whole else teacher[:, 0]
                correct = logits_CV.argmax(-1) == targets_C, argmax_C == targets_C
                return torch.stack([sure[0].exp().double(), correct[0], sure[1].exp().double(), correct[1]], dim=-1)

            values = self._each(position, batch, signals).double().cpu()
            tokens += len(values)
            for row, (sure_N, correct_N) in enumerate(((values[:, 0], values[:, 1]), (values[:, 2], values[:, 3]))):
                bins_N = (sure_N * BINS).long().clamp(max=BINS - 1)
                gaps[row].index_add_(0, bins_N, sure_N - correct_N)
        return {
            f"{name}/{number}": (float(gap), float(tokens))
            for name, row in zip(CALIBRATED, gaps, strict=True)
            for number, gap in enumerate(row if tokens else ())
        }

    def _each(self, position: Callable[..., Tensor], batch: Batch, signals: Signals) -> Tensor:
        """What a function of logits, targets and the teacher's signals gives at every target."""
        hidden_BTH = self.student.hidden(batch.input_ids_BT, batch.attention_mask_BT)
        arguments = (hidden_BTH.flatten(0, 1)[batch.needed_N], batch.targets_N, *signals.tensors)
        return chunked_head(position, self.student.head, *arguments, chunk_size=self.chunk_size)

    def _compared_answers(self, teacher: LocalTeacher, examples: Sequence[Completion], indices: Sequence[int]) -> Sums:
        """Shares of :data:`ANSWERS`, which sum to 1: both greedy."""
        new = [i for i, index in enumerate(indices) if index not in self._answers]
        if new:
            chosen = [examples[i] for i in new]
            numbers = [indices[i] for i in new]
            drawn = self._answer(teacher.sampler(self.student.device), teacher.prompts(chosen), numbers)
            self._answers |= dict(zip(numbers, self._graded(chosen, drawn), strict=True))
        prompts = [example.prompt_ids for example in examples]
        own = self._graded(examples, self._answer(TransformersSampler(self.student), prompts, indices))
        pairs = [(mine, self._answers[index]) for mine, index in zip(own, indices, strict=True)]
        votes = vote_keys([[mine[1], theirs[1]] for mine, theirs in pairs], self.grader)
        counts = Counter(
            _kind((mine[0], vote[0]), (theirs[0], vote[1])) for (mine, theirs), vote in zip(pairs, votes, strict=True)
        )
        return {f"answers_{name}": (float(counts[name]), float(len(examples))) for name in ANSWERS}

    def _answer(self, sampler: Sampler, prompts: Sequence[Collection[int]], indices: Sequence[int]) -> list[Completion]:
        return self._sample(sampler, prompts, indices, "fidelity answers", temperature=0.0)

    def _graded(self, examples: Sequence[Completion], rollouts: Sequence[Completion]) -> list[tuple[bool, str | None]]:
        """Whether each answer is correct, and its equivalence class."""
        judged = judge([example.row for example in examples], [[rollout] for rollout in rollouts], self.grader)
        return [(record["verdict"] == "correct", record["vote"]) for (record,) in judged]


def _kind(student: tuple[bool, str | None], teacher: tuple[bool, str | None]) -> str:
    if student[0] and teacher[0]:
        return "both_correct"
    if student[0] or teacher[0]:
        return "student_correct" if student[0] else "teacher_correct"
    same = student[1] is not None and student[1] == teacher[1]
    return "same_incorrect" if same else "different_incorrect"


def fidelity_totals(totals: Mapping[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """Sums over all ranks and batches, with what they were taken for in place of parts of it.

    ``fidelity/ece/<bin>`` is a bin's confidence minus correct, over the number of all tokens: absolute values sum to
    the expected calibration error, in [0, 1]. ``fidelity/moments/<metric>/<xx, xn or nn>`` are sums over problems of
    products of x, a problem's sum of the metric, and n, its tokens, over the number of problems: they give
    ``<metric>_se``, the standard error of the mean over tokens with problems as clusters (that of a ratio of sums,
    linearised). 1.96 of them on either side make a 95% interval.
    """
    kept = {name: pair for name, pair in totals.items() if name.split("/")[1:2] not in _PARTS}
    for each in CALIBRATED:
        gaps = [total / number for name, (total, number) in totals.items() if name.startswith(f"fidelity/{each}/")]
        if gaps:
            kept[f"fidelity/{each}"] = (math.fsum(map(abs, gaps)), 1.0)
    for each in TOKENS:
        parts = [totals.get(f"fidelity/moments/{each}/{part}") for part in ("xx", "xn", "nn")]
        if None in parts:
            continue
        (xx, problems), (xn, _), (nn, _) = (part for part in parts if part is not None)
        total, tokens = totals[f"fidelity/{each}"]
        mean = total / tokens
        residual = max(xx - 2 * mean * xn + mean**2 * nn, 0.0)
        if problems > 1:
            kept[f"fidelity/{each}_se"] = (math.sqrt(residual * problems / (problems - 1)) / tokens, 1.0)
    return kept


_PARTS = [["moments"], *([each] for each in CALIBRATED)]
