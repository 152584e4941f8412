"""The solutions of a labelling job: drawn from the policy or there already in rows, then cut into steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from stepkd.data.completion import Completion, Finish
from stepkd.data.encode import Encoder, with_end
from stepkd.data.rows import COMPLETION, STEPWISE, passed_on, validate
from stepkd.labels.labellers import PROBLEM_COLUMNS, Row, Solution, StepLabels, outcome_of
from stepkd.labels.workbench import Workbench
from stepkd.models.policy import Policy
from stepkd.sampling.annotate import annotate
from stepkd.sampling.engine import Engine, SamplingConfig
from stepkd.sampling.transformers_engine import encode_prompts, fixed_batches
from stepkd.steps.format import written_steps
from stepkd.steps.segment import Segmenter, get_segmenter, segment, spans_from_ends, step_ends
from stepkd.steps.text import TokenizedText, text_from_ids, tokenize_text

PURPOSE = "label_solutions"
GROUP = 32  # rows whose signals are computed and stored together
STALE = (
    *("steps", "step_labels", "step_values", "labels", "completions", "step_ends"),
    *("labelling", "label_facts", "segmenter"),
)
"""Columns that labelling writes; what a row had there before is dropped."""


@dataclass(eq=False)
class SampledSolutions:
    """``n`` solutions of every problem, an item; items are worked on in groups, whose records are stored."""

    bench: Workbench
    """Problems, policy, template and grader."""
    engine: Engine
    """Draws the solutions."""
    sampling: SamplingConfig
    """How they are drawn."""
    signals: Sequence[str] = ()
    """Per-token signals that the segmenter will read."""
    teacher: Policy | None = None
    """Second model, for signals under a teacher."""

    def __post_init__(self) -> None:
        self.prompts = encode_prompts(self.bench.policy, self.bench.template, self.bench.rows)

    def groups(self) -> list[list[int]]:
        """Item numbers of every group; depends on nothing but the data and the settings."""
        return fixed_batches(self.prompts, self.sampling.n, self.bench.config.engine.at_once)

    def work(self, items: Sequence[int]) -> list[dict[str, Any]]:
        """Draw and grade the solutions of these problems: records with ``id``, ``index`` and other JSON values."""
        prompts = [self.prompts[item] for item in items]
        drawn = self.engine.generate(
            [prompt.prompt_ids for prompt in prompts], self.sampling, purpose=PURPOSE, indices=list(items)
        )
        flat = [each for group in drawn for each in group]
        grades = self.bench.grader.grade(
            [each.text for each in flat],
            [str(prompt.row["answer"]) for prompt, group in zip(prompts, drawn, strict=True) for _ in group],
            cut_off=[each.finish == "length" for each in flat],
            rows=[prompt.row for prompt, group in zip(prompts, drawn, strict=True) for _ in group],
        )
        signals = _signals([name for name in self.signals if name != "logprobs"], self.bench, self.teacher, flat)
        samples = [
            {
                name: None if (values := getattr(each, name)) is None else values.tolist()  # unknown to an engine
                for name in ("token_ids", "logprobs", "raw_logprobs")
            }
            | {"finish": each.finish, "text": each.text, "correct": grade.verdict == "correct"}
            | extra
            for each, grade, extra in zip(flat, grades, signals, strict=True)
        ]
        n = self.sampling.n
        return [
            {"id": prompt.id, "index": item, "prefilled": len(prompt.prompt_ids), "samples": samples[k * n : k * n + n]}
            for k, (item, prompt) in enumerate(zip(items, prompts, strict=True))
        ]

    def solutions(self, record: Row) -> list[Solution]:
        """The solutions of one record, in order, not cut into steps yet."""
        prompt, n = self.prompts[record["index"]], self.sampling.n
        sampling = asdict(self.sampling) | {"stop": list(self.sampling.stop)}
        seed = sampling.pop("seed")
        pass_rate = sum(sample["correct"] for sample in record["samples"]) / n
        found = []
        for j, sample in enumerate(record["samples"]):
            columns = {
                "problem_id": prompt.id,
                "prompt": prompt.row["prompt"],
                "completion": sample["text"],
                **{name: sample[name] for name in ("token_ids", "logprobs", "finish")},
                **{"model": self.bench.model, "sampling": sampling, "seed": seed, "pass_rate": pass_rate},
            } | {name: prompt.row[name] for name in PROBLEM_COLUMNS if name in prompt.row}
            if not at_temperature_one(sampling):
                columns["raw_logprobs"] = sample["raw_logprobs"]
            found.append(
                Solution(
                    prompt.prompt_ids,
                    np.asarray(sample["token_ids"]),
                    finish=sample["finish"],
                    text=sample["text"],
                    id=f"{prompt.id}/{j}",
                    row=prompt.row,
                    index=record["index"] * n + j,
                    correct=sample["correct"],
                    columns=columns,
                    signals={name: sample["raw_logprobs" if name == "logprobs" else name] for name in self.signals},
                )
            )
        return found


def at_temperature_one(sampling: Row) -> bool:
    """Whether log-probabilities under these sampling settings are the model's own at temperature 1."""
    return sampling.get("temperature") == 1 and sampling.get("top_p", 1) == 1 and sampling.get("top_k", 0) == 0


