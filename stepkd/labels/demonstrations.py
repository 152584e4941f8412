"""From labelled solutions to demonstrations: fine-tuning on a model's own right solutions (rejection sampling).

``demonstrations`` keeps the solutions whose answer is right (RFT, arXiv 2308.01825; STaR, arXiv 2203.14465 without
its hints); ``clean_demonstrations`` drops those among them with a step that is labelled wrong. The rows hold texts
and no sampled ids, so that a model with another tokenizer may learn from them too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stepkd.data.rows import DEMONSTRATION, validate
from stepkd.labels.convert import Converted, Converter, ConvertOptions, register
from stepkd.labels.matching import label_column, row_labels
from stepkd.runs.files import write_jsonl
from stepkd.steps.format import written_steps
from stepkd.steps.labels import verdicts

Row = Mapping[str, Any]
_KEPT = ("answer", "problem_id", "task", "meta", "labelling")


def _to_demonstrations(rows: Sequence[Row], options: ConvertOptions) -> Converted:
    return _convert(rows, clean=False)


def _to_clean_demonstrations(rows: Sequence[Row], options: ConvertOptions) -> Converted:
    return _convert(rows, clean=True)


def _convert(rows: Sequence[Row], *, clean: bool) -> Converted:
    counts: Counter[str] = Counter()
    kept = []
    for row in rows:
        if (reason := _reason(row, clean)) is not None:
            counts[reason] += 1
        else:
            kept.append(_demonstration(row))
    return Converted(kept, {"rows": len(kept)} | dict(sorted(counts.items())))


def _reason(row: Row, clean: bool) -> str | None:
    """Why a solution is no demonstration; None if it is one."""
    correct = row.get("correct", row.get("outcome"))
    if correct is None:
        return "ungraded"
    if not correct:
        return "wrong_answer"
    if row.get("finish") == "length":  # the answer is there, and no end: it would teach to go on for ever
        return "cut_off"
    if clean and row.get(label_column(row)) is not None and False in verdicts(row_labels(row)):
        return "wrong_step"
    return None


def _demonstration(row: Row) -> dict[str, Any]:
    text = row["completion"] if "completion" in row else "".join(written_steps(row["completions"]))
    demonstration = {"prompt": row["prompt"], "solution": text}
    if row.get("id") is not None:
        demonstration["id"] = row["id"]
    demonstration |= {name: row[name] for name in _KEPT if row.get(name) is not None}
    return validate(demonstration, DEMONSTRATION, path=str(row.get("id", "?")), extra="keep")


def _write(rows: Iterable[Row], path: str | Path) -> int:
    return write_jsonl(path, rows)


register(Converter("demonstrations", "solutions whose answer is right, to fine-tune on", _to_demonstrations, _write))
register(
    Converter("clean_demonstrations", "the same without those that have a wrong step", _to_clean_demonstrations, _write)
)
