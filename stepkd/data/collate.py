"""Examples to one padded batch, with the positions that predict a target and those at which labelled steps are read.

Every completion has a row with its prompt. Where rows begin alike, as those of one prompt do, ``shared_BT`` says whose
states the later ones take over: a model that goes without padding computes them once, and nothing else of the batch
depends on it.

Axes, here and wherever a batch is used: R completions, B rows (one per completion, so B = R), T padded length, N
targets (tokens of all completions), S steps of all completions, L labelled steps among them, C classes.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from stepkd.data.completion import Completion
from stepkd.errors import ConfigError
from stepkd.steps.labels import correct_targets


@dataclass(frozen=True)
class Batch:
    """A padded micro-batch. ``hidden.flatten(0, 1)[needed_N]`` are the states that predict ``targets_N``.

    Only positions in the flattened (B * T) axis depend on where the padding is, so a loss over N, S or L does not see
    it.
    """

    input_ids_BT: Tensor
    """int64 token ids, padded."""
    attention_mask_BT: Tensor
    """int64, 1 for tokens."""
    needed_N: Tensor
    """int64 positions in the flattened (B * T) axis whose *next* token is a target."""
    targets_N: Tensor
    """int64 target ids, completion by completion in order."""
    completion_N: Tensor
    """int64 completion of each target, not decreasing."""
    step_N: Tensor
    """int64 step of each target, numbered through the batch (0 .. S-1)."""
    completion_S: Tensor
    """int64 completion of each step, not decreasing."""
    step_L: Tensor
    """int64 step of each labelled step, increasing; after :meth:`at_every_token` that of each token, not decreasing."""
    read_L: Tensor
    """int64 positions in the flattened (B * T) axis at which labelled steps are scored: at (not before) the marker or
    the step's last token."""
    targets_LC: Tensor
    """float64 target probabilities of the labelled steps, worst class first; they sum to one."""
    outcome_R: Tensor
    """int64, 1: the completion is correct (or desirable), 0: it is not, -1: not known."""
    examples: tuple[Completion, ...]
    """What the completions are of, in order."""
    shared_BT: Tensor | None = None
    """int64: the position in the flattened (B * T) axis whose state a position has, for one that continues an earlier
    row's beginning that of the earlier row, else its own; None where no rows begin alike."""
    reference_N: Tensor | None = None
    """Log-probability of every target under the reference model; None until it is computed."""
    is_dummy: bool = False
    """Whether it only keeps this rank in step with the others; its loss counts zero."""

    @property
    def ids(self) -> list[str]:
        """Ids of the examples, for error messages."""
        return [example.id for example in self.examples]

    @property
    def num_completions(self) -> int:
        """R, the completions of the batch; a pair is two."""
        return len(self.outcome_R)

    @property
    def completion_L(self) -> Tensor:
        """int64 completion of each labelled step."""
        return self.completion_S[self.step_L]

    @property
    def correct_L(self) -> Tensor:
        """bool, whether each labelled step is correct (:func:`~stepkd.steps.labels.correct_targets`)."""
        correct_L: Tensor = correct_targets(self.targets_LC)
        return correct_L

    @property
    def label_S(self) -> Tensor:
        """int64, 1 for steps labelled correct, 0 for others with a label, -1 for those without."""
        labels_S = torch.full_like(self.completion_S, -1)
        labels_S[self.step_L] = self.correct_L.long()
        return labels_S

    @cached_property
    def label_N(self) -> Tensor:
        """int64, for each target the labelled step (0 .. L-1) whose label is its own step's, or for a step without one
        the next of its completion; -1 where there is none."""
        steps_S = torch.arange(len(self.completion_S), device=self.step_L.device)
        next_S = torch.searchsorted(self.step_L, steps_S).clamp(max=max(len(self.step_L) - 1, 0))
        if not len(self.step_L):
            return torch.full_like(self.step_N, -1)
        step_S = self.step_L[next_S]
        there_S = (step_S >= steps_S) & (self.completion_S[step_S] == self.completion_S)
        return torch.where(there_S, next_S, -1)[self.step_N]

    @cached_property
    def correct_N(self) -> Tensor:
        """bool, whether each target belongs to a step that :attr:`label_N` calls correct."""
        return torch.cat([self.correct_L, self.correct_L.new_zeros(1)])[self.label_N]

    def at_every_token(self) -> Batch:
        """Copy whose labels are read at every token that they speak of (:attr:`label_N`), not at step ends alone."""
        label_N = self.label_N[kept_N := self.label_N >= 0]
        read_L, targets_LC = self.needed_N[kept_N] + 1, self.targets_LC[label_N]
        return replace(self, step_L=self.step_N[kept_N], read_L=read_L, targets_LC=targets_LC)

    def to(self, device: torch.device) -> Batch:
        """Copy with its tensors on a device; the examples are shared.

        Args:
            device: where to; copies from pinned memory do not block.
        """
        moved: dict[str, Any] = {
            f.name: value.to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)