@dataclass(eq=False)
class ExistingSolutions:
    """Solutions that are there already (completion rows, step-labelled rows, worked solutions): one per row, an
    item."""

    bench: Workbench
    """Rows with a solution each, the policy whose tokenizer reads them, template and grader."""
    keep_steps: bool = field(kw_only=True)
    """Keep the steps that rows come with."""
    signals: Sequence[str] = ()
    """Per-token signals that the segmenter will read; the policy computes those that rows lack."""
    teacher: Policy | None = None
    """Second model, for signals under a teacher."""

    def __post_init__(self) -> None:
        tokenizer = self.bench.policy.tokenizer
        self._encoder = Encoder(tokenizer, self.bench.template, get_segmenter("newline"), max_length=10**9)

    def groups(self) -> list[list[int]]:
        """See :class:`SampledSolutions`."""
        numbers = list(range(len(self.bench.rows)))
        return [numbers[start : start + GROUP] for start in range(0, len(numbers), GROUP)]

    def work(self, items: Sequence[int]) -> list[dict[str, Any]]:
        """Grade these rows, and compute the signals they lack; a row longer than the model's context has none."""
        rows = [self.bench.rows[item] for item in items]
        records: list[dict[str, Any]] = [
            {"id": str(row["id"]), "index": item, "correct": outcome_of(row)}
            for item, row in zip(items, rows, strict=True)
        ]
        found = [self._solution(record) for record in records]
        ungraded = [k for k, r in enumerate(records) if r["correct"] is None and rows[k].get("answer") is not None]
        problems = [rows[k] for k in ungraded]
        grades = self.bench.grader.grade(
            [found[k].text for k in ungraded], [str(row["answer"]) for row in problems], rows=problems
        )
        for k, grade in zip(ungraded, grades, strict=True):
            records[k]["correct"] = grade.verdict == "correct"
            # Published step-labelled solutions often stop at the first error, without an answer.
            records[k]["unfinished"] = grade.verdict == "unparsed" and "token_ids" not in rows[k]
        context = self.bench.policy.max_length
        for record, each in zip(records, found, strict=True):
            record["too_long"] = context is not None and each.length > context
        lacking = [[name for name in self.signals if name not in each.signals] for each in found]
        asked = [k for k, names in enumerate(lacking) if names and not records[k]["too_long"]]
        signals = _signals(self.signals, self.bench, self.teacher, [found[k] for k in asked])
        for k, values in zip(asked, signals, strict=True):
            records[k] |= {name: values[name] for name in lacking[k]}
        return records

    def solutions(self, record: Row) -> list[Solution]:
        """See :class:`SampledSolutions`; none for a row longer than the model's context."""
        return [] if record["too_long"] else [self._solution(record)]

    def _solution(self, record: Row) -> Solution:
        row, tokenizer = self.bench.rows[record["index"]], self.bench.policy.tokenizer
        problem = {"id": str(row.get("problem_id") or row["id"]), "prompt": row["prompt"]}
        problem |= passed_on(row, *PROBLEM_COLUMNS)
        signals = {name: record[name] for name in self.signals if name in record}
        finish: Finish = "stop"
        if "token_ids" in row:
            finish, text, ids = row["finish"], row["completion"], row["token_ids"]
            own = row.get("raw_logprobs") or (row["logprobs"] if at_temperature_one(row["sampling"]) else None)
            signals = ({"logprobs": own} if "logprobs" in self.signals and own is not None else {}) | signals
        elif "completions" in row:
            text, finish = "".join(written_steps(row["completions"])), "length" if record.get("unfinished") else "stop"
            ids = tokenize_text(tokenizer, text).token_ids
        else:
            text = row["solution"]
            ids = with_end(tokenize_text(tokenizer, text), self._encoder.template, tokenizer).token_ids
        steps = () if self.keep_steps else ("completions", "step_ends")
        return Solution(
            np.asarray(self._encoder.prompt_ids(problem)),
            np.asarray(ids),
            finish=finish,
            text=text,
            id=str(row["id"]),
            row=problem,
            index=record["index"],
            correct=record["correct"],
            columns={name: value for name, value in row.items() if name not in ("solution", *steps)},
            signals=signals,
        )


