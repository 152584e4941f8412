"""SpecDec++'s acceptance head: how likely a drafted token is to stand, from the draft's hidden state behind it.

Source: Huang et al. 2024, arXiv 2405.19715, and its released code (Kaffaljidhmah2/SpecDec_pp). As there: residual SiLU
blocks and two logits; the targets ``a = min(1, p / q)`` of tokens that the draft draws behind every beginning of what
the target wrote; the head reads hidden states of these tokens' sequence, in which a share is replaced by the target's
own, which are left out of the loss; rejections weigh more. Not as there: its list of blocks holds one block several
times, so that all share their weights, here each has its own; its learning rate is transformers' default, 5e-5.

Axes: N tokens, T tokens of a completion, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stepkd.data.completion import Completion
from stepkd.errors import ConfigError, DataError, ModelError
from stepkd.models.head import evaluation_mode
from stepkd.models.policy import Policy
from stepkd.randomness import generator
from stepkd.sampling.annotate import check_same_vocabulary
from stepkd.sampling.draw import first_above, sampling_logprobs
from stepkd.sampling.engine import SamplingConfig

_CHUNK = 64
"""Positions whose probabilities exist at once."""


class AcceptanceHead(nn.Module):
    """Hidden states to the logits of a rejection and of an acceptance.

    Args:
        hidden_size: the draft model's.
        layers: residual blocks, 0 or more; 3 in the paper.
        seed: of the first weights.
    """

    def __init__(self, hidden_size: int, layers: int = 3, seed: int = 0) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.blocks = nn.ModuleList(nn.Linear(hidden_size, hidden_size) for _ in range(layers))
            self.out = nn.Linear(hidden_size, 2)

    def forward(self, hidden_NH: Tensor) -> Tensor:
        """(N, 2) logits."""
        for block in self.blocks:
            hidden_NH = hidden_NH + nn.functional.silu(block(hidden_NH))
        logits_N2: Tensor = self.out(hidden_NH)
        return logits_N2

    def chance(self, hidden_H: Tensor) -> float:
        """Probability that a token stands, from the hidden state behind it."""
        return float(self(hidden_H.to(self.out.weight)).softmax(-1)[1])

    def save(self, path: str | Path) -> None:
        """Write the weights to a ``.safetensors`` file."""
        save_file(self.state_dict(), path)

    @classmethod
    def load(cls, path: str | Path) -> AcceptanceHead:
        """Read what :meth:`save` wrote.

        Raises:
            ModelError: no such file, or another one.
        """
        try:
            weights = load_file(path)
            head = cls(weights["out.weight"].shape[1], sum(name.endswith(".weight") for name in weights) - 1)
            head.load_state_dict(weights)
        except (OSError, SafetensorError, KeyError, RuntimeError, IndexError) as error:
            raise ModelError(f"{path} is no acceptance head (AcceptanceHead.save writes one): {error}") from error
        return head


def acceptance_loss(logits_N2: Tensor, accepted_N: Tensor, rejection_weight: float = 6.0) -> Tensor:
    """Binary cross-entropy with soft targets, whose rejections weigh more.

    Args:
        logits_N2: of the head.
        accepted_N: probability a that each token stands, in [0, 1].
        rejection_weight: w, > 0; 6 in the paper.

    Returns:
        ``-sum(w (1 - a) log P(rejected) + a log P(accepted)) / sum(w (1 - a) + a)``, as in the released code.
    """
    logps_N2 = logits_N2.log_softmax(-1)
    weights_N2 = torch.stack([rejection_weight * (1 - accepted_N), accepted_N], -1)
    return -(weights_N2 * logps_N2).sum() / weights_N2.sum()


@torch.no_grad()
def acceptance_examples(
    target: Policy, draft: Policy, completion: Completion, spec: SamplingConfig, *key: int | str, replaced: float = 0.15
) -> tuple[Tensor, Tensor]:
    """What the head learns from one completion of the target's.

    Args:
        target, draft: models of one vocabulary, in evaluation mode.
        completion: T tokens, at least one, with its prompt.
        spec: temperature, top-p and top-k of both.
        key: keys what is drawn, with the seed.
        replaced: share of the draft's tokens that the target's own take the places of.

    Returns:
        Hidden states (N, H) of the draft at its own tokens, and (N,) their probabilities to stand.

    Raises:
        ModelError: logits that are not numbers.
    """
    prompt, own_T = completion.prompt_ids.tolist(), torch.tensor(completion.token_ids)

    def behind(policy: Policy, ids_T: Tensor) -> Tensor:
        """Hidden states (T + 1, H) from the prompt's last token on."""
        ids_1T = known_ids(policy, torch.cat([torch.tensor(prompt), ids_T]))[None].to(policy.device)
        return policy.hidden(ids_1T, torch.ones_like(ids_1T))[0, len(prompt) - 1 :]

    numbers = generator(spec.seed, "acceptance", *key)
    uniform_T1 = torch.tensor(numbers.random((len(own_T), 1)))
    rows = behind(target, own_T)[:-1], behind(draft, own_T)[:-1], uniform_T1
    chunks = zip(*(each.split(_CHUNK) for each in rows), strict=True)
    found = [_drafted(target, draft, spec, *chunk) for chunk in chunks]
    drawn_T, accepted_T = (torch.cat(each) for each in zip(*found, strict=True))
    replaced_T = torch.tensor(numbers.random(len(own_T)) < replaced)
    hidden_TH = behind(draft, torch.where(replaced_T, own_T, drawn_T))[1:].cpu()
    return hidden_TH[~replaced_T].float(), accepted_T[~replaced_T].float()


