"""From samples, rollout rows and texts to solutions with step spans.

A :class:`Candidate` is a solution that has not been cut into steps yet: its ids (or its text), the per-token signals
that a segmenter may read, and the columns of its row that stay as they are. Where candidates come from is a
:class:`SolutionSource`: :mod:`stepkd.labels.sources` draws or reads them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal, Protocol

from stepkd.data.encode import with_end
from stepkd.data.rows import ROLLOUT, STEPWISE, validate
from stepkd.data.templates import PromptTemplate
from stepkd.labels.labellers import Solution, StepLabels
from stepkd.models.policy import Policy
from stepkd.sampling.annotate import annotate
from stepkd.steps.segment import Segmenter, segment, spans_from_ends, step_ends
from stepkd.steps.text import TokenizedText, text_from_ids, tokenize_text

Row = Mapping[str, Any]

STALE = (
    *("steps", "step_labels", "step_values", "labels", "completions", "step_ends"),
    *("labelling", "label_facts", "segmenter"),
)
"""Columns that labelling writes; what a row had there before is dropped."""

PROBLEM_COLUMNS = ("answer", "task", "meta")
"""Columns of a problem that labelled rows keep, so that they can be checked and labelled again."""


@dataclass(frozen=True)
class Candidate:
    """A solution before it is cut into steps."""

    id: str
    """``<problem id>/<sample>``, or the id of the row it came from."""
    index: int
    """Number of the solution in the whole job."""
    row: Row
    """Problem row."""
    prompt_ids: tuple[int, ...]
    """Prompt as the sampler reads it."""
    form: Literal["rollout", "stepwise"]
    """Contract of the labelled row."""
    columns: Row
    """Columns of the labelled row that do not speak of steps."""
    correct: bool | None
    """Whether the final answer is right; None: not graded."""
    finish: Literal["stop", "length"] = "stop"
    """``length``: cut off."""
    token_ids: tuple[int, ...] | None = None
    """Sampled ids; None: ``text`` is to be tokenised."""
    text: str = ""
    """The solution's text."""
    ended_by: PromptTemplate | None = None
    """The template whose end token follows the text; None: none does."""
    ends: tuple[int, ...] | None = None
    """Step ends in tokens, where the row has them."""
    steps: tuple[str, ...] | None = None
    """Step texts, separators included, where the row has them; joined they are ``text``."""
    own_steps: tuple[str, ...] | None = None
    """The same as the row wrote them."""
    signals: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Per-token signals by the names of :class:`~stepkd.steps.TokenizedText`."""

    def completion(self, tokenizer: Any) -> TokenizedText:
        """The one tokenisation of the solution."""
        if self.token_ids is not None:
            return text_from_ids(tokenizer, self.token_ids)
        text = tokenize_text(tokenizer, self.text)
        return text if self.ended_by is None else with_end(text, self.ended_by, tokenizer)


class SolutionSource(Protocol):
    """Where a job's solutions come from; its items are worked on in groups, and their records are stored."""

    def groups(self) -> list[list[int]]:
        """Item numbers of every group; depends on nothing but the data and the settings."""
        ...

    def work(self, items: Sequence[int]) -> list[dict[str, Any]]:
        """Records of these items (``id``, ``index`` and JSON values): samples, grades, signals."""
        ...

    def candidates(self, record: Row) -> list[Candidate]:
        """The solutions of one record, in order."""
        ...


def drop_duplicates(candidates: Sequence[Candidate]) -> tuple[list[Candidate], int]:
    """Keep the first of several solutions of one problem with the same text.

    Returns:
        The solutions kept, in order, and how many were dropped.
    """
    seen: set[tuple[str, str, str]] = set()
    kept = []
    for candidate in candidates:
        key = (str(candidate.row["id"]), candidate.text, candidate.finish)
        if key not in seen:
            seen.add(key)
            kept.append(candidate)
    return kept, len(candidates) - len(kept)


def cut(candidate: Candidate, tokenizer: Any, segmenter: Segmenter | None, default: Segmenter) -> Solution | str:
    """Cut a candidate into steps.

    Args:
        candidate: the solution.
        tokenizer: the policy's tokenizer.
        segmenter: how to cut; None keeps the steps the row came with.
        default: what cuts a row without steps then.

    Returns:
        The solution, or why there is none: ``no_steps`` (it is empty), ``steps_share_a_token``.
    """
    completion = candidate.completion(tokenizer)
    if not completion.text.strip():
        return "no_steps"
    texts: tuple[str, ...] | None = None
    if segmenter is None and candidate.steps is not None:
        texts = candidate.steps
        ends = [completion.token_end(end) for end in accumulate(map(len, texts))]
        ends[-1] = len(completion)
        if any(end <= before for before, end in zip([0, *ends], ends, strict=False)):
            return "steps_share_a_token"
        spans = spans_from_ends(ends, len(completion))
    elif segmenter is None and candidate.ends is not None:
        spans = spans_from_ends(candidate.ends, len(completion))
    else:
        signals: dict[str, Any] = {name: tuple(values) for name, values in candidate.signals.items()}
        completion = dataclasses.replace(completion, **signals)
        spans = segment(segmenter or default, completion)
    return Solution(
        id=candidate.id,
        index=candidate.index,
        row=candidate.row,
        prompt_ids=candidate.prompt_ids,
        completion_ids=completion.token_ids,
        spans=tuple(spans),
        steps=texts or tuple(completion.span_text(*span) for span in spans),
        correct=candidate.correct,
        finish=candidate.finish,
    )


def labelled_row(candidate: Candidate, solution: Solution, labels: StepLabels, provenance: Row) -> dict[str, Any]:
    """The output row: the rollout or stepwise contract, with ``labelling`` (provenance) and ``label_facts``.

    Raises:
        DataError: the row breaks its contract (the labeller mixed kinds of labels, or gave another number of them).
    """
    row = {"id": solution.id} | {name: value for name, value in candidate.columns.items() if name not in STALE}
    values = None if labels.values is None else list(labels.values)
    marks = list(labels.labels)
    if candidate.form == "rollout":
        row |= {"step_ends": step_ends(solution.spans), "correct": solution.correct}
        row |= {"steps": list(solution.steps), "step_labels": marks}
    else:
        kept = candidate.own_steps is not None and solution.steps == candidate.steps
        row["completions"] = list(candidate.own_steps if kept and candidate.own_steps else solution.steps)
        row["labels"] = marks
        row |= {} if solution.correct is None else {"outcome": solution.correct}
    if values is not None:
        row["step_values"] = values
    row["labelling"] = dict(provenance)
    if labels.facts:
        row["label_facts"] = dict(labels.facts)
    return validate(row, ROLLOUT if candidate.form == "rollout" else STEPWISE, path=solution.id, extra="keep")


def token_signals(
    names: frozenset[str],
    policy: Policy,
    teacher: Policy | None,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
) -> list[dict[str, list[float]]]:
    """The named signals of completions, computed by a forward pass; see :func:`stepkd.sampling.annotate.annotate`."""
    found = annotate(policy, prompts, completions, teacher=teacher)
    return [{name: list(getattr(signals, name)) for name in sorted(names)} for signals in found]
