"""Solutions drawn from the policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from stepkd.data.encode import Example
from stepkd.grading import Grader
from stepkd.labels.solutions import PROBLEM_COLUMNS, Candidate, Row, token_signals
from stepkd.models import Policy
from stepkd.rollout import Rollout, Sampler, SamplingSpec
from stepkd.rollout.transformers_sampler import fixed_batches

PURPOSE = "label_solutions"


@dataclass(eq=False)
class SampledSolutions:
    """``n`` solutions of every problem; an item is a problem."""

    prompts: Sequence[Example]
    """Tokenised problems."""
    sampler: Sampler
    """Draws the solutions."""
    sampling: SamplingSpec
    """How they are drawn."""
    grader: Grader
    """Judges the final answers."""
    policy: Policy
    """The model that was sampled from; also computes signals that sampling does not give."""
    model: str
    """Its name in the rows."""
    signals: frozenset[str] = frozenset()
    """Per-token signals that the segmenter will read."""
    teacher: Policy | None = None
    """Second model, for signals under a teacher."""
    max_rows: int = 64
    """Completions decoded at once."""

    def groups(self) -> list[list[int]]:
        """See :class:`~stepkd.labels.solutions.SolutionSource`."""
        return fixed_batches(self.prompts, self.sampling.n, self.max_rows)

    def work(self, items: Sequence[int]) -> list[dict[str, Any]]:
        """Draw and grade the solutions of these problems."""
        prompts = [self.prompts[item] for item in items]
        rollouts = self.sampler.sample(
            [prompt.prompt_ids for prompt in prompts], self.sampling, purpose=PURPOSE, indices=list(items)
        )
        flat = [(prompt, rollout) for prompt, samples in zip(prompts, rollouts, strict=True) for rollout in samples]
        grades = self.grader.grade(
            [r.text for _, r in flat],
            [str(prompt.row["answer"]) for prompt, _ in flat],
            cut_off=[r.finish == "length" for _, r in flat],
        )
        signals: list[dict[str, list[float]]] = [{} for _ in flat]
        if self.signals - {"logprobs"}:
            signals = token_signals(
                self.signals - {"logprobs"},
                self.policy,
                self.teacher,
                [prompt.prompt_ids for prompt, _ in flat],
                [rollout.token_ids for _, rollout in flat],
            )
        samples = [
            _sample_record(rollout, grade.verdict == "correct", extra)
            for (_, rollout), grade, extra in zip(flat, grades, signals, strict=True)
        ]
        n = self.sampling.n
        return [
            {"id": prompt.id, "index": item, "prefilled": len(prompt.prompt_ids), "samples": samples[k * n : k * n + n]}
            for k, (item, prompt) in enumerate(zip(items, prompts, strict=True))
        ]

    def candidates(self, record: Row) -> list[Candidate]:
        """See :class:`~stepkd.labels.solutions.SolutionSource`."""
        prompt, n = self.prompts[record["index"]], self.sampling.n
        return [
            self._candidate(prompt, record["index"] * n + j, j, sample) for j, sample in enumerate(record["samples"])
        ]

    def _candidate(self, prompt: Example, index: int, j: int, sample: Row) -> Candidate:
        row = prompt.row
        sampling = asdict(self.sampling) | {"stop": list(self.sampling.stop)}
        seed = sampling.pop("seed")
        columns = {
            "problem_id": prompt.id,
            "prompt": row["prompt"],
            "completion": sample["text"],
            "token_ids": sample["token_ids"],
            "logprobs": sample["logprobs"],
            "finish": sample["finish"],
            "model": self.model,
            "sampling": sampling,
            "seed": seed,
        } | {name: row[name] for name in PROBLEM_COLUMNS if name in row}
        if not at_temperature_one(sampling):
            columns["raw_logprobs"] = sample["raw_logprobs"]
        signals = {name: sample[name] for name in self.signals - {"logprobs"}}
        if "logprobs" in self.signals:
            signals["logprobs"] = sample["raw_logprobs"]
        return Candidate(
            id=f"{prompt.id}/{j}",
            index=index,
            row=row,
            prompt_ids=prompt.prompt_ids,
            form="rollout",
            columns=columns,
            correct=sample["correct"],
            finish=sample["finish"],
            token_ids=tuple(sample["token_ids"]),
            text=sample["text"],
            signals=signals,
        )


def _sample_record(rollout: Rollout, correct: bool, signals: dict[str, list[float]]) -> dict[str, Any]:
    return {
        "token_ids": list(rollout.token_ids),
        "logprobs": list(rollout.logprobs),
        "raw_logprobs": list(rollout.raw_logprobs),
        "finish": rollout.finish,
        "text": rollout.text,
        "correct": correct,
    } | signals


def at_temperature_one(sampling: Row) -> bool:
    """Whether log-probabilities under these sampling settings are the model's own at temperature 1."""
    return sampling.get("temperature") == 1 and sampling.get("top_p", 1) == 1 and sampling.get("top_k", 0) == 0
