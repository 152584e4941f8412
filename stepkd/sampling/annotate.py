"""Per-token signals of given completions: what confidence-based segmenters read, for text nobody has sampled here.

One teacher-forced pass per model. Head-side: logits exist for ``chunk_size`` positions at a time.

Axes: B rows, T padded length, H hidden size, N completion tokens of a batch, C positions of one chunk, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stepkd.errors import DataError, ModelError
from stepkd.losses.linear import DEFAULT_CHUNK, chunked_head, target_logps
from stepkd.models.head import evaluation_mode
from stepkd.models.policy import Policy
from stepkd.sampling.decode import padded

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

    For a sampled completion the log-probabilities are the sampler's ``raw_logprobs``, up to rounding. Dropout is off.

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
    rows = list(zip(prompts_ids, completions_ids, strict=True))
    _check_rows(rows, policy, "model")
    scores = [_score(policy, rows, _logp_and_entropy, max_tokens, chunk_size)]
    if teacher is not None:
        _check_rows(rows, teacher, "teacher")
        scores.append(_score(teacher, rows, _logp, max_tokens, chunk_size))
    columns = [[column for score_NK in parts for column in score_NK.T.tolist()] for parts in zip(*scores, strict=True)]
    return [TokenSignals(*map(tuple, row[: 2 if teacher is None else 3])) for row in columns]


def check_same_vocabulary(tokenizer: Any, of_teacher: Any) -> None:
    """Check that two models' tokenizers read the same ids as the same tokens.

    Raises:
        ModelError: their vocabularies differ; the message shows a token that does.
    """
    ours, theirs = tokenizer.get_vocab(), of_teacher.get_vocab()
    if ours == theirs:
        return
    special = [t for t in tokenizer.all_special_tokens if t in ours and theirs.get(t) != ours[t]]
    if special and all(theirs.get(token) == i for token, i in ours.items() if token not in special):
        raise ModelError(
            f"the teacher does not know the model's special tokens {', '.join(map(repr, special))} (ids "
            f"{', '.join(str(ours[t]) for t in special)}), so it cannot say where a completion ends or what pads it: "
            "add them to the teacher's tokenizer and embeddings and train it to use them, or take the model as it was "
            "before they were added"
        )
    token = min(token for token in {*ours, *theirs} if ours.get(token) != theirs.get(token))
    raise ModelError(
        f"the teacher's vocabulary is not the model's ({len(theirs)} and {len(ours)} tokens; {token!r} has id "
        f"{theirs.get(token)} there and {ours.get(token)} here), so it cannot score the model's ids: take a teacher "
        "of the same model family"
    )


def _check_rows(rows: list[tuple[Ids, Ids]], model: Policy, who: str) -> None:
    for number, (prompt, completion) in enumerate(rows):
        if len(prompt) == 0:
            raise DataError(f"prompt {number} has no tokens: a model needs at least one token to start from")
        if unknown := [i for i in (*prompt, *completion) if not 0 <= i < model.vocab_size]:
            raise DataError(
                f"prompt and completion {number} hold id {unknown[0]}, and the {who} has ids 0 to "
                f"{model.vocab_size - 1}: were they tokenised with another tokenizer?"
            )
        length, context = len(prompt) + len(completion), model.max_length
        if context is not None and length > context:
            raise DataError(
                f"prompt and completion {number} have {length} tokens and the {who}'s context is {context}: shorten "
                "or drop the row"
            )


def _batches(rows: list[tuple[Ids, Ids]], max_tokens: int) -> Iterator[list[int]]:
    """Numbers of the rows with a completion, longest first, in batches of at most ``max_tokens`` padded tokens."""
    lengths = [len(prompt) + len(completion) - 1 for prompt, completion in rows]
    order = sorted((i for i, (_, completion) in enumerate(rows) if len(completion)), key=lambda i: -lengths[i])
    start = 0
    while start < len(order):
        size = max(1, max_tokens // lengths[order[start]])
        yield order[start : start + size]
        start += size


def _score(
    model: Policy,
    rows: list[tuple[Ids, Ids]],
    score: Callable[[Tensor, Tensor], Tensor],
    max_tokens: int,
    chunk_size: int,
) -> list[Tensor]:
    """``score(logits_CV, targets_C)`` at all completion tokens: one tensor (tokens, columns) per row, on the CPU."""
    results = [torch.zeros(0, 2)] * len(rows)
    with evaluation_mode(model):
        for numbers in _batches(rows, max_tokens):
            # The last token is only ever predicted, never read.
            inputs = [[*rows[i][0], *rows[i][1][:-1]] for i in numbers]
            needed = [(b, t) for b, i in enumerate(numbers) for t in range(len(rows[i][0]) - 1, len(inputs[b]))]
            rows_N, places_N = torch.tensor(needed, device=model.device).T
            targets_N = torch.tensor([token for i in numbers for token in rows[i][1]], device=model.device)
            hidden_NH = model.hidden(*padded(model, inputs))[rows_N, places_N]
            scores_NK = chunked_head(score, model.head, hidden_NH, targets_N, chunk_size=chunk_size).cpu()
            parts = scores_NK.split([len(rows[i][1]) for i in numbers])
            for i, part in zip(numbers, parts, strict=True):
                if torch.isnan(part).any():
                    raise ModelError(
                        f"the model's logits are not numbers (NaN) in completion {i}: its weights have diverged, or "
                        "float16 overflowed (use bfloat16 or float32)"
                    )
                results[i] = part
    return results


def _logp(logits_CV: Tensor, targets_C: Tensor) -> Tensor:
    return target_logps(logits_CV, targets_C).clamp(max=0).unsqueeze(-1)


def _logp_and_entropy(logits_CV: Tensor, targets_C: Tensor) -> Tensor:
    # entr(0) is 0, so tokens that a model rules out (logits of -inf) add nothing.
    entropy_C = torch.special.entr(logits_CV.softmax(-1)).sum(-1).clamp(min=0)
    return torch.cat([_logp(logits_CV, targets_C), entropy_C.unsqueeze(-1)], dim=-1)
