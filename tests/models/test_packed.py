"""Completions of one prompt in one row have the hidden states, log-probabilities and gradients of separate rows."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from stepkd.data.collate import Pack, PackedBatch, Unit, collate_packed
from stepkd.data.completion import Completion
from stepkd.data.encode import Example
from stepkd.losses import token_logps
from stepkd.models.packed import packed_mask
from stepkd.models.policy import Policy
from stepkd.models.spec import LoRAConfig, PolicyConfig, build_tiny, tiny_tokenizer


def packs_of(sizes: list[list[int]], prompts: list[int], seed: int = 0) -> list[Pack]:
    """Packs of random ids: completion lengths per pack, and prompt lengths."""
    draws = torch.Generator().manual_seed(seed)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(5, 100, (n,), generator=draws).tolist())

    packs = []
    for lengths, prompt in zip(sizes, prompts, strict=True):
        shared = ids(prompt)
        completions = [Completion(shared, own) for own in map(ids, lengths)]
        packs.append([Unit(Example("e", shared, tuple(c.token_ids), c.spans), (c,)) for c in completions])
    return packs


def batch_states(policy: Any, batch: PackedBatch) -> Tensor:
    return policy.hidden(
        batch.input_ids_BT, batch.attention_mask_BT, batch.position_ids_BT, segments_BT=batch.segments_BT
    )


def packed_states(policy: Any, batch: PackedBatch) -> Tensor:
    """(N, H) states that predict the targets."""
    return batch_states(policy, batch).flatten(0, 1)[batch.needed_N]


def separate_states(policy: Any, packs: list[Pack]) -> Tensor:
    """The same, each completion in a batch of its own without any padding or mask of ours."""
    parts = []
    for each in (c for pack in packs for unit in pack for c in unit.completions):
        ids = torch.tensor([[*each.prompt_ids, *each.token_ids]])
        parts.append(policy.hidden(ids, torch.ones_like(ids))[0, len(each.prompt_ids) - 1 : -1])
    return torch.cat(parts)


PACKABLE = [
    *((name, "sdpa", torch.float64) for name in ("tiny-0.1m", "qwen2", "gpt2", "mistral")),
    *((name, "eager", torch.float32) for name in ("tiny-0.1m", "qwen2", "gpt2")),  # its softmax is float32 anyway
]
SHAPES = [
    ([[4]], [3]),
    ([[3, 5]], [6]),
    ([[1, 1, 1]], [1]),
    ([[2, 9, 4], [6]], [5, 12]),
    ([[3, 1, 7, 2, 5], [4, 4], [8]], [9, 1, 4]),
]
PLACES: list[tuple[Any, int | None]] = [("right", None), ("left", None), ("right", 50), ("left", 50)]


@pytest.mark.parametrize(("name", "attention", "dtype"), PACKABLE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packed_rows_equal_separate_rows(
    name: str, attention: str, dtype: torch.dtype, shape: Any, policy_of: Any, close: Any
) -> None:
    policy = policy_of(name, attention, dtype)
    assert policy.can_pack
    packs = packs_of(*shape)
    with torch.no_grad():
        expected = separate_states(policy, packs)
        for side, pad_to in PLACES:
            batch = collate_packed(packs, 0, padding_side=side, pad_to=pad_to)
            hidden = packed_states(policy, batch)
            close(hidden, expected, dtype)
            ours, theirs = (token_logps(policy.head, states, batch.targets_N) for states in (hidden, expected))
            close(ours, theirs, dtype)


@pytest.mark.parametrize("name", ["tiny-0.1m", "qwen2", "gpt2"])
@pytest.mark.parametrize(("side", "pad_to"), PLACES)
def test_gradients_equal_those_of_separate_rows(
    name: str, side: Any, pad_to: int | None, policy_of: Any, close: Any
) -> None:
    policy = policy_of(name)
    packs = packs_of([[2, 7, 4], [6, 3], [5]], [5, 9, 2])
    batch = collate_packed(packs, 0, padding_side=side, pad_to=pad_to)
    weights = torch.randn(len(batch.targets_N), dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def gradients(hidden: Tensor) -> Tensor:
        policy.zero_grad()
        (weights * token_logps(policy.head, hidden, batch.targets_N)).sum().backward()
        found = [p.grad.clone() for p in policy.parameters() if p.grad is not None]
        policy.zero_grad()
        return torch.cat([grad.flatten() for grad in found])

    close(gradients(packed_states(policy, batch)), gradients(separate_states(policy, packs)))


def test_the_comparison_sees_a_leak(policy_of: Any) -> None:
    """Without the mask, or with positions that count on through the row, states are far away."""
    policy, packs = policy_of("tiny-0.1m"), packs_of([[3, 5]], [6])
    batch = collate_packed(packs, 0)
    with torch.no_grad():
        expected = separate_states(policy, packs)
        unmasked = policy.hidden(batch.input_ids_BT, batch.attention_mask_BT, batch.position_ids_BT)
        counted = policy.hidden(
            batch.input_ids_BT,
            batch.attention_mask_BT,
            torch.arange(batch.input_ids_BT.shape[1])[None],
            segments_BT=batch.segments_BT,
        )
    for wrong in (unmasked, counted):
        assert (wrong.flatten(0, 1)[batch.needed_N] - expected).norm() > 1e-2 * expected.norm()


@pytest.mark.parametrize(("name", "attention", "dtype"), PACKABLE, ids=str)
def test_neighbours_change_nothing(name: str, attention: str, dtype: torch.dtype, policy_of: Any, close: Any) -> None:
    """Another second completion moves neither the first nor the third, whatever follows or precedes them."""
    policy = policy_of(name, attention, dtype)
    packs = packs_of([[4, 5, 6]], [3])
    other = packs_of([[4, 5, 6]], [3], seed=1)[0][1].completions[0]
    changed = Completion(packs[0][0].completions[0].prompt_ids, other.token_ids)
    replaced = [[packs[0][0], Unit(packs[0][1].example, (changed,)), packs[0][2]]]
    with torch.no_grad():
        before, after = (packed_states(policy, collate_packed(each, 0)) for each in (packs, replaced))
    same = torch.tensor([True] * 4 + [False] * 5 + [True] * 6)
    close(after[same], before[same], dtype)
    assert (after[~same] - before[~same])[1:].norm() > 1e-2 * before[~same].norm()


@pytest.mark.parametrize(("name", "attention", "dtype"), PACKABLE, ids=str)
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_is_never_nan(
    name: str, attention: str, dtype: torch.dtype, side: Any, policy_of: Any, close: Any
) -> None:
    """Neither its states nor what its tokens are: gradients of a NaN times zero would be NaN."""
    policy = policy_of(name, attention, dtype)
    packs = packs_of([[3, 2], [1, 1]], [8, 1])
    with torch.no_grad():
        found = [batch_states(policy, collate_packed(packs, pad, padding_side=side, pad_to=40)) for pad in (0, 77)]
    assert all(torch.isfinite(hidden).all() for hidden in found)
    needed = collate_packed(packs, 0, padding_side=side, pad_to=40).needed_N
    close(found[1].flatten(0, 1)[needed], found[0].flatten(0, 1)[needed], dtype)


def test_mask_written_out(policy_of: Any) -> None:
    segments = torch.tensor([[-1, -1, 0, 0, 1, 2, 2]])
    policy = policy_of("tiny-0.1m")
    expected = [
        [1, 0, 0, 0, 0, 0, 0],  # padding sees itself alone
        [0, 1, 0, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0, 0],
        [0, 0, 1, 1, 0, 0, 0],
        [0, 0, 1, 1, 1, 0, 0],
        [0, 0, 1, 1, 0, 1, 0],
        [0, 0, 1, 1, 0, 1, 1],
    ]
    mask = packed_mask(policy.causal_lm, segments)
    assert mask.dtype == torch.bool
    assert mask[0, 0].int().tolist() == expected
    added = packed_mask(policy_of("tiny-0.1m", "eager", torch.float32).causal_lm, segments)
    assert added.dtype == torch.float32
    assert torch.equal(added == 0, mask)
    assert set(added[~mask].tolist()) == {torch.finfo(torch.float32).min}


# ---- views ----------------------------------------------------------------------------------------------------------


def test_adapters_and_their_reference_read_packed_rows(close: Any) -> None:
    torch.manual_seed(0)
    policy = Policy.load(PolicyConfig(path="tiny-0.1m", dtype="float64", lora=LoRAConfig(r=4)))
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    assert policy.can_pack
    packs = packs_of([[2, 9, 4], [6]], [5, 12])
    batch = collate_packed(packs, 0)
    with torch.no_grad():
        adapted = packed_states(policy, batch)
        close(adapted, separate_states(policy, packs))
    with policy.reference() as view:
        plain = packed_states(view, batch)
        close(plain, separate_states(view, packs))
    assert (adapted - plain).norm() > 1e-2 * plain.norm()


def test_half_precision_can_pack() -> None:
    model, tokenizer = build_tiny("tiny-0.1m", seed=0, dtype="bfloat16")
    assert Policy(model, tokenizer).can_pack


def test_looking_leaves_the_model_as_it_was(policy_of: Any) -> None:
    """In training mode with dropout the probe still compares like with like."""
    import transformers

    settings = deepcopy(policy_of("gpt2").causal_lm.config)
    settings.update({"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5})
    model = transformers.AutoModelForCausalLM.from_config(settings, attn_implementation="sdpa").train()
    policy = Policy(model, tiny_tokenizer(), verify_head=False)
    state = torch.get_rng_state()
    assert policy.can_pack
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


# ---- models that cannot ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        ("qwen2, windows", "sdpa"),
        ("qwen2, windows", "eager"),
        ("mistral, windows", "sdpa"),
        ("mistral, windows", "eager"),
        ("gemma2", "eager"),
        ("gpt-neo", "eager"),  # its windows are long enough to hide from a short probe
        ("falcon, alibi", "sdpa"),
        ("bloom", "eager"),
        ("mamba", "eager"),
    ],
)
def test_models_with_masks_or_positions_of_their_own_are_refused(name: str, attention: str, policy_of: Any) -> None:
    assert not policy_of(name, attention, torch.float32).can_pack


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
def test_attention_that_takes_no_such_mask_is_refused(attention: str) -> None:
    model, tokenizer = build_tiny("tiny-0.1m", seed=0)
    policy = Policy(model, tokenizer)
    model.config._attn_implementation = attention
    assert not policy.can_pack
