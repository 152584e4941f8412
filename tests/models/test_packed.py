"""Rows that begin alike have the hidden states, log-probabilities and gradients of separate rows, and cost less."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from stepkd.data.collate import Batch, collate, plan
from stepkd.data.completion import Completion
from stepkd.data.encode import Encoder
from stepkd.data.feedback import PairEncoder
from stepkd.data.templates import get_template
from stepkd.losses import token_logps
from stepkd.models import packed
from stepkd.models.policy import Policy
from stepkd.models.spec import LoRAConfig, PolicyConfig, build_tiny, tiny_tokenizer
from stepkd.steps.segment import get_segmenter
from stepkd.tasks.rows import Noise, make_rows

DRAWS = torch.Generator()


def random_ids(n: int) -> tuple[int, ...]:
    return tuple(torch.randint(5, 100, (n,), generator=DRAWS).tolist())


def examples_of(sizes: list[list[int]], prompts: list[int], seed: int = 0) -> list[Completion]:
    """Examples of random ids: completion lengths per prompt, and prompt lengths."""
    DRAWS.manual_seed(seed)
    shared = [random_ids(prompt) for prompt in prompts]
    return [Completion(prompt, random_ids(n)) for prompt, lengths in zip(shared, sizes, strict=True) for n in lengths]


def states(policy: Any, batch: Batch) -> Tensor:
    """(N, H) states that predict the targets."""
    hidden: Tensor = policy.hidden(batch.input_ids_BT, batch.attention_mask_BT, batch.shared_BT)
    return hidden.flatten(0, 1)[batch.needed_N]


def separate_states(policy: Any, examples: list[Completion]) -> Tensor:
    """The same, each completion in a batch of its own without any padding or mask of ours."""
    parts = []
    for each in (completion for example in examples for completion in example.completions):
        ids = torch.tensor([[*each.prompt_ids, *each.token_ids]])
        parts.append(policy.hidden(ids, torch.ones_like(ids))[0, len(each.prompt_ids) - 1 : -1])
    return torch.cat(parts)


def tokens_computed(policy: Any, batch: Batch) -> int:
    """How many tokens the model's layers see in a forward pass."""
    assert policy.can_unpad  # the probe, before anything is counted
    seen = []
    embeddings = policy.causal_lm.get_input_embeddings()
    handle = embeddings.register_forward_pre_hook(lambda _, given: seen.append(given[0].numel()))
    with torch.no_grad():
        states(policy, batch)
    handle.remove()
    return sum(seen)


