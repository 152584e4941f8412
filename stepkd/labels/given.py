"""Solutions that are there already: rollout rows, step-labelled rows, worked solutions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stepkd.data.encode import Encoder
from stepkd.data.rows import PROBLEM, check_unique_ids, detect_contract
from stepkd.data.spec import DataSpec, load_rows
from stepkd.data.templates import PromptTemplate
from stepkd.errors import DataError
from stepkd.grading import Grader
from stepkd.labels.sampled import at_temperature_one
from stepkd.labels.solutions import PROBLEM_COLUMNS, Candidate, Row, token_signals
from stepkd.models import Policy
from stepkd.steps import Segmenter, get_segmenter
from stepkd.steps.format import written_steps

GROUP = 32  # rows whose signals are computed and stored together


def given_rows(data: DataSpec) -> list[dict[str, Any]]:
    """Rows with solutions.

    Raises:
        DataError: rows without a solution, or two of the same id.
    """
    rows = load_rows(data)
    place = data.path or data.source
    contract = detect_contract(rows[0])
    if contract.name.endswith("preference"):
        raise DataError(f"{contract.name} rows hold no single solution to label", path=place)
    if contract is PROBLEM:
        for row in rows:
            if row.get("solution") is None:
                raise DataError(
                    f"row {row['id']!r} is a problem without a solution: give it as --problems to sample solutions of "
                    "it",
                    path=place,
                    column="solution",
                )
    check_unique_ids(rows, path=place)
    return rows


class GivenSolutions:
    """One solution per row; an item is a row.

    Args:
        rows: from :func:`given_rows`.
        template: how a problem becomes a prompt.
        grader: judges final answers of rows that do not say whether they are right.
        policy: its tokenizer reads the texts, and it computes signals the rows lack.
        keep_steps: keep the steps that rows come with.
        signals: per-token signals that the segmenter will read.
        teacher: second model, for signals under a teacher.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        template: PromptTemplate,
        grader: Grader,
        *,
        policy: Policy,
        keep_steps: bool,
        signals: frozenset[str] = frozenset(),
        teacher: Policy | None = None,
    ) -> None:
        self.rows = rows
        self.grader = grader
        self.policy = policy
        self.keep_steps = keep_steps
        self.signals = signals
        self.teacher = teacher
        newline: Segmenter = get_segmenter("newline")
        self._encoder = Encoder(policy.tokenizer, template, newline, max_length=10**9)

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


def _stated_outcome(row: Mapping[str, Any]) -> bool | None:
    column = "correct" if row.get("correct") is not None else "outcome"
    value = row.get(column)
    if value is not None and not isinstance(value, bool):
        raise DataError(f"must be true or false, found {value!r}", path=str(row["id"]), column=column)
    return value
