"""Verdicts that a model writes: how critiques are asked for and read, and tags that it puts behind its own steps.

A form is data (``critiques.yaml``): ProcessBench's official one, whose verdict is the index of the first incorrect
step, one with a verdict per step, and the tiny world's. The text before the verdict is the model's own reasoning.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from stepkd.data.encode import sampled_spans
from stepkd.data.io import fingerprint
from stepkd.errors import ConfigError, DataError, nearest
from stepkd.scorers.examples import problem_text
from stepkd.scorers.rules import RuleScorer
from stepkd.scorers.scorer import Row, Solutions
from stepkd.settings import build_settings
from stepkd.steps.format import check_steps, marker_token_id
from stepkd.steps.labels import first_incorrect
from stepkd.yaml_files import mapping, read_yaml


@dataclass(frozen=True, kw_only=True)
class CritiqueForm:
    """What a critic is asked, and where its verdict stands."""

    prompt: str
    """The request: ``{problem}`` and ``{steps}`` once each; ``{number}`` is that of the step in question, from 1."""
    line: str
    """One step in it: ``{text}`` once, ``{index}`` from 0, ``{number}`` from 1."""
    verdict: str
    """Regular expression whose group is the verdict; its last match counts."""
    words: tuple[str, str] | None = None
    """Verdicts for correct and for incorrect, of a critique per step; None: one critique per solution, whose verdict is
    the index of its first incorrect step, from 0, or -1."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "words", self.words and tuple(self.words))
        places = [(self.prompt, "{problem}"), (self.prompt, "{steps}"), (self.line, "{text}")]
        if lacking := [place for text, place in places if text.count(place) != 1]:
            raise ConfigError(f"a form of critiques must hold {lacking[0]} once")
        try:
            groups = re.compile(self.verdict).groups
        except re.error as error:
            raise ConfigError(f"verdict={self.verdict!r} is not a regular expression: {error}") from error
        if groups != 1 or (self.words is not None and len({word.casefold() for word in self.words}) != 2):
            raise ConfigError(
                f"verdict={self.verdict!r}, words={self.words}: one group, and two different words (any case) or none"
            )

    @cached_property
    def id(self) -> str:
        """A short stable hash of the form, which its critiques carry."""
        return fingerprint([asdict(self)])[:12]

    def questions(self, row: Row, steps: Sequence[str]) -> Iterator[tuple[int | None, str]]:
        """What is asked about a solution.

        Args:
            row: of its problem.
            steps: texts of its steps; line breaks at their ends do not count.

        Yields:
            The step in question, from 0, or None for the whole solution; and the request.

        Raises:
            DataError: no problem, no steps, or one without text.
        """
        name, problem = str(row.get("id", "?")), problem_text(row)
        if not problem:
            raise DataError("the row has no problem to show to the critic", path=name, column="prompt")
        check_steps(steps, name)
        lines = [_filled(self.line, index=k, number=k + 1, text=step.rstrip("\n")) for k, step in enumerate(steps)]
        for k in range(len(steps)) if self.words else (len(steps) - 1,):
            shown = "".join(lines[: k + 1]).strip()
            yield k if self.words else None, _filled(self.prompt, number=k + 1, problem=problem, steps=shown)

    def read(self, critique: str) -> str | None:
        """The verdict as it is written; None: there is none."""
        found = re.findall(self.verdict, critique)
        return str(found[-1]).strip() if found else None

    def meaning(self, verdict: str | None) -> bool | int | None:
        """What a verdict says: whether the step is correct, or the index of the first incorrect one; None: nothing."""
        if verdict is None or (self.words is None and not re.fullmatch(r"-?[0-9]{1,9}", verdict)):
            return None
        if self.words is None:
            return int(verdict)
        return {word.casefold(): word == self.words[0] for word in self.words}.get(verdict.casefold())

    def gold(self, marks: Sequence[bool | None], step: int | None) -> str | None:
        """The verdict that step labels ask for.

        Args:
            marks: what the labels say of each step (:func:`~stepkd.steps.labels.verdicts`).
            step: the step in question, None for the whole solution.

        Returns:
            The verdict; None where labels are missing, and behind a step that is not labelled correct: behind the first
            incorrect one, whether a step is correct is a matter of convention.
        """
        if step is None:
            first = first_incorrect(marks)
            return None if first is None else str(first)
        if self.words is None or marks[step] is None or not all(marks[:step]):
            return None
        return self.words[not marks[step]]