NAMES = ["tiny-0.1m", "qwen2", "gpt2", "mistral"]
SHAPES = [
    ([[4]], [3]),
    ([[3, 5]], [6]),
    ([[1, 1, 1]], [1]),
    ([[2, 9, 4], [6]], [5, 12]),
    ([[3, 1, 7, 2, 5], [4, 4], [8]], [9, 1, 4]),
]
PLACES: list[tuple[Any, int | None]] = [("right", None), ("left", None), ("right", 50), ("left", 50)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shared_prompts_equal_separate_rows(name: str, shape: Any, policy_of: Any, close: Any) -> None:
    policy = policy_of(name)
    examples = examples_of(*shape)
    with torch.no_grad():
        expected = separate_states(policy, examples)
        for side, pad_to in PLACES:
            batch = collate(examples, 0, share=True, padding_side=side, pad_to=pad_to)
            hidden = states(policy, batch)
            close(hidden, expected)
            ours, theirs = (token_logps(policy.head, each, batch.targets_N) for each in (hidden, expected))
            close(ours, theirs)


@pytest.mark.parametrize("name", ["tiny-0.1m", "qwen2", "gpt2"])
@pytest.mark.parametrize(("side", "pad_to"), PLACES)
def test_gradients_equal_those_of_separate_rows(
    name: str, side: Any, pad_to: int | None, policy_of: Any, close: Any
) -> None:
    """Also where completions begin alike, and where a token stands in five rows."""
    policy = policy_of(name)
    examples = examples_of([[2, 7, 4, 1, 3], [6, 3], [5]], [5, 9, 2], seed=2)
    first, second = examples[5], examples[6]
    examples[6] = Completion(second.prompt_ids, (*first.token_ids[:4], *second.token_ids))
    batch = collate(examples, 0, share=True, padding_side=side, pad_to=pad_to)
    weights = torch.randn(len(batch.targets_N), dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def gradients(hidden: Tensor) -> Tensor:
        policy.zero_grad()
        (weights * token_logps(policy.head, hidden, batch.targets_N)).sum().backward()
        found = [p.grad.clone() for p in policy.parameters() if p.grad is not None]
        policy.zero_grad()
        return torch.cat([grad.flatten() for grad in found])

    close(gradients(states(policy, batch)), gradients(separate_states(policy, examples)))
    unique = sum([5 + 2 + 7 + 4 + 1 + 3, 9 + 6 + 3, 2 + 5])
    assert tokens_computed(policy, batch) == unique, "a prompt, and what completions begin with alike, once"


def test_the_comparison_sees_states_of_another_prompt(policy_of: Any) -> None:
    """A place that takes over the state of another token is far away."""
    policy, examples = policy_of("tiny-0.1m"), examples_of([[3, 5]], [6])
    batch = collate(examples, 0, share=True)
    assert batch.shared_BT is not None
    with torch.no_grad():
        expected = separate_states(policy, examples)
        incorrect_BT = batch.shared_BT.clone()
        incorrect_BT[1, 3] = incorrect_BT[1, 2]
        hidden = policy.hidden(batch.input_ids_BT, batch.attention_mask_BT, incorrect_BT)
    assert (hidden.flatten(0, 1)[batch.needed_N] - expected).norm() > 1e-2 * expected.norm()


@pytest.mark.parametrize("name", NAMES)
def test_neighbours_change_nothing(name: str, policy_of: Any, close: Any) -> None:
    """Another second completion moves neither the first nor the third, whatever follows or precedes them."""
    policy = policy_of(name)
    examples = examples_of([[4, 5, 6]], [3])
    other = examples_of([[4, 5, 6]], [3], seed=1)[1]
    replaced = [examples[0], Completion(examples[0].prompt_ids, other.token_ids), examples[2]]
    with torch.no_grad():
        before, after = (states(policy, collate(each, 0, share=True)) for each in (examples, replaced))
    same = torch.tensor([True] * 4 + [False] * 5 + [True] * 6)
    close(after[same], before[same])
    assert (after[~same] - before[~same])[1:].norm() > 1e-2 * before[~same].norm()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_is_never_nan(name: str, side: Any, policy_of: Any, close: Any) -> None:
    """Neither its states nor what its tokens are: gradients of a NaN times zero would be NaN."""
    policy = policy_of(name)
    examples = examples_of([[3, 2], [1, 1]], [8, 1])
    layout: dict[str, Any] = {"share": True, "padding_side": side, "pad_to": 40}
    with torch.no_grad():
        batches = [collate(examples, pad, **layout) for pad in (0, 77)]
        hidden = [policy.hidden(b.input_ids_BT, b.attention_mask_BT, b.shared_BT) for b in batches]
    assert all(torch.isfinite(each).all() for each in hidden)
    close(*(each.flatten(0, 1)[batches[0].needed_N] for each in reversed(hidden)))


# ---- what it costs --------------------------------------------------------------------------------------------------


def mixed_pairs(count: int) -> list[Completion]:
    """Pairs of solutions of the tiny world, short and long ones, some of which begin alike."""
    tokenizer, template, segmenter = tiny_tokenizer(), get_template("task"), get_segmenter("newline")
    noisy = [
        make_rows("modular:terms=2-8", count, seed=5, noise=Noise(rate=0.3, seed=k, kind="systematic")) for k in (0, 1)
    ]
    rows = [
        {"id": a["id"], "prompt": a["prompt"], "chosen": a["solution"], "rejected": b["solution"]}
        for a, b in zip(*noisy, strict=True)
        if a["solution"] != b["solution"]
    ]
    return list(PairEncoder(tokenizer, template, segmenter).examples(rows))


def random_lengths(count: int) -> list[Completion]:
    """Two to five completions of every prompt, of any length."""
    DRAWS.manual_seed(7)
    sizes = torch.randint(1, 120, (count, 6), generator=DRAWS).tolist()
    return examples_of([row[: 2 + row[0] % 4] for row in sizes], [row[5] for row in sizes])


@pytest.mark.parametrize("examples", [mixed_pairs(60), random_lengths(30)], ids=["mixed pairs", "random lengths"])
@pytest.mark.parametrize("max_tokens", [600, 8192])
def test_padding_is_at_most_a_tenth_and_no_more_is_computed_than_in_plain_rows(
    examples: list[Completion], max_tokens: int, policy_of: Any
) -> None:
    """Measured at the tokens that the layers see, over all micro-batches of a step."""
    policy = policy_of("tiny-0.1m")
    groups = plan(examples, max_tokens, share=True)
    cost = sum(tokens_computed(policy, collate(group, 0, share=True)) for group in groups)
    prompts, plain = 0, 0
    own = sum(len(completion.token_ids) for example in examples for completion in example.completions)
    for group in groups:
        prompts += sum(map(len, {tuple(example.prompt_ids) for example in group}))
    for group in plan(examples, max_tokens):
        rows = [completion.length for example in group for completion in example.completions]
        plain += len(rows) * max(rows)
    assert cost <= 1.1 * (prompts + own)
    assert cost < plain
    assert cost <= prompts + own, "beginnings that completions have in common are computed once, too"


def test_a_batch_without_shared_prompts_is_computed_as_it_was(policy_of: Any) -> None:
    rows = make_rows("modular:terms=2-5", 6, seed=3)
    examples = Encoder(tiny_tokenizer(), get_template("task"), get_segmenter("newline")).examples(rows)
    policy = policy_of("tiny-0.1m")
    with torch.no_grad():
        assert torch.equal(*(states(policy, collate(examples, 0, share=share)) for share in (True, False)))


# ---- views ----------------------------------------------------------------------------------------------------------


def test_adapters_and_their_reference_share_prompts(close: Any) -> None:
    torch.manual_seed(0)
    policy = Policy.load(PolicyConfig(path="tiny-0.1m", dtype="float64", lora=LoRAConfig(r=4)))
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    examples = examples_of([[2, 9, 4], [6]], [5, 12])
    batch = collate(examples, 0, share=True)
    with torch.no_grad():
        adapted = states(policy, batch)
        close(adapted, separate_states(policy, examples))
    with policy.reference() as view:
        plain = states(view, batch)
        close(plain, separate_states(view, examples))
    assert (adapted - plain).norm() > 1e-2 * plain.norm()


def test_gradient_checkpointing_recomputes_shared_prompts() -> None:
    policy = Policy.load(PolicyConfig(path="tiny-0.1m", dtype="float64", lora=LoRAConfig(r=2)))
    examples = examples_of([[2, 9, 4], [6]], [5, 12])
    batch = collate(examples, 0, share=True)

    def gradients() -> Tensor:
        policy.zero_grad()
        token_logps(policy.head, states(policy, batch), batch.targets_N).sum().backward()
        return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])

    policy.train()
    wanted = gradients()
    policy.model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    policy.model.enable_input_require_grads()
    found = gradients()
    assert float((found - wanted).norm()) <= 1e-9 * float(wanted.norm())


