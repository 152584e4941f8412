"""Where a labelling job's solutions come from: drawn from the policy, or there already in rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from stepkd.data.encode import Encoder, Example
from stepkd.data.templates import PromptTemplate
from stepkd.errors import DataError
from stepkd.grading.pool import Grader
from stepkd.labels.solutions import PROBLEM_COLUMNS, Candidate, Row, token_signals
from stepkd.labels.workbench import Workbench
from stepkd.models.policy import Policy
from stepkd.sampling.sampler import Sampler, SamplingConfig
from stepkd.sampling.transformers_sampler import encode_prompts, fixed_batches
from stepkd.steps.format import written_steps
from stepkd.steps.segment import get_segmenter

PURPOSE = "label_solutions"
_NUMBERS = ("token_ids", "logprobs", "raw_logprobs")  # of every token, kept of a completion


@dataclass(eq=False)
class SampledSolutions:
    """``n`` solutions of every problem; an item is a problem."""

    bench: Workbench
    """Problems, policy, template and grader."""
    sampler: Sampler
    """Draws the solutions."""
    sampling: SamplingConfig
    """How they are drawn."""
    signals: frozenset[str] = frozenset()
    """Per-token signals that the segmenter will read."""
    teacher: Policy | None = None
    """Second model, for signals under a teacher."""

    def __post_init__(self) -> None:
        self.prompts = encode_prompts(self.bench.policy, self.bench.template, self.bench.rows)

    def groups(self) -> list[list[int]]:
        """See :class:`~stepkd.labels.solutions.SolutionSource`."""
        return fixed_batches(self.prompts, self.sampling.n, self.bench.spec.max_rows)

    def work(self, items: Sequence[int]) -> list[dict[str, Any]]:
        """Draw and grade the solutions of these problems."""
        prompts = [self.prompts[item] for item in items]
        rollouts = self.sampler.sample(
            [prompt.prompt_ids for prompt in prompts], self.sampling, purpose=PURPOSE, indices=list(items)
        )
        flat = [(prompt, rollout) for prompt, samples in zip(prompts, rollouts, strict=True) for rollout in samples]
        grades = self.bench.grader.grade(
            [r.text for _, r in flat],
            [str(prompt.row["answer"]) for prompt, _ in flat],
            cut_off=[r.finish == "length" for _, r in flat],
        )
        signals: list[dict[str, list[float]]] = [{} for _ in flat]
        if self.signals - {"logprobs"}:
            signals = token_signals(
                self.signals - {"logprobs"},
                self.bench.policy,
                self.teacher,
                [prompt.prompt_ids for prompt, _ in flat],
                [rollout.token_ids.tolist() for _, rollout in flat],
            )
        samples = [
            {name: getattr(rollout, name).tolist() for name in _NUMBERS}
            | {"finish": rollout.finish, "text": rollout.text, "correct": grade.verdict == "correct"}
            | extra
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
            "model": self.bench.model,
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


def at_temperature_one(sampling: Row) -> bool:
    """Whether log-probabilities under these sampling settings are the model's own at temperature 1."""
    return sampling.get("temperature") == 1 and sampling.get("top_p", 1) == 1 and sampling.get("top_k", 0) == 0


GROUP = 32  # rows whose signals are computed and stored together


