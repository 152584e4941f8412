"""Trained process reward models as scorers: many solutions of one problem, its prompt read once.

Axes: B rows, T padded length, S scored steps, H hidden size.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from stepkd.data.step_encode import Layout, StepEncoder
from stepkd.data.templates import PromptTemplate, get_template, template_name
from stepkd.errors import ConfigError, ModelError, UnreadableSolution
from stepkd.models.checkpoint import weights_fingerprint
from stepkd.models.head import evaluation_mode
from stepkd.models.policy import Policy
from stepkd.rollout.decode import Decoder
from stepkd.scorers.calibration import TemperatureScaling
from stepkd.scorers.prefix import continue_rows, packed, padded_right
from stepkd.scorers.rows import row_steps
from stepkd.scorers.scorer import Meaning, Solutions

_NO_LIMIT = 10**9


@dataclass(frozen=True)
class _Item:
    """One solution, ready to be read."""

    name: str
    """Its problem's id, for messages."""
    prompt_ids: tuple[int, ...]
    """Prompt ids."""
    ids: tuple[int, ...]
    """Solution ids up to the last position that is needed."""
    places: tuple[tuple[int, int], ...]
    """(step, index in ``ids`` at which it is scored)."""
    steps: int
    """Number of steps, those that were cut off included."""


def _unread(steps: int) -> Layout:
    return Layout((), (), (_NO_LIMIT,) * steps)


class PRMScorer:
    """Scores steps with a model that has a step head.

    Args:
        policy: the model, with :meth:`~stepkd.models.policy.Policy.attach_step_head` done; in evaluation mode while it
            scores.
        template: prompt template; must be the one that the model was trained with.
        max_length: longest prompt + solution in tokens, at least 2; None: the model's context. Steps beyond it are not
            scored.
        max_rows: most solutions in one forward pass, at least 1; changes memory and speed, and results by rounding.
        shared_prefix: read the prompt of several solutions once; False reads it again for each (the same scores).
        temperature: scaling of the scores, fitted on held-out labels.
        name: what to call the model in the provenance; None: its path.
        encoder: how solutions become token ids.

    Attributes:
        tokens: tokens read so far, without padding: ``prompt`` and ``solution``.

    Raises:
        ModelError: the model has no step head.
        ConfigError: a number out of range.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        template: str | PromptTemplate,
        max_length: int | None = None,
        max_rows: int = 32,
        shared_prefix: bool = True,
        temperature: TemperatureScaling | None = None,
        name: str | None = None,
        encoder: type[StepEncoder] = StepEncoder,
    ) -> None:
        head = policy.require_step_head()
        check_limits(max_length, max_rows)
        self.policy = policy
        self.tokenizer = policy.tokenizer
        self.template = get_template(template)
        self.meaning: Meaning = head.spec.meaning
        self.max_length = longest(policy, max_length)
        self.max_rows = max_rows
        self.shared_prefix = shared_prefix
        self.temperature = temperature
        self.name = name
        self.encoder = encoder(
            policy.tokenizer,
            self.template,
            format=head.spec.format,
            marker_id=head.ids.marker,
            max_length=_NO_LIMIT,
        )
        self.tokens: Counter[str] = Counter()

    def score(self, problems: Sequence[Solutions]) -> list[list[list[float]]]:
        """Score every step; see :class:`~stepkd.scorers.scorer.StepScorer`.

        A solution that holds the step marker itself, or only an end token (sampled ones may), is not scored: NaN for
        all of its steps.

        Raises:
            DataError: no prompt, or a solution without steps.
            ModelError: the model's scores are not numbers.
        """
        items = []
        for problem in problems:
            prompt, name = self.encoder.prompt_ids(problem.row), str(problem.row.get("id", "?"))
            items += [self._item(name, prompt, self._layout(steps, name)) for steps in problem.solutions]
        scores = iter(self._score_items(items))
        return [[next(scores) for _ in problem.solutions] for problem in problems]

    def _layout(self, steps: Sequence[str], name: str) -> Layout:
        """The solution's layout; one whose steps are read nowhere when it cannot be laid out."""
        try:
            return self.encoder.layout(steps, name)
        except UnreadableSolution:
            return _unread(len(steps))

    def _row_layout(self, row: Mapping[str, Any]) -> Layout:
        try:
            return self.encoder.row_layout(row)
        except UnreadableSolution:
            return _unread(len(row.get("step_ends") or row.get("completions") or row.get("steps") or row_steps(row)))

    def score_rows(self, rows: Sequence[Mapping[str, Any]]) -> list[list[float]]:
        """Score rows that carry their solution; sampled token ids are used as they are where this tokenizer wrote them.

        Args:
            rows: rollouts or rows with step texts (see :meth:`~stepkd.data.step_encode.StepEncoder.row_layout`).

        Returns:
            For each row one number per step, as :meth:`score`.

        Raises:
            DataError, ModelError: as :meth:`score`.
        """
        return self._score_items(
            [self._item(str(row.get("id", "?")), self.encoder.prompt_ids(row), self._row_layout(row)) for row in rows]
        )

    def unreadable(self, row: Mapping[str, Any]) -> str | None:
        """Why the solution of a row cannot be laid out, for the report; None when it can."""
        try:
            self.encoder.row_layout(row)
        except UnreadableSolution as error:
            return str(error)
        return None

    def provenance(self) -> dict[str, Any]:
        """See :class:`~stepkd.scorers.scorer.StepScorer`."""
        return {"scorer": "prm", "head": asdict(self.policy.require_step_head().spec)} | policy_provenance(self)

    def _item(self, name: str, prompt: tuple[int, ...], layout: Layout) -> _Item:
        room = self.max_length - len(prompt)
        places = tuple((step, at) for step, at in enumerate(layout.read_at) if at < room)
        if self.meaning == "outcome":
            places = tuple(place for place in places if place[0] == len(layout.read_at) - 1)
        end = places[-1][1] + 1 if places else 0
        return _Item(name, prompt, layout.ids[:end], places, len(layout.read_at))

    @torch.no_grad()
    def _score_items(self, items: Sequence[_Item]) -> list[list[float]]:
        results = [[math.nan] * item.steps for item in items]
        groups: dict[tuple[int, ...], list[_Item]] = defaultdict(list)
        number = {id(item): i for i, item in enumerate(items)}
        for item in items:
            if item.places:
                groups[item.prompt_ids].append(item)
        shared = [group for group in groups.values() if self.shared_prefix and len(group) > 1]
        alone = [item for group in groups.values() if not (self.shared_prefix and len(group) > 1) for item in group]
        with evaluation_mode(self.policy):
            for item, scores in [*self._score_alone(alone), *self._score_shared(shared)]:
                for (step, _), score in zip(item.places, scores, strict=True):
                    results[number[id(item)]][step] = score
        return results

    def _score_alone(self, items: list[_Item]) -> list[tuple[_Item, list[float]]]:
        """Prompt and solution in one pass."""
        items = sorted(items, key=lambda item: -len(item.prompt_ids) - len(item.ids))
        scored: list[tuple[_Item, list[float]]] = []
        for start in range(0, len(items), self.max_rows):
            part = items[start : start + self.max_rows]
            self._count(part, [item.prompt_ids for item in part])
            ids_BT, mask_BT = padded_right(self.policy, [item.prompt_ids + item.ids for item in part])
            hidden_BTH = self.policy.hidden(ids_BT, mask_BT)
            scored += self._read(part, hidden_BTH, [len(item.prompt_ids) for item in part])
        return scored

    def _score_shared(self, groups: list[list[_Item]]) -> list[tuple[_Item, list[float]]]:
        """Prompts first, once each; then their solutions on copies of the cache."""
        decoder = Decoder(self.policy, max_rows=self.max_rows)
        groups = sorted(groups, key=lambda group: -len(group[0].prompt_ids))
        scored: list[tuple[_Item, list[float]]] = []
        for block in packed([len(group) for group in groups], self.max_rows):
            prompts = [groups[g][0].prompt_ids for g in block]
            self._count([], prompts)
            read = decoder.read(prompts, padding="left")
            rows = [
                (p, item) for p, g in enumerate(block) for item in sorted(groups[g], key=lambda item: -len(item.ids))
            ]
            for start in range(0, len(rows), self.max_rows):
                sources, part = zip(*rows[start : start + self.max_rows], strict=True)
                self._count(part, [])
                solved = continue_rows(decoder, read, sources, [item.ids for item in part])
                scored += self._read(part, solved.hidden_PTH, [0] * len(part))
        return scored

    def _read(
        self, items: Sequence[_Item], hidden_BTH: Tensor, offsets: Sequence[int]
    ) -> list[tuple[_Item, list[float]]]:
        """Scores at the reading positions, ``offsets`` tokens behind the start of each row."""
        places = [(row, offsets[row] + at) for row, item in enumerate(items) for _, at in item.places]
        rows_S, columns_S = torch.tensor(places, device=hidden_BTH.device).unbind(-1)
        values_S = self.policy.step_scores(hidden_BTH[rows_S, columns_S]).double().cpu()
        if torch.isnan(values_S).any():
            row = places[int(torch.isnan(values_S).nonzero()[0])][0]
            raise ModelError(not_numbers(items[row].name))
        values = calibrated(values_S.clamp(0, 1).tolist(), self.temperature)
        parts, start = [], 0
        for item in items:
            parts.append((item, values[start : start + len(item.places)]))
            start += len(item.places)
        return parts

    def _count(self, items: Sequence[_Item], prompts: Sequence[Sequence[int]]) -> None:
        self.tokens["prompt"] += sum(map(len, prompts))
        self.tokens["solution"] += sum(len(item.ids) for item in items)


