"""Trained process reward models as scorers, and what they share with judges: many solutions of one problem, its prompt
read once, every solution read on a copy of the prompt's cache.

Axes: B rows, T padded length, S scored steps, H hidden size.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stepkd.data.step_encode import Layout, StepEncoder
from stepkd.data.templates import PromptTemplate, get_template, template_name
from stepkd.errors import ConfigError, ModelError, UnreadableSolution
from stepkd.models.checkpoint import weights_fingerprint
from stepkd.models.head import evaluation_mode
from stepkd.models.policy import Policy
from stepkd.sampling.branches import selected_rows
from stepkd.sampling.cache import Reading, padded
from stepkd.sampling.decode import Decoder
from stepkd.scorers.calibration import scaled
from stepkd.scorers.scorer import Judged, Meaning, Row, Solutions, facts_of, row_steps

NO_LIMIT = 10**9

Ids = tuple[int, ...]


@dataclass(eq=False)
class Item:
    """One solution, ready to be read."""

    name: str
    """Its problem's id, for messages."""
    head: Ids
    """Prompt ids: everything before the solution."""
    ids: Ids
    """Solution ids up to the last position that is needed."""
    places: tuple[Any, ...]
    """Where its steps are scored: (step, index in ``ids``); for a judge (step, number of tokens of head and solution
    that are read, ids of the question behind them)."""
    scores: list[float]
    """One per step: NaN until it is scored, and where it was cut off."""


class PolicyScorer:
    """What scorers that read with a language model share.

    Args:
        policy: the model; in evaluation mode while it scores.
        template: prompt template.
        max_length: longest row (prompt, solution and a judge's question) in tokens, at least 2; steps beyond it are not
            scored. None: the model's context.
        max_rows: most rows in one forward pass, at least 1; changes memory and speed, and results by rounding.
        shared_prefix: read what several rows begin with once; False reads it again for each (the same scores).
        temperature: scales the scores, in [0.01, 100], fitted on held-out labels; None: they stay.
        name: what to call the model in the provenance; None: its path.

    Raises:
        ConfigError: a number out of range.
    """

    meaning: Meaning

    def __init__(
        self,
        policy: Policy,
        template: str | PromptTemplate,
        *,
        max_length: int | None = None,
        max_rows: int = 32,
        shared_prefix: bool = True,
        temperature: float | None = None,
        name: str | None = None,
    ) -> None:
        if max_rows < 1 or (max_length or 2) < 2:
            raise ConfigError(f"max_rows={max_rows}, max_length={max_length}: must be at least 1 row and 2 tokens")
        self.policy = policy
        self.tokenizer = policy.tokenizer
        self.template = get_template(template)
        self.max_length = min(max_length or NO_LIMIT, policy.max_length or NO_LIMIT)
        self.max_rows = max_rows
        self.shared_prefix = shared_prefix
        self.temperature = temperature
        self.name = name

    def provenance(self) -> dict[str, Any]:
        """See :class:`~stepkd.scorers.scorer.StepScorer`."""
        return {
            "model": self.name or (None if self.policy.spec is None else self.policy.spec.path),
            "weights": weights_fingerprint(self.policy),
            "dtype": str(next(self.policy.parameters()).dtype).removeprefix("torch."),
            "prompt": self.template.prompt_id(self.tokenizer),
            "template": template_name(self.template),
            "max_length": self.max_length,
            "meaning": self.meaning,
            "temperature": self.temperature,
        }

    def _continued(
        self, decoder: Decoder, groups: Sequence[Sequence[Item]]
    ) -> Iterator[tuple[Sequence[Item], Reading]]:
        """The heads of groups, read once each; then the groups' rows, ``max_rows`` at a time, behind their heads; the
        rows of a group share their head."""
        read = decoder.read([group[0].head for group in groups], padding="left")
        rows = [(g, row) for g, group in enumerate(groups) for row in sorted(group, key=lambda row: -len(row.ids))]
        for start in range(0, len(rows), self.max_rows):
            sources, part = zip(*rows[start : start + self.max_rows], strict=True)
            yield part, continue_rows(decoder, read, sources, [row.ids for row in part])

    def _scores(self, values_S: Tensor, problems: Sequence[str]) -> list[float]:
        """Scores in [0, 1], scaled by the temperature; ``problems`` names each one's problem for the message."""
        values_S = values_S.double().cpu()
        if torch.isnan(values_S).any():
            raise ModelError(
                f"the scores of problem {problems[int(torch.isnan(values_S).nonzero()[0])]!r} are not numbers (NaN): "
                "the model's weights have diverged, or float16 overflowed (use bfloat16 or float32)"
            )
        scores: list[float] = values_S.clamp(0, 1).tolist()
        return scores if self.temperature is None else scaled(scores, self.temperature).tolist()