def test_half_precision_can_share() -> None:
    model, tokenizer = build_tiny("tiny-0.1m", seed=0, dtype="bfloat16")
    assert Policy(model, tokenizer).can_unpad


def test_looking_leaves_the_model_as_it_was(policy_of: Any) -> None:
    """In training mode with dropout the probe still compares like with like."""
    import transformers

    settings = deepcopy(policy_of("gpt2").causal_lm.config)
    settings.update({"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5})
    model = transformers.AutoModelForCausalLM.from_config(settings, attn_implementation="sdpa").train()
    policy = Policy(model, tiny_tokenizer(), verify_head=False)
    state = torch.get_rng_state()
    assert policy.can_unpad
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
        ("tiny-0.1m", "eager"),
    ],
)
def test_other_models_compute_plain_rows(name: str, attention: str, policy_of: Any) -> None:
    policy = policy_of(name, attention, torch.float32)
    assert not policy.can_unpad
    examples = examples_of([[3, 3]], [6])
    with torch.no_grad():
        assert torch.equal(*(states(policy, collate(examples, 0, share=share)) for share in (True, False)))


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
def test_attention_of_its_own_is_left_alone(attention: str) -> None:
    model, tokenizer = build_tiny("tiny-0.1m", seed=0)
    policy = Policy(model, tokenizer, verify_head=False)
    model.config._attn_implementation = attention
    assert not policy.can_unpad


@pytest.mark.parametrize("scores", [1, 400, 10**6])
def test_attention_in_groups_of_short_rows_is_torchs_attention(scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of any order and length, three queries to a key's head; groups of one row, of some, of all."""
    monkeypatch.setattr(packed, "_SCORES", scores)
    lengths, draw = torch.tensor([3, 9, 1, 9, 5]), torch.Generator().manual_seed(0)
    mask_BT = (torch.arange(9) < lengths[:, None]).long().flip(1)  # padding on the left
    _, rows = packed.Rows.of(mask_BT)
    query, key, value = (
        torch.randn(1, heads, int(lengths.sum()), 4, dtype=torch.float64, generator=draw) for heads in (6, 2, 2)
    )
    with torch.no_grad():
        found = rows.gather(packed._attend_short(rows, query, key, value, 0.3))
    spread = [rows.spread_heads(each) for each in (query, key, value)]
    expected = torch.nn.functional.scaled_dot_product_attention(*spread, is_causal=True, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(found, rows.gather(expected.transpose(1, 2)), rtol=1e-12, atol=1e-12)


def test_only_what_is_sampled_from_is_read_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without gradients the same kernel reads, so that ratios of an unchanged model are 1 in 16 bits, too."""
    calls = []
    inner = packed._attend_short
    monkeypatch.setattr(packed, "_attend_short", lambda *given: calls.append(1) or inner(*given))
    policy = Policy(*build_tiny("tiny-0.1m", seed=0, dtype="float64"))
    ids_BT = torch.randint(5, 30, (8, 20), generator=torch.Generator().manual_seed(1))
    mask_BT = (torch.arange(20) < torch.arange(6, 21, 2)[:, None]).long()
    with torch.no_grad():
        expected = packed.unpadded_hidden(policy.causal_lm, ids_BT, mask_BT)
        assert not calls
        cache = DynamicCache()
        found = packed.unpadded_hidden(policy.causal_lm, ids_BT, mask_BT, cache=cache)
    assert calls
    torch.testing.assert_close(found[mask_BT.bool()], expected[mask_BT.bool()], rtol=1e-9, atol=1e-12)
