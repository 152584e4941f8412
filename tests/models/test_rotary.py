"""Rotary scalings that change with the longest sequence of a batch: they stay on one side of the change."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, Phi3Config, Phi3ForCausalLM

from stepkd.errors import DataError
from stepkd.losses import token_logps
from stepkd.models import head
from stepkd.models.policy import Policy
from stepkd.models.spec import tiny_tokenizer
from stepkd.sampling.engine import SamplingConfig
from stepkd.sampling.transformers_engine import TransformersEngine

SWITCH = 24


def phi3(long_factor: float = 8.0) -> Policy:
    """LongRoPE that changes over after 24 tokens of 96, sure of its tokens."""
    settings: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = Phi3Config(
        **settings,
        vocab_size=100,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=96,
        original_max_position_embeddings=SWITCH,
        rope_scaling={"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [long_factor] * 4},
        pad_token_id=0,
        eos_token_id=1,
        initializer_range=0.3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Policy(Phi3ForCausalLM(config).eval(), tiny_tokenizer())


def ids(rows: int, length: int) -> torch.Tensor:
    return torch.randint(2, 100, (rows, length), generator=torch.Generator().manual_seed(length))


def shares_a_batch_with(policy: Policy, length: int) -> float:
    """How far the states of a short row move when a row of this length is read beside it."""
    short = ids(1, 10)
    batch, mask = torch.zeros(2, length, dtype=torch.long), torch.zeros(2, length, dtype=torch.long)
    batch[0, :10], mask[0, :10] = short[0], 1
    batch[1], mask[1] = ids(1, length)[0], 1
    with torch.no_grad():
        alone = policy.hidden(short, torch.ones_like(short))
        return float((policy.hidden(batch, mask)[:1, :10] - alone).norm() / alone.norm())


def test_the_context_ends_where_the_scaling_changes() -> None:
    policy = phi3()
    assert policy.max_length == SWITCH
    assert shares_a_batch_with(policy, SWITCH) < 1e-5
    assert shares_a_batch_with(policy, SWITCH + 1) > 1e-3  # what is kept out


def test_the_shorter_context_is_told_with_the_way_out(caplog: pytest.LogCaptureFixture) -> None:
    phi3()
    assert "longer than 24 tokens: that is its context here" in caplog.text
    assert "long_factor over its short_factor" in caplog.text
    caplog.clear()
    phi3(long_factor=1.0)
    assert not caplog.text


def test_long_frequencies_at_every_length_are_steady() -> None:
    policy = phi3(long_factor=1.0)
    assert policy.max_length == 96
    assert shares_a_batch_with(policy, 90) < 1e-5


def test_a_sampler_stays_before_the_change_and_agrees_with_the_trainer() -> None:
    policy = phi3()
    prompts = [row.tolist() for row in (*ids(2, 20), *ids(2, 5))]
    drawn = TransformersEngine(policy).generate(prompts, SamplingConfig(max_new_tokens=60))
    for prompt, (completion,) in zip(prompts, drawn, strict=True):
        assert len(prompt) + len(completion.token_ids) <= SWITCH
        row = torch.tensor([[*prompt, *completion.token_ids]])
        with torch.no_grad():
            hidden = policy.hidden(row, torch.ones_like(row))[0, len(prompt) - 1 : -1]
            logps = token_logps(policy.head, hidden, torch.tensor(completion.token_ids))
        assert (logps - torch.from_numpy(completion.raw_logprobs)).abs().max() <= 1e-3
    with pytest.raises(DataError, match="has 30 tokens and the model's context is 24"):
        TransformersEngine(policy).generate([list(range(2, 32))], SamplingConfig())


def test_scalings_of_single_layers_and_steady_ones() -> None:
    scaling = {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}
    of_layers = {
        "full_attention": scaling | {"original_max_position_embeddings": 50},
        "other": {"rope_type": "default"},
    }
    assert head.steady_length(SimpleNamespace(rope_parameters=of_layers)) == 50
    assert head.steady_length(LlamaConfig(rope_scaling={"rope_type": "linear", "factor": 2.0})) is None
    assert head.steady_length(SimpleNamespace()) is None