def _filled(form: str, **values: Any) -> str:
    """The text with its places filled, in one pass: braces of a problem's LaTeX are no places."""
    return re.sub(r"\{(\w+)\}", lambda found: str(values.get(found[1], found[0])), form)


FORMS: dict[str, CritiqueForm] = {
    name: CritiqueForm(**values)
    for name, values in read_yaml(Path(__file__).with_suffix(".yaml"), "forms of critiques").items()
}
"""The forms by name."""


def get_form(form: str) -> CritiqueForm:
    """A form of critiques.

    Args:
        form: a name of :data:`FORMS`, or a YAML file with the fields of :class:`CritiqueForm`.

    Raises:
        ConfigError: no form of that name, or a field that cannot be.
    """
    if form in FORMS:
        return FORMS[form]
    if Path(form).suffix not in (".yaml", ".yml"):
        raise ConfigError(
            f"no form of critiques {form!r}.{nearest(form, FORMS)} Give {', '.join(FORMS)}, or a YAML file"
        )
    return build_settings(CritiqueForm, mapping(read_yaml(Path(form), "form of critiques"), form), form)


def critique_costs(rows: Sequence[Row]) -> dict[str, int]:
    """What critiques cost, over scored rows: how many there are, without a verdict, and tokens; empty without any."""
    facts = [row["score_facts"] for row in rows if "critiques" in (row.get("score_facts") or {})]
    names = ("without_verdict", "generated_tokens", "prefill_tokens")
    written = {"critiques": sum(len(each["critiques"]) for each in facts)}
    return written | {name: sum(each[name] for each in facts) for name in names} if facts else {}


@dataclass(frozen=True)
class Tags(RuleScorer):
    """Scores a step by the tag that the model itself wrote in it (what it learns that from: ``stepkd convert --to
    Tagged``): the tag's probability where it says correct, else one minus it; NaN without one. A probability as far as
    training weighed both tags equally: weights w of correct and v of incorrect (``token_weights``) multiply its odds by
    w / v, so that then a threshold is to be fitted. After KG-TRACES (arXiv 2506.00783), whose tags say
    whether a step is effective."""

    path: str
    """Model that wrote the solutions; its tokenizer is read alone."""
    correct: str
    """Its token for a correct step."""
    incorrect: str
    """Its token for an incorrect step."""

    @cached_property
    def ids(self) -> tuple[int, int]:
        """Ids of the two tokens."""
        from stepkd.models.load import load_tokenizer
        from stepkd.models.spec import PolicyConfig

        tokenizer = load_tokenizer(PolicyConfig(path=self.path))
        good, bad = (marker_token_id(tokenizer, tag, what="tag") for tag in (self.correct, self.incorrect))
        return good, bad

    def score(self, problems: Sequence[Solutions]) -> list[list[list[float]]]:
        """Texts do not show tags; see :meth:`score_rows`.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "scorer=Tags: tags are read in the token ids of sampled completions, by stepkd score and stepkd "
            "evaluate-prm; a search and the labeller Scored give step texts, so take another scorer there"
        )

    def score_rows(self, rows: Sequence[Row]) -> list[list[float]]:
        """Scores of the steps of sampled completions, by the last tag in each; its probability is that at temperature 1
        where the row has that one; a row without log-probabilities has scores of 0 and 1.

        Raises:
            DataError: a row without token ids and step ends.
        """
        found = []
        for row in rows:
            if row.get("token_ids") is None or row.get("step_ends") is None:
                needs = "tags are read in sampled completions: the row needs 'token_ids' and 'step_ends'"
                raise DataError(needs, path=str(row.get("id", "?")), column="token_ids")
            known = (row.get(name) for name in ("raw_logprobs", "logprobs"))
            logps = next((each for each in known if each is not None), [0.0] * len(row["token_ids"]))
            written = list(zip(row["token_ids"], logps, strict=True))
            found.append([self._score(written[start:end]) for start, end in sampled_spans(row)])
        return found

    def provenance(self) -> dict[str, Any]:
        """See :class:`~stepkd.scorers.scorer.StepScorer`."""
        return {
            "scorer": "tags",
            "model": self.path,
            "tags": [self.correct, self.incorrect],
            "meaning": self.meaning,
        }

    def _score(self, step: Sequence[tuple[int, float]]) -> float:
        for token, logp in reversed(step):
            if token in self.ids:
                said = min(math.exp(logp), 1.0)
                return said if token == self.ids[0] else 1 - said
        return math.nan