def _signals(
    names: Sequence[str], bench: Workbench, teacher: Policy | None, completions: Sequence[Completion]
) -> list[dict[str, list[float]]]:
    """The named signals of completions, computed by a forward pass; see :func:`stepkd.sampling.annotate.annotate`."""
    if not names or not completions:
        return [{} for _ in completions]
    found = annotate(
        bench.policy,
        [each.prompt_ids.tolist() for each in completions],
        [each.token_ids.tolist() for each in completions],
        teacher=teacher if "teacher_logprobs" in names else None,
    )
    return [{name: list(getattr(signals, name)) for name in sorted(names)} for signals in found]


def cut(solution: Solution, tokenizer: Any, segmenter: Segmenter) -> Solution | str:
    """Cut a solution into the steps that its row came with; by a segmenter where those were not kept.

    Args:
        solution: the solution.
        tokenizer: the policy's tokenizer.
        segmenter: what cuts a solution without steps.

    Returns:
        The solution with its steps, or why there is none: ``no_steps`` (it is empty), ``steps_share_a_token``.
    """
    ids = tuple(solution.token_ids.tolist())
    if "token_ids" in solution.columns:
        text = text_from_ids(tokenizer, ids)
    else:
        text = tokenize_text(tokenizer, solution.text)
        ends = [len(text.text)] * (len(ids) - len(text))  # of the end token, which is no text
        text = TokenizedText(ids, text.text, (*text.char_ends, *ends))
    if not text.text.strip():
        return "no_steps"
    if "completions" in solution.columns:
        written = written_steps(solution.columns["completions"])
        ends = [*(text.token_end(end) for end in accumulate(map(len, written[:-1]))), len(text)]
        if any(end <= before for before, end in pairwise([0, *ends])):
            return "steps_share_a_token"
        return replace(solution, step_ends=np.asarray(ends), steps=written)
    if "step_ends" in solution.columns:
        spans = spans_from_ends(solution.columns["step_ends"], len(text))
    else:
        signals: dict[str, Any] = {name: tuple(values) for name, values in solution.signals.items()}
        spans = segment(segmenter, replace(text, **signals))
    return replace(
        solution, step_ends=np.asarray(step_ends(spans)), steps=tuple(text.span_text(*span) for span in spans)
    )


def labelled_row(solution: Solution, labels: StepLabels, provenance: Row) -> dict[str, Any]:
    """The output row: the completion or stepwise contract, with ``labelling`` (provenance) and ``label_facts``.

    Raises:
        DataError: the row breaks its contract (the labeller mixed kinds of labels, or gave another number of them).
    """
    columns, marks = solution.columns, list(labels.labels)
    row = {"id": solution.id} | {name: value for name, value in columns.items() if name not in STALE}
    sampled = "token_ids" in columns
    if sampled:
        row |= {"step_ends": solution.step_ends.tolist(), "correct": solution.correct}
        row |= {"steps": list(solution.steps), "step_labels": marks}
    else:
        row |= {"completions": list(columns.get("completions", solution.steps)), "labels": marks}
        row |= {} if solution.correct is None else {"outcome": solution.correct}
    if labels.values is not None:
        row["step_values"] = list(labels.values)
    row["labelling"] = dict(provenance)
    if labels.facts:
        row["label_facts"] = dict(labels.facts)
    return validate(row, COMPLETION if sampled else STEPWISE, path=solution.id, extra="keep")
