"""Per-token signals of given completions: what confidence-based segmenters read, for text nobody has sampled here.

One teacher-forced pass per model. Head-side: logits exist for ``chunk_size`` positions at a time.

Axes: B rows, T padded length, H hidden size, N completion tokens of a batch, C positions of one chunk, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from stepkd.data.collate import collate, plan
from stepkd.data.completion import Completion, Numbers
from stepkd.errors import ModelError
from stepkd.losses.divergence import tempered
from stepkd.losses.linear import DEFAULT_CHUNK, chunked_head, target_logps
from stepkd.models.head import evaluation_mode
from stepkd.models.policy import Policy
from stepkd.sampling.draw import entropies
from stepkd.sampling.engine import Scores, check_scored

Ids = Sequence[int]


class TokenSignals(NamedTuple):
    """Signals of one completion of T tokens, named as in :class:`~stepkd.steps.text.TokenizedText`.

    ``dataclasses.replace(completion, **signals._asdict())`` adds them to a tokenised text.
    """

    logprobs: tuple[float, ...]
    """Log-probability of each token at temperature 1 (nats, <= 0)."""
    entropies: tuple[float, ...]
    """Entropy of the distribution that each token was drawn from, at temperature 1 (nats, >= 0)."""
    teacher_logprobs: tuple[float, ...] | None = None
    """Log-probability of each token under the teacher; None without one."""


@torch.no_grad()
def annotate(
    policy: Policy,
    prompts_ids: Sequence[Ids],
    completions_ids: Sequence[Ids],
    *,
    teacher: Policy | None = None,
    max_tokens: int = 8192,
    chunk_size: int = DEFAULT_CHUNK,
) -> list[TokenSignals]:
    """Compute the signals of completions that are given as ids.

    For a sampled completion the log-probabilities are the engine's ``raw_logprobs``, up to rounding. Dropout is off.

    Args:
        policy: the model whose confidence is asked for.
        prompts_ids: ids of each prompt, at least one.
        completions_ids: ids of each prompt's completion; empty ones get empty signals.
        teacher: a second model with the same vocabulary.
        max_tokens: most tokens in one forward pass, padding included; a longer row has a pass of its own.
        chunk_size: positions whose logits exist at once; changes memory, never the result.

    Returns:
        One record per completion, in order.

    Raises:
        DataError: an empty prompt, ids outside the vocabulary, or a row longer than a model's context.
        ModelError: the teacher has another vocabulary, or a model's logits are not numbers.
    """
    if teacher is not None:
        check_same_vocabulary(policy.tokenizer, teacher.tokenizer)
    rows = [Completion(np.asarray(a), np.asarray(b)) for a, b in zip(prompts_ids, completions_ids, strict=True)]
    check_scored(rows, policy.vocab_size, policy.max_length)
    read = _read(policy, rows, max_tokens, chunk_size, _signals)
    found = [TokenSignals(*map(tuple, signals_N2.T.tolist())) for signals_N2 in read]
    if teacher is None:
        return found
    check_scored(rows, teacher.vocab_size, teacher.max_length, "teacher")
    theirs = _read(teacher, rows, max_tokens, chunk_size, _signals)
    return [
        signals._replace(teacher_logprobs=tuple(signals_N2[:, 0].tolist()))
        for signals, signals_N2 in zip(found, theirs, strict=True)
    ]


@torch.no_grad()
def sampled_logps(policy: Policy, completions: Sequence[Completion], temperature: float) -> Numbers:
    """(N,) log-probabilities of the tokens of completions, one after the other.

    Args:
        policy: the model, which is taken as it is now.
        completions: with their prompts.
        temperature: divides the logits, > 0.
    """

    def own(logits_CV: Tensor, targets_C: Tensor) -> Tensor:
        return target_logps(tempered(logits_CV, temperature), targets_C).unsqueeze(-1)

    return torch.cat(_read(policy, completions, 8192, DEFAULT_CHUNK, own)).flatten().double().numpy()


@torch.no_grad()
def likeliest(policy: Policy, completions: Sequence[Completion], top_k: int) -> list[Scores]:
    """See :meth:`~stepkd.sampling.engine.Engine.score`; completions were checked."""

    def said(logits_CV: Tensor, targets_C: Tensor) -> Tensor:
        logps_CV = tempered(logits_CV)
        best = logps_CV.topk(top_k, dim=-1)
        # Ids beside them: float32 holds integers to 2 ** 24.
        return torch.cat([logps_CV.gather(-1, targets_C.unsqueeze(-1)), best.values, best.indices], dim=-1)

    found = []
    for row, each in zip(completions, _read(policy, completions, 8192, DEFAULT_CHUNK, said), strict=True):
        values = each.view(len(row.token_ids), 1 + 2 * top_k).double().numpy()
        own_T1, best_Tk, ids_Tk = np.hsplit(values, [1, 1 + top_k])
        found.append(Scores(own_T1[:, 0], ids_Tk.astype(np.int64), best_Tk))
    return found


def check_same_vocabulary(tokenizer: Any, of_teacher: Any, who: str = "teacher") -> None:
    """Check that two models' tokenizers read the same ids as the same tokens.

    Args:
        tokenizer: the model's.
        of_teacher: the other model's.
        who: what the other model is called.

    Raises:
        ModelError: their vocabularies differ; the message shows a token that does.
    """
    ours, theirs = tokenizer.get_vocab(), of_teacher.get_vocab()
    if ours == theirs:
        return
    token = min(token for token in {*ours, *theirs} if ours.get(token) != theirs.get(token))
    raise ModelError(
        f"the {who}'s vocabulary is not the model's ({len(theirs)} and {len(ours)} tokens; {token!r} has id "
        f"{theirs.get(token)} there and {ours.get(token)} here), so it cannot read the model's ids: take a {who} "
        "of the same model family, and a model as it was before tokens were added to it"
    )


def _read(
    model: Policy, completions: Sequence[Completion], max_tokens: int, chunk_size: int, measure: Callable[..., Tensor]
) -> list[Tensor]:
    """A measure of logits and targets at all completion tokens: one tensor (tokens, columns) each, on the CPU."""
    rows = [replace(each, id=str(number)) for number, each in enumerate(completions)]
    found: dict[str, Tensor] = {}
    with evaluation_mode(model):
        for part in plan([row for row in rows if len(row.token_ids)], max_tokens):
            batch = collate(part, int(model.tokenizer.pad_token_id or 0)).to(model.device)
            hidden_NH = model.hidden(batch.input_ids_BT, batch.attention_mask_BT).flatten(0, 1)[batch.needed_N]
            signals_N2 = chunked_head(measure, model.head, hidden_NH, batch.targets_N, chunk_size=chunk_size).cpu()
            found |= zip(batch.ids, signals_N2.split([len(row.token_ids) for row in part]), strict=True)
    for number, signals_T2 in found.items():
        if torch.isnan(signals_T2).any():
            raise ModelError(
                f"the model's logits are not numbers (NaN) in completion {number}: its weights have diverged, or "
                "float16 overflowed (use bfloat16 or float32)"
            )
    return [found.get(row.id, torch.zeros(0, 2)) for row in rows]


def _signals(logits_CV: Tensor, targets_C: Tensor) -> Tensor:
    return torch.stack([target_logps(logits_CV, targets_C).clamp(max=0), entropies(logits_CV)], dim=-1)