def longest(policy: Policy, max_length: int | None) -> int:
    """Most tokens of a row: what was asked for, within the model's context."""
    return min(max_length or _NO_LIMIT, policy.max_length or _NO_LIMIT)


def check_limits(max_length: int | None, max_rows: int) -> None:
    """Refuse numbers out of range.

    Raises:
        ConfigError: naming the number.
    """
    if max_rows < 1:
        raise ConfigError(f"max_rows={max_rows}: at least one row must be read at once")
    if max_length is not None and max_length < 2:
        raise ConfigError(f"max_length={max_length}: at least one prompt and one solution token")


def calibrated(scores: list[float], temperature: TemperatureScaling | None) -> list[float]:
    """Scores after temperature scaling, if there is one."""
    return scores if temperature is None else [float(score) for score in temperature.apply(scores)]


def not_numbers(problem: str) -> str:
    """The message for NaN scores."""
    return (
        f"the scores of problem {problem!r} are not numbers (NaN): the model's weights have diverged, or float16 "
        "overflowed (use bfloat16 or float32)"
    )


def policy_provenance(scorer: Any) -> dict[str, Any]:
    """What is common to scorers that read with a language model."""
    policy: Policy = scorer.policy
    return {
        "model": scorer.name or (None if policy.spec is None else policy.spec.path),
        "weights": weights_fingerprint(policy),
        "dtype": str(next(policy.parameters()).dtype).removeprefix("torch."),
        "prompt": scorer.template.prompt_id(policy.tokenizer),
        "template": template_name(scorer.template),
        "max_length": scorer.max_length,
        "meaning": scorer.meaning,
        "temperature": None if scorer.temperature is None else scorer.temperature.temperature,
    }