def _drafted(
    target: Policy, draft: Policy, spec: SamplingConfig, target_CH: Tensor, draft_CH: Tensor, uniform_C1: Tensor
) -> tuple[Tensor, Tensor]:
    """The draft's tokens (C,), and their probabilities to stand."""
    logits = (
        checked(target.head(target_CH), "target"),
        checked(draft_logits(draft, draft_CH, target.vocab_size), "draft"),
    )
    target_CV, draft_CV = (sampling_logprobs(each, spec).cpu().double() for each in logits)
    mass_CV = draft_CV.exp()
    drawn_C1 = first_above(mass_CV, uniform_C1 * mass_CV.sum(-1, keepdim=True))[0]
    logps_C1 = target_CV.gather(-1, drawn_C1) - draft_CV.gather(-1, drawn_C1)
    return drawn_C1.squeeze(-1), logps_C1.clamp(max=0).exp().squeeze(-1)


def checked(logits_CV: Tensor, who: str) -> Tensor:
    """The logits, which must be numbers; -inf rules a token out.

    Raises:
        ModelError: NaN or infinity among them.
    """
    if not bool(logits_CV.amax(-1).isfinite().all()):
        raise ModelError(
            f"the {who}'s logits are not numbers (NaN or infinite): its weights have diverged, or float16 overflowed "
            "(use bfloat16 or float32)"
        )
    return logits_CV


def draft_logits(draft: Policy, hidden_CH: Tensor, ids: int) -> Tensor:
    """(C, ids) logits of a draft for a target of so many ids: models of one tokenizer differ in the last of them."""
    logits_CV = draft.head(hidden_CH)
    return nn.functional.pad(logits_CV, (0, ids - logits_CV.shape[-1]), value=-torch.inf)


def known_ids(policy: Policy, ids: Tensor) -> Tensor:
    """Ids with the last one in place of those that the model has no embedding for: a draft may read anything."""
    return ids.clamp(max=policy.vocab_size - 1)


def train_acceptance_head(
    target: Policy,
    draft: Policy,
    completions: Sequence[Completion],
    spec: SamplingConfig | None = None,
    *,
    epochs: int = 3,
    batch: int = 32,
    lr: float = 1e-3,
    rejection_weight: float = 6.0,
) -> AcceptanceHead:
    """Train a head on completions that the target sampled (:class:`~stepkd.sampling.speculative.Stop` takes it).

    Args:
        target, draft: models of one vocabulary.
        completions: of the target's, with their prompts.
        spec: how both sample; None: at temperature 1. Its seed keys what is drawn, the first weights and the order.
        epochs, batch: rounds, and completions a step, as in the paper.
        lr: AdamW's, falling to 0 by a cosine; ours, for drafts and data far smaller than the paper's.
        rejection_weight: see :func:`acceptance_loss`.

    Raises:
        DataError: no completion with tokens.
        ConfigError: greedy sampling, whose tokens stand or do not.
        ModelError: vocabularies that differ, or logits that are not numbers.
    """
    spec = spec or SamplingConfig()
    if spec.temperature == 0:
        raise ConfigError("temperature 0: an acceptance head learns probabilities, and greedy tokens have none")
    check_same_vocabulary(target.tokenizer, draft.tokenizer, "draft")
    with evaluation_mode(target), evaluation_mode(draft):
        examples = [
            acceptance_examples(target, draft, each, spec, number)
            for number, each in enumerate(completions)
            if len(each.token_ids)
        ]
    if not examples:
        raise DataError("no completion with tokens: sample some from the target")
    head = AcceptanceHead(examples[0][0].shape[1], seed=spec.seed)
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(examples) // batch))
    for epoch in range(epochs):
        order = generator(spec.seed, "acceptance-order", epoch).permutation(len(examples)).tolist()
        for start in range(0, len(order), batch):
            hidden, accepted = zip(*(examples[i] for i in order[start : start + batch]), strict=True)
            loss = acceptance_loss(head(torch.cat(hidden)), torch.cat(accepted), rejection_weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return head.eval().requires_grad_(False)