@dataclass(eq=False)
class GivenSolutions:
    """Solutions that are there already (rollout rows, step-labelled rows, worked solutions): one per row, an item."""

    rows: Sequence[Row]
    """Rows with a solution each."""
    template: PromptTemplate
    """How a problem becomes a prompt."""
    grader: Grader
    """Judges final answers of rows that do not say whether they are correct."""
    policy: Policy = field(kw_only=True)
    """Its tokenizer reads the texts, and it computes signals the rows lack."""
    keep_steps: bool = field(kw_only=True)
    """Keep the steps that rows come with."""
    signals: frozenset[str] = frozenset()
    """Per-token signals that the segmenter will read."""
    teacher: Policy | None = None
    """Second model, for signals under a teacher."""

    def __post_init__(self) -> None:
        self._encoder = Encoder(self.policy.tokenizer, self.template, get_segmenter("newline"), max_length=10**9)

    def groups(self) -> list[list[int]]:
        """See :class:`~stepkd.labels.solutions.SolutionSource`."""
        numbers = list(range(len(self.rows)))
        return [numbers[start : start + GROUP] for start in range(0, len(numbers), GROUP)]

    def work(self, items: Sequence[int]) -> list[dict[str, Any]]:
        """Grade these rows, and compute the signals they lack; a row longer than the model's context has none."""
        records: list[dict[str, Any]] = [
            {"id": str(self.rows[item]["id"]), "index": item, "correct": _stated_outcome(self.rows[item])}
            for item in items
        ]
        candidates = [self._candidate(record) for record in records]
        ungraded = [
            k
            for k, item in enumerate(items)
            if records[k]["correct"] is None and self.rows[item].get("answer") is not None
        ]
        grades = self.grader.grade(
            [candidates[k].text for k in ungraded], [str(self.rows[items[k]]["answer"]) for k in ungraded]
        )
        for k, grade in zip(ungraded, grades, strict=True):
            records[k]["correct"] = grade.verdict == "correct"
            # Published step-labelled solutions often stop at the first error, without an answer.
            records[k]["unfinished"] = grade.verdict == "unparsed" and candidates[k].form == "stepwise"
        completions = [candidate.completion(self.policy.tokenizer).token_ids for candidate in candidates]
        context = self.policy.max_length
        for record, candidate, ids in zip(records, candidates, completions, strict=True):
            record["too_long"] = context is not None and len(candidate.prompt_ids) + len(ids) > context
        self._add_signals(records, candidates, completions)
        return records

    def _add_signals(
        self, records: Sequence[dict[str, Any]], candidates: Sequence[Candidate], completions: Sequence[Sequence[int]]
    ) -> None:
        for names in (frozenset({"logprobs"}), self.signals - {"logprobs"}):
            lacking = [
                k
                for k, candidate in enumerate(candidates)
                if names & self.signals and not names <= set(candidate.signals) and not records[k]["too_long"]
            ]
            if not lacking:
                continue
            found = token_signals(
                names,
                self.policy,
                self.teacher if "teacher_logprobs" in names else None,
                [candidates[k].prompt_ids for k in lacking],
                [completions[k] for k in lacking],
            )
            for k, signals in zip(lacking, found, strict=True):
                records[k] |= signals

    def candidates(self, record: Row) -> list[Candidate]:
        """See :class:`~stepkd.labels.solutions.SolutionSource`; none for a row longer than the model's context."""
        return [] if record["too_long"] else [self._candidate(record)]

    def _candidate(self, record: Row) -> Candidate:
        row = self.rows[record["index"]]
        problem = {"id": str(row.get("problem_id") or row["id"]), "prompt": row["prompt"]}
        problem |= {name: row[name] for name in PROBLEM_COLUMNS if row.get(name) is not None}
        common: dict[str, Any] = {
            "id": str(row["id"]),
            "index": record["index"],
            "row": problem,
            "prompt_ids": self._encoder.prompt_ids(problem),
            "correct": record["correct"],
        }
        stored = {name: record[name] for name in self.signals if name in record}
        if "token_ids" in row:
            return Candidate(
                form="rollout",
                columns=row,
                finish=row["finish"],
                token_ids=tuple(row["token_ids"]),
                text=row["completion"],
                ends=tuple(row["step_ends"]) if self.keep_steps else None,
                signals=self._row_signals(row) | stored,
                **common,
            )
        columns = {name: value for name, value in row.items() if name != "solution"}
        if "completions" not in row:
            return Candidate(
                form="stepwise",
                columns=columns,
                text=row["solution"],
                ended_by=self._encoder.template,
                signals=stored,
                **common,
            )
        steps = written_steps(row["completions"])
        return Candidate(
            form="stepwise",
            columns=columns,
            text="".join(steps),
            finish="length" if record.get("unfinished") else "stop",
            steps=steps if self.keep_steps else None,
            own_steps=tuple(row["completions"]) if self.keep_steps else None,
            signals=stored,
            **common,
        )

    def _row_signals(self, row: Row) -> dict[str, Sequence[float]]:
        """Signals a rollout row has: log-probabilities at temperature 1."""
        if "logprobs" not in self.signals:
            return {}
        if row.get("raw_logprobs") is not None:
            return {"logprobs": row["raw_logprobs"]}
        return {"logprobs": row["logprobs"]} if at_temperature_one(row["sampling"]) else {}


def _stated_outcome(row: Row) -> bool | None:
    column = "correct" if row.get("correct") is not None else "outcome"
    value = row.get(column)
    if value is not None and not isinstance(value, bool):
        raise DataError(f"must be true or false, found {value!r}", path=str(row["id"]), column=column)
    return value
