"""Models sharded over two ranks: memory, gathering, what cannot be cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import forked
import pytest
import torch

from stepkd.errors import ConfigError
from stepkd.models.policy import Policy
from stepkd.models.sharding import blocks_of, gathered, shard, share_of, whole_tensor
from stepkd.models.spec import PolicyConfig, build_tiny

WORKER = Path(__file__).with_name("shard_worker.py")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two ranks saw of a model of 80 MB."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("model")
    model, tokenizer = build_tiny("tiny-0.1m", seed=0, dtype="float32")
    config = LlamaConfig(
        vocab_size=model.config.vocab_size,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=6,
        num_attention_heads=8,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    done = forked.run([str(folder)], ranks=2, script=WORKER, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return sorted(found, key=lambda each: each["rank"])


def test_no_rank_holds_a_whole_copy(ranks: list[dict[str, Any]]) -> None:
    """Weights stored in their own dtype are mapped from the file, which all ranks share, until each takes its half."""
    for seen in ranks:
        assert seen["bytes"] > 70e6
        assert seen["loaded"] < 0.3 * seen["bytes"]
        assert seen["sharded"] < 0.8 * seen["bytes"]


def test_halves_make_the_whole(ranks: list[dict[str, Any]]) -> None:
    for seen in ranks:
        assert seen["parts"]
        assert seen["whole"]
        assert seen["share"]


def test_ranks_do_different_work_in_a_gathered_block(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["gap"] < 1e-4
    assert "gap" not in ranks[1]
    assert all(seen["again"] for seen in ranks)


def test_mixed_precision_gathers_in_bfloat16(ranks: list[dict[str, Any]]) -> None:
    for seen in ranks:
        assert seen["gathered"] == ["torch.bfloat16"]
        assert seen["kept"] == ["torch.float32"]


def test_what_cannot_be_cut() -> None:
    policy = Policy.load(PolicyConfig(path="tiny-0.1m"))
    assert len(blocks_of(policy.causal_lm)) == policy.causal_lm.config.num_hidden_layers
    policy.model.register_parameter("packed", torch.nn.Parameter(torch.zeros(2, dtype=torch.uint8), False))
    mesh: Any = None
    with pytest.raises(ConfigError, match=r"quantised weights \(torch.uint8\) cannot be sharded"):
        shard(policy, mesh)
    policy.causal_lm._no_split_modules = None
    with pytest.raises(ConfigError, match=r"does not say which modules are its blocks"):
        blocks_of(policy.causal_lm)


def test_nothing_happens_to_a_whole_model() -> None:
    policy = Policy.load(PolicyConfig(path="tiny-0.1m"))
    parameter = next(policy.parameters())
    with gathered(policy):
        assert next(policy.parameters()) is parameter
    assert whole_tensor(parameter) is parameter
    assert share_of(parameter, parameter) is parameter
