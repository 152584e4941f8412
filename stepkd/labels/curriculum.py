"""What a stage of training is given beside its own rows: those of an earlier stage, and how much to think where."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stepkd.data.rows import passed_on
from stepkd.errors import DataError, check_bounds
from stepkd.labels.convert import Converted, ConverterConfig
from stepkd.labels.labellers import PROBLEM_COLUMNS, Row, outcome_of
from stepkd.randomness import generator
from stepkd.scorers.scorer import by_problem
from stepkd.steps.labels import check_threshold


@dataclass(frozen=True, kw_only=True)
class Replay(ConverterConfig):
    """The rows, and behind them some of an earlier task, so that a fit on both does not forget it. With solutions that
    the model itself wrote before the new task it is sequence-level distillation from the earlier checkpoint, the
    control against forgetting of class-incremental training: the loss of either part is plain cross-entropy."""

    earlier: str
    """Rows of the earlier task, of the same kind: a file, a folder of a job, or a word such as gsm8k:split=train."""
    share: float = 0.2
    """Share of the earlier rows among all, in [0, 1); 0 leaves the rows as they are."""
    seed: int = 0
    """Keys which earlier rows are taken; fewer are the first of more."""

    def __post_init__(self) -> None:
        check_bounds("", self, share="[0, 1)")

    def convert(self, rows: Sequence[Row]) -> Converted:
        """See :class:`ConverterConfig`.

        Raises:
            DataError: the earlier rows cannot be read, or are fewer than the share asks for.
        """
        from stepkd.data.config import parse_spec
        from stepkd.data.load import load_rows

        earlier, wanted = load_rows(parse_spec(self.earlier)), round(len(rows) * self.share / (1 - self.share))
        if wanted > len(earlier):
            what = f"a share of {self.share} beside {len(rows)} rows is {wanted} earlier rows"
            raise DataError(f"{what}, and there are {len(earlier)}: lower share, or sample more", path=self.earlier)
        taken = generator(self.seed, "replay").permutation(len(earlier))[:wanted]
        done = [*map(dict, rows), *(earlier[i] for i in taken)]
        return Converted(done, {"rows": len(done), "earlier": wanted})


@dataclass(frozen=True, kw_only=True)
class ThinkMode(ConverterConfig):
    """Problems with the mode that a model should solve each in, by how often it is correct without thinking: ``think``
    below a threshold, else ``no_think`` (after KAT-V1, arXiv 2507.08297: a reconstruction, its rule was not found).

    The rows are graded samples of a model that does not think. ``mode`` can be learnt as a solution
    (``data.train.columns: {solution: mode}``), or rewarded.
    """

    threshold: float = 0.5
    """Pass rate from which on a problem needs no thinking, in (0, 1)."""

    def __post_init__(self) -> None:
        check_threshold(self.threshold)

    def convert(self, rows: Sequence[Row]) -> Converted:
        """See :class:`ConverterConfig`."""
        counts: Counter[str] = Counter()
        done: list[dict[str, Any]] = []
        for numbers in by_problem(rows):
            outcomes = [correct for i in numbers if (correct := outcome_of(rows[i])) is not None]
            if not outcomes:
                counts["ungraded"] += 1
                continue
            first, rate = rows[numbers[0]], sum(outcomes) / len(outcomes)
            mode = "think" if rate < self.threshold else "no_think"
            counts[mode] += 1
            own = {"id": str(first.get("problem_id") or first.get("id", "?")), "prompt": first["prompt"]}
            own |= passed_on(first, *PROBLEM_COLUMNS)
            done.append(own | {"mode": mode, "pass_rate": rate, "samples": len(outcomes)})
        return Converted(done, {"rows": len(done)} | dict(sorted(counts.items())))
