"""Training mode computes what evaluation mode does, whatever a model calls what is random in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from stepkd.errors import ModelError
from stepkd.models.head import backbone_of, disable_dropout
from stepkd.models.policy import Policy
from stepkd.models.spec import LoRAConfig, PolicyConfig

IDS = torch.arange(1, 25).view(2, 12)
PLAIN: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL: dict[str, Any] = PLAIN | {"intermediate_size": 48, "num_key_value_heads": 2}
MODELS: dict[str, Any] = {
    "starcoder2": lambda t: t.Starcoder2Config(
        **SMALL, sliding_window=None, residual_dropout=0.1, embedding_dropout=0.1, attention_dropout=0.1
    ),
    "opt, layers": lambda t: t.OPTConfig(**PLAIN, ffn_dim=48, word_embed_proj_dim=32, layerdrop=0.5, dropout=0.0),
    "falcon": lambda t: t.FalconConfig(**PLAIN, hidden_dropout=0.1, attention_dropout=0.1),
    "mixtral, router": lambda t: t.MixtralConfig(**SMALL, num_local_experts=4, router_jitter_noise=0.05),
    "persimmon": lambda t: t.PersimmonConfig(**PLAIN, intermediate_size=48, attention_dropout=0.1),
    "xglm, layers": lambda t: t.XGLMConfig(d_model=32, ffn_dim=48, num_layers=4, attention_heads=4, layerdrop=0.5),
    "phi3": lambda t: t.Phi3Config(**SMALL, resid_pdrop=0.1, embd_pdrop=0.1, attention_dropout=0.1),
    "bloom": lambda t: t.BloomConfig(hidden_size=32, n_layer=2, n_head=4, hidden_dropout=0.1),
    "gpt2": lambda t: t.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=32),
    "phimoe": lambda t: t.PhimoeConfig(**SMALL, num_local_experts=4, input_jitter_noise=0.1, attention_dropout=0.1),
}


def made(name: str) -> Any:
    config = MODELS[name](transformers)
    config.update(
        {"vocab_size": 100, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def states(model: Any) -> Tensor:
    return backbone_of(model)(input_ids=IDS, use_cache=False).last_hidden_state


@pytest.mark.parametrize("name", [name for name in MODELS if name != "phimoe"])
def test_training_mode_becomes_evaluation_mode(name: str) -> None:
    model = made(name)
    expected = states(model)
    model.train()
    assert max(float((states(model) - expected).norm() / expected.norm()) for _ in range(4)) > 1e-3
    assert disable_dropout(model)
    assert all(module.training for module in model.modules())
    for _ in range(4):
        assert (states(model) - expected).norm() <= 1e-6 * expected.norm()
    assert torch.equal(states(model.eval()), expected)
    assert not disable_dropout(model)


def test_an_adapter_drops_nothing_and_modes_stay() -> None:
    policy = Policy.load(PolicyConfig(path="tiny-0.1m", lora=LoRAConfig(r=4, dropout=0.5)))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    policy.causal_lm.model.layers[1].train()
    modes = [module.training for module in policy.modules()]
    assert disable_dropout(policy.causal_lm)
    assert [module.training for module in policy.modules()] == modes
    expected = states(policy.eval().causal_lm)
    assert torch.equal(states(policy.train().causal_lm), expected)


def test_experts_drawn_at_random_are_refused() -> None:
    with pytest.raises(ModelError, match=r"rates at 0, PhimoeForCausalLM computes something else"):
        disable_dropout(made("phimoe"))


@pytest.mark.parametrize("noise", [torch.randn_like, torch.ones_like], ids=["random", "another rule"])
def test_what_no_rate_explains_is_refused(noise: Any) -> None:
    model = Policy.load(PolicyConfig(path="tiny-0.1m")).model
    layer = model.model.layers[1].mlp

    def noisy(module: Any, arguments: Any, output: Tensor) -> Tensor | None:
        return output + 0.01 * noise(output) if module.training else None

    layer.register_forward_hook(noisy)
    with pytest.raises(ModelError, match="else in training mode: this method"):
        disable_dropout(model)
    assert not model.training