class SolutionScorer(PolicyScorer):
    """Scorers that read solutions as training does: from step texts, or sampled ids as they are."""

    encoder: StepEncoder
    """How solutions become token ids."""

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

    def score_rows(self, rows: Sequence[Row]) -> list[list[float]]:
        """Score rows that carry their solution; sampled token ids are used as they are where this tokenizer wrote them.

        Args:
            rows: completions or rows with step texts (see :meth:`~stepkd.data.step_encode.StepEncoder.row_layout`).

        Returns:
            For each row one number per step, as :meth:`score`.

        Raises:
            DataError, ModelError: as :meth:`score`.
        """
        return self._score_items(
            [self._item(str(row.get("id", "?")), self.encoder.prompt_ids(row), self._row_layout(row)) for row in rows]
        )

    def unreadable(self, row: Row) -> str | None:
        """Why the solution of a row cannot be laid out.

        Args:
            row: a completion, or a row with step texts.

        Returns:
            The reason, for the report; None when it can be laid out.
        """
        try:
            self.encoder.row_layout(row)
        except UnreadableSolution as error:
            return str(error)
        return None

    def _layout(self, steps: Sequence[str], name: str) -> Layout:
        """The solution's layout; one whose steps are read nowhere when it cannot be laid out."""
        try:
            return self.encoder.layout(steps, name)
        except UnreadableSolution:
            return _unread(len(steps))

    def _row_layout(self, row: Row) -> Layout:
        try:
            return self.encoder.row_layout(row)
        except UnreadableSolution:
            return _unread(len(row.get("step_ends") or row.get("completions") or row.get("steps") or row_steps(row)))

    def _item(self, name: str, prompt: Ids, layout: Layout) -> Item:
        room, steps = self.max_length - len(prompt), len(layout.read_at)
        judged = range(steps - 1, steps) if self.meaning == "outcome" else range(steps)
        places = tuple((step, layout.read_at[step]) for step in judged if layout.read_at[step] < room)
        end = places[-1][1] + 1 if places else 0
        return Item(name, prompt, layout.ids[:end], places, [math.nan] * steps)

    @abstractmethod
    def _score_items(self, items: Sequence[Item]) -> list[list[float]]:
        """Scores of items, in order; one without places has none."""


