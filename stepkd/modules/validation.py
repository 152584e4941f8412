"""Validation by sampling: are the policy's own completions right?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stepkd.data.batching import StepBatch
from stepkd.data.completion import Completion
from stepkd.errors import check_bounds
from stepkd.grading.extract import DEFAULT_EXTRACTORS
from stepkd.grading.judge import judge, rollout_row
from stepkd.grading.pool import Grader, GradingConfig
from stepkd.models.policy import Policy
from stepkd.runs.progress import PhaseTracker
from stepkd.sampling.sampler import SamplingConfig
from stepkd.sampling.transformers_sampler import TransformersSampler
from stepkd.steps.labels import tally
from stepkd.steps.segment import get_segmenter, segment, step_ends
from stepkd.steps.text import text_from_ids


@dataclass(frozen=True)
class ValidationConfig:
    """How validation and prediction sample and score."""

    samples: int = 0
    """Completions sampled per validation problem; 0 measures the held-out loss only. Prediction draws at least one."""
    temperature: float = 0.0
    """Sampling temperature; 0 is greedy."""
    max_new_tokens: int = 256
    """Longest completion in tokens."""
    max_rows: int = 64
    """Completions decoded at once."""
    extractors: tuple[str, ...] = DEFAULT_EXTRACTORS
    """How the final answer is found, in order (see ``stepkd.grading``)."""
    deadline_s: float = 2.0
    """Hard limit per graded answer, in seconds."""
    segmenter: str = "newline"
    """How sampled completions are cut into steps in rollout files."""

    def __post_init__(self) -> None:
        check_bounds("validation.", self, samples="[0, inf)")
        object.__setattr__(self, "extractors", tuple(self.extractors))

    def sampling(self, seed: int) -> SamplingConfig:
        """The same settings as the sampler wants them."""
        return SamplingConfig(
            n=max(self.samples, 1), temperature=self.temperature, max_new_tokens=self.max_new_tokens, seed=seed
        )


class SampledAccuracy:
    """Samples, grades and counts.

    Args:
        policy: the model to sample from.
        spec: the settings.
        seed: keys the sampling noise; the same noise is used at every validation, so that changes come from the model.
    """

    NAMES = (
        *("samples", "correct", "unparsed", "truncated", "tokens"),
        *("labelled_steps", "right_steps", "correct_labelled", "correct_flawed"),
    )
    """Names of the sums that :meth:`__call__` returns."""

    def __init__(self, policy: Policy, spec: ValidationConfig, seed: int) -> None:
        self.spec = spec
        self.sampling = spec.sampling(seed)
        self.sampler = TransformersSampler(policy, max_rows=spec.max_rows)
        self.segmenter = get_segmenter(spec.segmenter)
        self.grader = Grader(GradingConfig(extractors=spec.extractors, deadline_s=spec.deadline_s))

    def __call__(self, batch: StepBatch, phases: PhaseTracker) -> dict[str, float]:
        """Sums over this rank's problems; ``correct_flawed`` of :func:`~stepkd.steps.labels.tally`."""
        _, judged = self._judged(batch, phases, "validation")
        sums = dict.fromkeys(self.NAMES, 0.0)
        together = [sample for samples in judged for sample in samples]
        for sample in together:
            labels = sample["step_labels"]
            sums["samples"] += 1
            sums["unparsed"] += sample["verdict"] == "unparsed"
            sums["truncated"] += sample["finish"] == "length"
            sums["tokens"] += sample["tokens"]
            if labels is not None:
                sums["labelled_steps"] += len(labels) - labels.count(None)
                sums["right_steps"] += labels.count(True)
        counts = tally(
            [sample["verdict"] == "correct" for sample in together], [sample["step_labels"] for sample in together]
        )
        return sums | {
            "correct": counts.correct,
            "correct_labelled": counts.labelled,
            "correct_flawed": counts.flawed,
        }

    @staticmethod
    def rates(sums: Mapping[str, float]) -> dict[str, float]:
        """Shares and means from sums over all ranks; empty when nothing was sampled."""
        if not sums.get("samples"):
            return {}
        counted = {"accuracy": "correct", "unparsed": "unparsed", "truncated": "truncated", "tokens": "tokens"}
        rates = {name: sums[of] / sums["samples"] for name, of in counted.items()}
        if sums["labelled_steps"]:
            rates["step_accuracy"] = sums["right_steps"] / sums["labelled_steps"]
            if sums["correct_labelled"]:
                rates["correct_with_wrong_step"] = sums["correct_flawed"] / sums["correct_labelled"]
        return rates

    def rollout_rows(self, batch: StepBatch, phases: PhaseTracker, *, model_id: str) -> list[dict[str, Any]]:
        """Sample, judge and return rollout rows with their provenance."""
        rollouts, judged = self._judged(batch, phases, "predict")
        sampling = {k: getattr(self.sampling, k) for k in ("n", "temperature", "top_p", "top_k", "max_new_tokens")}
        rows = []
        for example, samples, records in zip(batch.examples, rollouts, judged, strict=True):
            for rollout, record in zip(samples, records, strict=True):
                text = text_from_ids(self.sampler.policy.tokenizer, rollout.token_ids, rollout.raw_logprobs)
                spans = segment(self.segmenter, text)
                steps = [text.span_text(*span) for span in spans]
                rows.append(
                    rollout_row(example.row, rollout, record, step_ends(spans), steps)
                    | {
                        "sample": rollout.sample,
                        "model": model_id,
                        "sampling": sampling,
                        "seed": self.sampling.seed,
                        "segmenter": self.spec.segmenter,
                    }
                )
        return rows

    def _judged(
        self, batch: StepBatch, phases: PhaseTracker, purpose: str
    ) -> tuple[list[list[Completion]], list[list[dict[str, Any]]]]:
        prompts = [example.prompt_ids for example in batch.examples]
        with phases.phase("rollout", total=len(prompts) * self.sampling.n):
            rollouts = self.sampler.sample(
                prompts, self.sampling, purpose=purpose, indices=batch.indices, on_progress=phases.advance
            )
        with phases.phase("grading", total=len(prompts) * self.sampling.n):
            return rollouts, judge([example.row for example in batch.examples], rollouts, self.grader)

    def close(self) -> None:
        """Stop the grader's workers."""
        self.grader.close()