def collate(
    examples: Sequence[Completion],
    pad_id: int,
    *,
    share: bool = False,
    padding_side: Literal["right", "left"] = "right",
    pad_to: int | None = None,
    is_dummy: bool = False,
) -> Batch:
    """Pad the completions of examples to one length.

    Args:
        examples: at least one, each with a prompt; a completion without tokens has no targets and no steps.
        pad_id: id written into padding; its value never matters.
        share: say which rows begin alike, so that a model that can computes their beginning once.
        padding_side: where the padding goes; does not change losses or gradients.
        pad_to: pad to at least this many tokens.
        is_dummy: see :class:`Batch`.

    Returns:
        A batch on the CPU, one row for each completion, in the order of the examples.
    """
    completions = [completion for example in examples for completion in example.completions]
    numbers_R = np.arange(len(completions))
    prompt_R = np.array([len(each.prompt_ids) for each in completions])
    own_R = np.array([len(each.token_ids) for each in completions])
    length = max(int((prompt_R + own_R).max()), pad_to or 0)
    start_R = length - prompt_R - own_R if padding_side == "left" else np.zeros_like(own_R)
    tokens = [np.concatenate([each.prompt_ids, each.token_ids]) for each in completions]
    place_T = np.arange(length)
    mask_BT = (place_T >= start_R[:, None]) & (place_T < (start_R + prompt_R + own_R)[:, None])
    ids_BT = np.full(mask_BT.shape, pad_id, dtype=np.int64)
    ids_BT[mask_BT] = np.concatenate(tokens)

    first_R = numbers_R * length + start_R + prompt_R  # of each completion's own tokens
    completion_N = np.repeat(numbers_R, own_R)
    place_N = np.arange(len(completion_N)) - np.repeat(np.cumsum(own_R) - own_R, own_R)
    slot_N = first_R[completion_N] + place_N
    steps_R = [len(each.step_ends) for each in completions]
    lengths_S = np.concatenate([np.diff(each.step_ends, prepend=0) for each in completions])

    labelled = [
        (step, first_R[r] + read, target)
        for r, (each, before) in enumerate(zip(completions, np.cumsum(steps_R) - steps_R, strict=True))
        for step, (read, target) in enumerate(zip(each.read_at, each.targets, strict=True), start=int(before))
        if target is not None
    ]
    return Batch(
        input_ids_BT=torch.from_numpy(ids_BT),
        attention_mask_BT=torch.from_numpy(mask_BT.astype(np.int64)),
        needed_N=torch.from_numpy(slot_N - 1),
        targets_N=torch.from_numpy(ids_BT.reshape(-1)[slot_N]),
        completion_N=torch.from_numpy(completion_N),
        step_N=torch.from_numpy(np.repeat(np.arange(len(lengths_S)), lengths_S)),
        completion_S=torch.from_numpy(np.repeat(numbers_R, steps_R)),
        step_L=torch.tensor([step for step, _, _ in labelled], dtype=torch.long),
        read_L=torch.tensor([int(read) for _, read, _ in labelled], dtype=torch.long),
        targets_LC=torch.tensor([target for _, _, target in labelled] or np.empty((0, 2)), dtype=torch.float64),
        outcome_R=torch.tensor([each.outcome for each in completions], dtype=torch.long),
        examples=tuple(examples),
        shared_BT=_shared(completions, tokens, start_R, length) if share else None,
        is_dummy=is_dummy,
    )


def _shared(
    completions: Sequence[Completion], tokens: Sequence[np.ndarray], start_R: np.ndarray, length: int
) -> Tensor | None:
    """Whose state each position has: what a row has in common with the first one of its prompt is the first one's."""
    slots_BT = np.arange(len(tokens) * length).reshape(len(tokens), length)
    firsts: dict[Hashable, int] = {}
    found = False
    for r, (completion, own) in enumerate(zip(completions, tokens, strict=True)):
        first = firsts.setdefault(completion.prompt_ids.tobytes(), r)
        if first < r:
            found = True
            shorter = min(len(own), len(tokens[first]))
            same = own[:shorter] == tokens[first][:shorter]
            alike = shorter if same.all() else int(same.argmin())
            slots_BT[r, start_R[r] : start_R[r] + alike] = slots_BT[first, start_R[first] : start_R[first] + alike]
    return torch.from_numpy(slots_BT) if found else None


def plan(examples: Sequence[Completion], max_tokens: int, *, share: bool = False) -> list[list[Completion]]:
    """Cut examples into micro-batches of at most ``max_tokens`` tokens, padding included.

    Args:
        examples: what to train on; the completions of one are never split.
        max_tokens: rows times longest row stays within this, less the prompt tokens that are not computed again when
            ``share``; a larger example gets a micro-batch of its own.
        share: whether rows of one prompt that meet in a micro-batch read it once; such examples then stay together.

    Returns:
        Micro-batches, longest rows first, so that memory trouble shows at the first step.
    """
    if max_tokens < 1:
        raise ConfigError(f"micro_batch_tokens={max_tokens}: must be at least 1")
    longest = [max(each.length for each in example.completions) for example in examples]
    keys: list[Hashable] = [example.prompt_ids.tobytes() if share else i for i, example in enumerate(examples)]
    rank: dict[Hashable, tuple[int, int]] = {}  # of a prompt: its longest row, then its first example
    for i, key in enumerate(keys):
        rank[key] = min(rank.get(key, (0, i)), (-longest[i], i))
    groups: list[list[Completion]] = []
    rows = width = saved = 0
    last: Hashable = None
    for i in sorted(range(len(examples)), key=lambda i: (rank[keys[i]], -longest[i], i)):
        example, number, again = examples[i], len(examples[i].completions), len(examples[i].prompt_ids)
        saving = again * (number if groups and keys[i] == last else number - 1) if share else 0
        if not groups or (rows + number) * max(width, longest[i], 1) - saved - saving > max_tokens:
            groups.append([])
            rows, width, saved = 0, longest[i], 0
            saving = again * (number - 1) if share else 0
        groups[-1].append(example)
        rows, width, saved, last = rows + number, max(width, longest[i], 1), saved + saving, keys[i]
    return groups
