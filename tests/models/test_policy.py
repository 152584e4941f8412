"""The policy's views: hidden states under padding, the reference, and what trains."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from stepkd.errors import ModelError
from stepkd.models.head import positions_from_mask
from stepkd.models.policy import Policy
from stepkd.models.spec import LoRAConfig, PolicyConfig, build_tiny

PRESET = "tiny-0.1m"
IDS = torch.tensor([[5, 17, 33, 8, 60, 4]])


def make(lora: LoRAConfig | None = None, *, dtype: Any = "float64", **settings: Any) -> Policy:
    """A tiny policy; fresh adapters are moved off zero so that they do something."""
    torch.manual_seed(0)
    policy = Policy.load(PolicyConfig(path=PRESET, dtype=dtype, lora=lora, **settings))
    if lora is not None:
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    return policy


def states(policy: Any, ids: Tensor = IDS) -> Tensor:
    return policy.hidden(ids, torch.ones_like(ids))


def loss_of(policy: Policy) -> Tensor:
    logits = policy.head(states(policy)[0, :-1])
    return torch.nn.functional.cross_entropy(logits, IDS[0, 1:])


def gradients(policy: Policy) -> dict[str, Tensor]:
    policy.zero_grad()
    loss_of(policy).backward()
    return {name: p.grad.clone() for name, p in policy.trainable_parameters() if p.grad is not None}


def test_positions_count_real_tokens() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]])
    expected = [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2], [0, 0, 0, 0, 0]]
    assert positions_from_mask(mask).tolist() == expected
    assert positions_from_mask(mask.bool()).tolist() == expected


@pytest.mark.parametrize("left", [0, 1, 5])
@pytest.mark.parametrize("right", [0, 4])
def test_padding_does_not_move_hidden_states(left: int, right: int) -> None:
    policy = make(LoRAConfig(r=4))
    padded = torch.nn.functional.pad(IDS, (left, right), value=9)
    mask = torch.nn.functional.pad(torch.ones_like(IDS), (left, right))
    batch = torch.cat([padded, padded]), torch.cat([mask, torch.zeros_like(mask)])  # the second row is all padding
    with torch.no_grad():
        hidden, expected = policy.hidden(*batch), states(policy)
    assert torch.isfinite(hidden).all()
    difference = hidden[:1, left : left + IDS.shape[1]] - expected
    assert difference.norm() <= 1e-12 * expected.norm()


def test_padded_rows_of_the_weight_are_never_seen() -> None:
    model, tokenizer = build_tiny(PRESET, seed=0)
    model.resize_token_embeddings(128)
    policy = Policy(model, tokenizer)
    assert policy.vocab_size == 100
    assert policy.head(states(policy)).shape == (1, 6, 100)


def test_end_ids_and_context() -> None:
    policy = make()
    assert policy.eos_ids == {1}
    assert policy.max_length == 1024
    policy.causal_lm.generation_config.eos_token_id = [1, 7, 500]  # 500 is beyond the vocabulary
    assert policy.eos_ids == {1, 7}
    policy.causal_lm.generation_config.eos_token_id = 9
    assert policy.eos_ids == {1, 9}


# ---- the reference -------------------------------------------------------------------------------------------------


def test_reference_is_the_base_model() -> None:
    policy, base = make(LoRAConfig(r=4)), make()
    with torch.no_grad():
        before = states(policy)
    assert not torch.allclose(before, states(base))
    with policy.reference() as reference:
        assert torch.equal(states(reference), states(base))
        assert torch.equal(reference.head(states(reference)), base.head(states(base)))
        assert not states(reference).requires_grad
    assert torch.equal(states(policy), before)


@pytest.mark.parametrize(
    "lora", [LoRAConfig(r=4, dropout=0.5), LoRAConfig(r=4, modules_to_save=["lm_head"], dropout=0.5)]
)
def test_reference_survives_exceptions_and_keeps_modes_and_gradients(lora: LoRAConfig) -> None:
    policy, base = make(lora), make()
    policy.train()
    policy.causal_lm.model.layers[0].eval()
    policy.causal_lm.model.layers[1].self_attn.attention_dropout = 0.9  # the base model's own, off in the reference
    modes = [module.training for module in policy.modules()]
    trainable = [name for name, _ in policy.trainable_parameters()]
    with pytest.raises(KeyError), policy.reference() as reference:  # noqa: PT012
        assert torch.equal(reference.head(states(reference)), base.head(states(base)))
        raise KeyError
    assert [module.training for module in policy.modules()] == modes
    assert [name for name, _ in policy.trainable_parameters()] == trainable
    assert set(gradients(policy)) == set(trainable)  # grad mode and adapter are back on


def test_a_loaded_policy_stays_in_evaluation_mode() -> None:
    policy = make(LoRAConfig(r=4, dropout=0.5))
    assert not any(module.training for module in policy.modules())
    with policy.reference():
        pass
    assert not any(module.training for module in policy.modules())


def test_reference_may_be_nested() -> None:
    policy, base = make(LoRAConfig(r=4)), make()
    with policy.reference() as outer:
        with policy.reference():
            pass
        assert torch.equal(states(outer), states(base))


def test_frozen_copy_stays_where_it_was() -> None:
    policy = make()
    names, keys = list(dict(policy.named_modules())), list(policy.state_dict())
    before = states(policy).detach()
    policy.freeze_copy()
    assert list(dict(policy.named_modules())) == names
    assert list(policy.state_dict()) == keys
    optimizer = torch.optim.SGD([p for _, p in policy.trainable_parameters()], lr=0.5)
    loss_of(policy).backward()
    optimizer.step()
    assert not torch.allclose(states(policy), before)
    with policy.reference() as reference:
        assert torch.equal(states(reference), before)
        assert not any(p.requires_grad for p in reference.parameters())  # type: ignore[attr-defined]
    policy.freeze_copy()  # a reset
    with policy.reference() as reference:
        assert torch.equal(states(reference), states(policy))
    assert all(p.requires_grad for p in policy.parameters())


def test_frozen_copy_of_adapters_wins_over_switching_them_off() -> None:
    policy = make(LoRAConfig(r=4))
    before = states(policy).detach()
    policy.freeze_copy()
    with torch.no_grad():
        for _, parameter in policy.trainable_parameters():
            parameter.zero_()
    with policy.reference() as reference:
        assert torch.equal(states(reference), before)


def test_full_training_without_a_copy_has_no_reference() -> None:
    with pytest.raises(RuntimeError, match="call freeze_copy"), make().reference():
        pass


# ---- what trains ---------------------------------------------------------------------------------------------------


def test_only_adapters_train_and_they_are_float32() -> None:
    policy = make(LoRAConfig(r=4), dtype="bfloat16")
    trainable = policy.trainable_parameters()
    assert len(trainable) == 2 * 7 * 2  # A and B of seven linear layers in two blocks
    assert all(".lora_" in name and p.dtype == torch.float32 for name, p in trainable)
    assert {p.dtype for name, p in policy.named_parameters() if ".lora_" not in name} == {torch.bfloat16}
    assert all(g.norm() > 0 for g in gradients(policy).values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "lora",
    [
        LoRAConfig(r=4, modules_to_save=["lm_head"]),
        LoRAConfig(r=4, target_modules=["q_proj", "lm_head"]),
    ],
    ids=["saved", "lora"],
)
def test_adapted_heads_train_through_the_head_function(lora: LoRAConfig, dtype: str) -> None:
    policy = make(lora, dtype=dtype)
    with torch.no_grad():
        for name, parameter in policy.trainable_parameters():
            if "lm_head" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
        expected = policy.causal_lm(input_ids=IDS, use_cache=False).logits.float()
        actual = policy.head(states(policy))
        base = policy.causal_lm.get_input_embeddings().weight  # tied to the head before it was adapted
        plain = states(policy).float() @ base.float().T
    assert torch.allclose(actual, expected, atol=1e-6)
    assert not torch.allclose(actual, plain, atol=1e-3)
    found = gradients(policy)
    assert set(found) == {name for name, _ in policy.trainable_parameters()}
    assert any("lm_head" in name for name in found)
    assert all(g.norm() > 0 for g in found.values())


@pytest.mark.parametrize("lora", [None, LoRAConfig(r=4), LoRAConfig(r=4, modules_to_save=["lm_head"])])
def test_gradient_checkpointing_changes_nothing(lora: LoRAConfig | None) -> None:
    found = []
    for on in (False, True):
        policy, calls = make(lora, gradient_checkpointing=on), list[int]()
        policy.causal_lm.model.layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        policy.train()
        found.append(gradients(policy))
        assert len(calls) == (2 if on else 1)  # once more in the backward pass
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name])


def test_a_tokenizer_of_another_model_is_refused() -> None:
    model, tokenizer = build_tiny(PRESET, seed=0)
    tokenizer.add_special_tokens({"eos_token": "<extra>"})
    with pytest.raises(ModelError, match="knows 101 ids but the model has only 100 embedding rows"):
        Policy(model, tokenizer)
