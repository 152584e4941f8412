"""Forward passes over real tokens only have the hidden states and gradients of padded ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from stepkd.data.collate import Batch, collate
from stepkd.data.completion import Completion
from stepkd.losses import token_logps
from stepkd.models.head import backbone_of, positions_from_mask
from stepkd.models.packed import is_worth_it, unpadded_hidden
from stepkd.models.policy import Policy
from stepkd.models.spec import LoRAConfig, PolicyConfig

SIZES = [[(3, 4)], [(1, 1), (5, 9)], [(4, 2), (2, 7), (6, 6), (1, 3)]]


def batch_of(sizes: list[tuple[int, int]], **layout: Any) -> Batch:
    draws = torch.Generator().manual_seed(0)
    ids = [[torch.randint(5, 100, (n,), generator=draws).tolist() for n in pair] for pair in sizes]
    examples = [Completion(p, c, id=str(i)) for i, (p, c) in enumerate(ids)]
    return collate(examples, 0, **layout)


def padded(policy: Policy, batch: Batch) -> Tensor:
    """(N, H) by transformers' own padded pass."""
    mask = batch.attention_mask_BT
    states = backbone_of(policy.causal_lm)(
        input_ids=batch.input_ids_BT, attention_mask=mask, position_ids=positions_from_mask(mask), use_cache=False
    ).last_hidden_state
    return states.flatten(0, 1)[batch.needed_N]


def unpadded(policy: Policy, batch: Batch) -> Tensor:
    """(N, H) without padding."""
    states = unpadded_hidden(policy.causal_lm, batch.input_ids_BT, batch.attention_mask_BT)
    return states.flatten(0, 1)[batch.needed_N]


def gradients(policy: Policy, hidden_NH: Tensor, batch: Batch) -> Tensor:
    weights = torch.linspace(-1, 1, len(batch.targets_N), dtype=hidden_NH.dtype)
    policy.zero_grad()
    (weights * token_logps(policy.head, hidden_NH, batch.targets_N)).sum().backward()
    found = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
    policy.zero_grad()
    return found


@pytest.mark.parametrize("name", ["tiny-0.1m", "qwen2", "gpt2", "mistral"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_states_and_gradients_equal_those_of_padded_rows(name: str, sizes: Any, policy_of: Any, close: Any) -> None:
    policy = policy_of(name)
    assert policy.can_unpad
    plain = batch_of(sizes)
    expected = padded(policy, plain)
    wanted = gradients(policy, expected, plain)
    for layout in ({}, {"padding_side": "left"}, {"pad_to": 30}, {"pad_to": 30, "padding_side": "left"}):
        batch = batch_of(sizes, **layout)
        hidden = unpadded(policy, batch)
        close(hidden, expected)
        close(gradients(policy, hidden, batch), wanted)


def test_the_policy_goes_without_padding_where_there_is_some(policy_of: Any) -> None:
    """Seen at the rows that reach the backbone: real tokens of all rows in one, or the rows as they are."""
    policy = policy_of("tiny-0.1m")
    assert policy.can_unpad  # the probe, before anything is counted
    shapes = []
    embeddings = policy.causal_lm.get_input_embeddings()
    handle = embeddings.register_forward_pre_hook(lambda _, given: shapes.append(tuple(given[0].shape)))
    uneven, even = batch_of([(3, 4), (5, 9)]), batch_of([(3, 4), (5, 2)])
    for batch in (uneven, even):
        policy.hidden(batch.input_ids_BT, batch.attention_mask_BT)
    handle.remove()
    assert shapes == [(1, 21), (2, 7)]
    assert is_worth_it(uneven.attention_mask_BT)
    assert not is_worth_it(even.attention_mask_BT)


@pytest.mark.parametrize("name", ["qwen2, windows", "gemma2", "gpt-neo", "falcon, alibi", "bloom", "mamba"])
def test_other_architectures_keep_their_padding(name: str, policy_of: Any) -> None:
    policy = policy_of(name, "eager" if name in ("gemma2", "gpt-neo", "bloom", "mamba") else "sdpa")
    assert not policy.can_unpad


def test_eager_attention_keeps_its_padding(policy_of: Any) -> None:
    assert not policy_of("tiny-0.1m", "eager", torch.float32).can_unpad


@pytest.mark.parametrize("name", ["falcon, alibi", "bloom"])
def test_the_probe_alone_refuses_biases_by_distance(name: str, policy_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models whose layers never ask for sdpa by name, were they to claim it."""
    policy = policy_of(name, "eager" if name == "bloom" else "sdpa")
    monkeypatch.setattr(type(policy.causal_lm.config), "_attn_implementation", "sdpa", raising=False)
    from stepkd.models.packed import check_unpadded

    assert not check_unpadded(policy.causal_lm)


def test_a_pass_of_neighbours_leaks_nothing(policy_of: Any) -> None:
    """Another first row leaves the second row's states bit for bit as they were."""
    policy = policy_of("tiny-0.1m")
    one = batch_of([(4, 3), (2, 8)])
    ids = one.input_ids_BT.clone()
    ids[0, :7] = (ids[0, :7] + 11) % 90
    with torch.no_grad():
        states = [unpadded_hidden(policy.causal_lm, each, one.attention_mask_BT) for each in (one.input_ids_BT, ids)]
    assert torch.equal(states[0][1], states[1][1])
    assert not torch.equal(states[0][0], states[1][0])


def test_gradient_checkpointing_recomputes_the_same_rows() -> None:
    policy = Policy.load(PolicyConfig(path="tiny-0.1m", dtype="float64", lora=LoRAConfig(r=2)))
    batch = batch_of(SIZES[-1])
    policy.train()
    wanted = gradients(policy, padded(policy, batch), batch)
    policy.model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    policy.model.enable_input_require_grads()
    hidden = policy.hidden(batch.input_ids_BT, batch.attention_mask_BT).flatten(0, 1)[batch.needed_N]
    found = gradients(policy, hidden, batch)
    assert float((found - wanted).norm()) <= 1e-6 * float(wanted.norm())  # transformers' float32 in RMSNorm


def test_attention_elsewhere_is_what_it_was(policy_of: Any) -> None:
    """The registered function passes on what it is given, and is registered once."""
    assert policy_of("tiny-0.1m").can_unpad
    first = ALL_ATTENTION_FUNCTIONS["sdpa"]
    assert policy_of("qwen2").can_unpad
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is first
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    policy = policy_of("tiny-0.1m")
    layer = policy.causal_lm.model.layers[0].self_attn
    draws = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, n, 5, 4, generator=draws, dtype=torch.float64) for n in (4, 4, 4))
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
    ours, theirs = (f(layer, query, key, value, mask, scaling=0.3)[0] for f in (first, sdpa_attention_forward))
    assert torch.equal(ours, theirs)