class PRMScorer(SolutionScorer):
    """Scores steps with a model that has a step head; an ensemble's have the fact ``members``, the scores of each.

    Args:
        policy: the model, with :meth:`~stepkd.models.policy.Policy.attach_step_head` done; in evaluation mode while it
            scores.
        template: prompt template; must be the one that the model was trained with.
        encoder: how solutions become token ids.
        **reading: settings of :class:`PolicyScorer`.

    Raises:
        ModelError: the model has no step head.
        ConfigError: a number out of range.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        template: str | PromptTemplate,
        encoder: type[StepEncoder] = StepEncoder,
        **reading: Any,
    ) -> None:
        head = policy.require_step_head()
        super().__init__(policy, template, **reading)
        self.meaning = head.spec.meaning
        self.encoder = encoder(
            policy.tokenizer,
            self.template,
            format=head.spec.format,
            marker_id=head.ids.marker,
            max_length=NO_LIMIT,
        )

    def provenance(self) -> dict[str, Any]:
        """See :class:`~stepkd.scorers.scorer.StepScorer`."""
        return {"scorer": "prm", "head": self.policy.require_step_head().spec.to_dict()} | super().provenance()

    @torch.no_grad()
    def _score_items(self, items: Sequence[Item]) -> list[list[float]]:
        groups: dict[Ids, list[Item]] = defaultdict(list)
        for item in items:
            if item.places:
                groups[item.head].append(item)
        shared = [group for group in groups.values() if self.shared_prefix and len(group) > 1]
        alone = [item for group in groups.values() if not (self.shared_prefix and len(group) > 1) for item in group]
        with evaluation_mode(self.policy):
            self._score_alone(sorted(alone, key=lambda item: -len(item.head) - len(item.ids)))
            self._score_shared(sorted(shared, key=lambda group: -len(group[0].head)))
        return [item.scores for item in items]

    def _score_alone(self, items: list[Item]) -> None:
        """Prompt and solution in one pass."""
        for start in range(0, len(items), self.max_rows):
            part = items[start : start + self.max_rows]
            hidden_BTH = self.policy.hidden(*padded(self.policy, [item.head + item.ids for item in part]))
            self._read(part, hidden_BTH, [len(item.head) for item in part])

    def _score_shared(self, groups: list[list[Item]]) -> None:
        """Prompts first, once each; then their solutions on copies of the cache."""
        decoder = Decoder(self.policy, max_rows=self.max_rows)
        for block in packed([len(group) for group in groups], self.max_rows):
            for part, solved in self._continued(decoder, [groups[g] for g in block]):
                self._read(part, solved.hidden_PTH, [0] * len(part))

    def _read(self, items: Sequence[Item], hidden_BTH: Tensor, offsets: Sequence[int]) -> None:
        """Score at the reading positions, ``offsets`` tokens behind the start of each row."""
        places = [(row, step, offsets[row] + at) for row, item in enumerate(items) for step, at in item.places]
        rows_S, _, columns_S = torch.tensor(places, device=hidden_BTH.device).unbind(-1)
        hidden_SH, head = hidden_BTH[rows_S, columns_S], self.policy.require_step_head()
        names = [items[row].name for row, _, _ in places]
        scores = self._scores(self.policy.step_scores(hidden_SH), names)
        for (row, step, _), score in zip(places, scores, strict=True):
            items[row].scores[step] = score
        if head.spec.members > 1:
            self._read_members(items, head.member_scores(hidden_SH), places, names)

    def _read_members(
        self, items: Sequence[Item], scores_MS: Tensor, places: Sequence[tuple[int, int, int]], names: Sequence[str]
    ) -> None:
        """Keep every member's own scores beside the step's, scaled likewise; None where a step has none."""
        for item in items:
            members: list[list[float | None]] = [[None] * len(item.scores) for _ in scores_MS]
            item.scores = Judged(item.scores, facts={"members": members}, prediction=None)
        for m, scores_S in enumerate(scores_MS):
            for (row, step, _), score in zip(places, self._scores(scores_S, names), strict=True):
                facts_of(items[row].scores)["members"][m][step] = score


def _unread(steps: int) -> Layout:
    return Layout((), (), (NO_LIMIT,) * steps)


def continue_rows(
    decoder: Decoder,
    reading: Reading,
    sources: Sequence[int],
    ids: Sequence[Sequence[int]],
    *,
    cuts: Sequence[int] | None = None,
) -> Reading:
    """Read continuations, padded on the right, of rows that have been read.

    Args:
        decoder: reads with the model that read the rows, in evaluation mode and without gradients.
        reading: what has been read, padded on the left or a continuation itself; left as it is, so that more
            continuations can follow.
        sources: for each of the B continuations, which row it continues.
        ids: ids of the continuations, none empty.
        cuts: how many tokens of its row each continuation sees, counted from the row's first; None: all. Needs a model
            that allows gaps of this size (:func:`stepkd.sampling.branches.gap_limit`).

    Returns:
        The continuations' hidden states (B, T', H), with mask and cache of the whole rows.
    """
    policy = decoder.policy
    index_B = torch.tensor(sources, device=policy.device)
    seen_BT = reading.mask_PT[index_B]
    if cuts is not None:
        cuts_B = torch.tensor(cuts, device=policy.device)
        seen_BT = seen_BT * (seen_BT.cumsum(-1) <= cuts_B[:, None])
    ids_BT, mask_BT = padded(policy, ids)
    # Padding repeats its row's last position, so that no position exceeds the context; nothing ever looks at it.
    ahead_BT = mask_BT.cumsum(-1) - 1
    whole_BT = torch.cat([seen_BT, mask_BT], dim=1)
    output = decoder.forward(
        ids_BT, whole_BT, seen_BT.sum(-1, keepdim=True) + ahead_BT, selected_rows(reading.cache, index_B)
    )
    return Reading(output.last_hidden_state, whole_BT, output.past_key_values)


def packed(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Put groups into blocks of at most ``limit`` rows, in order; a group of more rows has a block of its own.

    Args:
        sizes: number of rows of each group, each at least 1.
        limit: most rows of a block.

    Returns:
        Indices of the groups of each block.
    """
    blocks: list[list[int]] = []
    filled = limit
    for group, size in enumerate(sizes):
        if filled + size > limit:
            blocks.append([])
            filled = 0
        blocks[-1].append(group)
        filled += size
    return blocks
