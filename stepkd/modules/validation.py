"""Validation by sampling: are the policy's own completions correct?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from stepkd.data.batching import StepBatch
from stepkd.data.completion import Completion
from stepkd.errors import check_bounds
from stepkd.grading.judge import completion_row, judge
from stepkd.grading.pool import Grader, GradingConfig
from stepkd.models.policy import Policy
from stepkd.runs.progress import PhaseTracker
from stepkd.sampling.engine import Engine, SamplingConfig
from stepkd.sampling.transformers_engine import TransformersEngine
from stepkd.steps.labels import tally
from stepkd.steps.segment import get_segmenter, segment, step_ends
from stepkd.steps.text import text_from_ids

SHOWN = ("prompt", "completion", "expected", "verdict", "tokens", "finish")
"""Columns of the table that loggers get of every validation: the first completion of its first problems."""
MOST_SHOWN = 16


@dataclass(frozen=True)
class ValidationConfig:
    """How validation and prediction sample and score."""

    sampling: SamplingConfig | None = None
    """How every validation problem is sampled, n times; null, the default, measures the held-out loss alone, and
    prediction then draws one completion, greedily, of at most 256 tokens. Its seed is the run's."""
    max_rows: int = 64
    """Completions decoded at once in this process, at least 1; 64 of a small model fit any GPU, more are faster."""
    grading: GradingConfig = field(default_factory=GradingConfig)
    """How final answers are found and compared."""
    segmenter: str = "newline"
    """How sampled completions are cut into steps in files: newline, blank_line, or another segmenter's name."""

    def __post_init__(self) -> None:
        check_bounds("validation.", self, max_rows="[1, inf)")


class SampledAccuracy:
    """Samples, grades and counts.

    Args:
        policy: the model to sample from.
        spec: the settings.
        seed: keys the sampling noise; the same noise is used at every validation, so that changes come from the model.
    """

    def __init__(self, policy: Policy, spec: ValidationConfig, seed: int) -> None:
        self.spec = spec
        self.sampling = replace(spec.sampling or SamplingConfig(temperature=0.0, max_new_tokens=256), seed=seed)
        self.engine: Engine = TransformersEngine(policy, max_rows=spec.max_rows)
        self.segmenter = get_segmenter(spec.segmenter)
        self.grader = Grader(spec.grading)
        self.shown: list[list[Any]] = []

    def __call__(self, batch: StepBatch, phases: PhaseTracker, engine: Engine) -> dict[str, float]:
        """Sums over this rank's problems, sampled by an engine; see :func:`~stepkd.steps.labels.tally`."""
        _, judged = self._judged(batch, phases, "validation", engine)
        for example, (first, *_) in list(zip(batch.examples, judged, strict=True))[: MOST_SHOWN - len(self.shown)]:
            prompt = example.row["prompt"]
            asked = prompt if isinstance(prompt, str) else prompt[-1]["content"]
            told = [first[name] for name in ("verdict", "tokens", "finish")]
            self.shown.append([asked, first["completion"], str(example.row["answer"]), *told])
        together = [sample for samples in judged for sample in samples]
        verdicts, labels = ([sample[name] for sample in together] for name in ("verdict", "step_labels"))
        known = [steps for steps in labels if steps is not None]
        counts = tally([verdict == "correct" for verdict in verdicts], labels)
        return {
            "samples": len(together),
            "correct": counts.correct,
            "unparsed": verdicts.count("unparsed"),
            "truncated": sum(sample["finish"] == "length" for sample in together),
            "tokens": sum(sample["tokens"] for sample in together),
            "labelled_steps": sum(len(steps) - steps.count(None) for steps in known),
            "correct_steps": sum(steps.count(True) for steps in known),
            "correct_labelled": counts.labelled,
            "correct_with_incorrect_step": counts.correct_with_incorrect_step,
        }

    @staticmethod
    def rates(sums: Mapping[str, float]) -> dict[str, float]:
        """Shares and means from sums over all ranks; empty when nothing was sampled."""
        if not sums.get("samples"):
            return {}
        counted = {"accuracy": "correct", "unparsed": "unparsed", "truncated": "truncated", "tokens": "tokens"}
        rates = {name: sums[of] / sums["samples"] for name, of in counted.items()}
        if sums["labelled_steps"]:
            rates["step_accuracy"] = sums["correct_steps"] / sums["labelled_steps"]
            if sums["correct_labelled"]:
                rates["correct_with_incorrect_step"] = sums["correct_with_incorrect_step"] / sums["correct_labelled"]
        return rates

    def completion_rows(self, batch: StepBatch, phases: PhaseTracker, *, model_id: str) -> list[dict[str, Any]]:
        """Sample, judge and return completion rows with their provenance."""
        sampled, judged = self._judged(batch, phases, "predict", self.engine)
        sampling = {k: getattr(self.sampling, k) for k in ("n", "temperature", "top_p", "top_k", "max_new_tokens")}
        rows = []
        for example, samples, records in zip(batch.examples, sampled, judged, strict=True):
            for completion, record in zip(samples, records, strict=True):
                text = text_from_ids(self.engine.policy.tokenizer, completion.token_ids, completion.raw_logprobs)
                spans = segment(self.segmenter, text)
                steps = [text.span_text(*span) for span in spans]
                rows.append(
                    completion_row(example.row, completion, record, step_ends(spans), steps)
                    | {
                        "sample": completion.sample,
                        "model": model_id,
                        "sampling": sampling,
                        "seed": self.sampling.seed,
                        "segmenter": self.spec.segmenter,
                    }
                )
        return rows

    def _judged(
        self, batch: StepBatch, phases: PhaseTracker, purpose: str, engine: Engine
    ) -> tuple[list[list[Completion]], list[list[dict[str, Any]]]]:
        prompts = [example.prompt_ids for example in batch.examples]
        with phases.phase("sampling", total=len(prompts) * self.sampling.n):
            sampled = engine.generate(
                prompts, self.sampling, purpose=purpose, indices=batch.indices, on_progress=phases.advance
            )
        with phases.phase("grading", total=len(prompts) * self.sampling.n):
            return sampled, judge([example.row for example in batch.examples], sampled, self.grader)

    def close(self) -> None:
        """Stop the grader's workers."""
        self.grader.close()
