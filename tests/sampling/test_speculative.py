"""Speculative sampling: its distribution is the target's, by enumeration; what it keeps, counts, and stops at."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_policy import tiny_policy
from torch import Tensor

from stepkd.data.completion import Completion
from stepkd.errors import ConfigError, DataError, ModelError
from stepkd.models.policy import Policy
from stepkd.randomness import generator
from stepkd.sampling.acceptance import AcceptanceHead, acceptance_examples, acceptance_loss, train_acceptance_head
from stepkd.sampling.engine import SamplingConfig
from stepkd.sampling.speculative import Reader, Speculator, Stop, Stream, probabilities, speculate
from stepkd.sampling.transformers_engine import TransformersEngine

EOS = 2


class Table:
    """A model of three tokens: logits drawn by what it has read, which is also its hidden state."""

    def __init__(self, name: str) -> None:
        self.name = name

    def logits(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor(generator(0, self.name, *ids).normal(0, 1.5, 3))

    def read(self, ids: Sequence[int], last: int) -> tuple[Tensor, Tensor]:
        found = [self.logits(ids[: len(ids) - i]) for i in reversed(range(last))]
        return torch.stack(found), torch.stack(found)


class Listed:
    """Chance that takes given ways, and then the first; knows how likely its way was and which ways there are."""

    def __init__(self, ways: Sequence[int]) -> None:
        self.ways, self.taken, self.weight = list(ways), [], 1.0  # type: tuple[list[int], list[tuple[int, int]], float]

    def _take(self, chances: Sequence[float]) -> int:
        way = self.ways[len(self.taken)] if len(self.taken) < len(self.ways) else 0
        self.taken.append((way, len(chances)))
        self.weight *= chances[way]
        return way

    def token(self, mass_V: Tensor) -> int:
        return self._take((mass_V / mass_V.sum()).tolist())

    def stands(self, probability: float) -> bool:
        return self._take([probability, 1 - probability]) == 0


def distribution(run: Callable[[Listed], tuple[int, ...]]) -> dict[tuple[int, ...], float]:
    """What a program gives, with its probability, over all ways that chance can take; those of weight 0 are cut off."""
    found: dict[tuple[int, ...], float] = {}
    ways: list[int] | None = []
    while ways is not None:
        chance = Listed(ways)
        result = run(chance)
        found[result] = found.get(result, 0.0) + chance.weight
        ways = None
        for place in reversed(range(len(chance.taken))):
            way, number = chance.taken[place]
            if way + 1 < number:
                ways = [*(each for each, _ in chance.taken[:place]), way + 1]
                break
    return found


class Doubt:
    """An acceptance head that believes in some states only."""

    def chance(self, hidden_H: Tensor) -> float:
        return 0.95 if float(hidden_H.sum()) > 0 else 0.5


@pytest.mark.parametrize("length", [1, 2, 3])
@pytest.mark.parametrize(
    "spec",
    [
        SamplingConfig(),
        SamplingConfig(temperature=0.6),
        SamplingConfig(top_k=2),
        SamplingConfig(top_p=0.8, temperature=1.3),
    ],
    ids=["plain", "cold", "top_k", "top_p"],
)
def test_its_distribution_is_the_targets(length: int, spec: SamplingConfig) -> None:
    target, draft, most = Table("target"), Table("draft"), 3
    head: Any = Doubt() if length == 3 else None
    stop = Stop(length=length, head=head, threshold=0.3, shortest=1)

    def run(chance: Listed) -> tuple[int, ...]:
        ids: list[int] = [0]
        while len(ids) <= most and (len(ids) == 1 or ids[-1] != EOS) and chance.weight:
            found = speculate(target, draft, ids, most + 1 - len(ids), spec, stop, chance, {EOS})
            assert 1 <= len(found.tokens) <= most + 1 - len(ids)
            ids += found.tokens
        return tuple(ids[1:])

    expected: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(most):
        longer = {}
        for ids, weight in expected.items():
            if ids and ids[-1] == EOS:
                longer[ids] = weight
                continue
            for token, chance in enumerate(probabilities(target.logits([0, *ids]), spec).tolist()):
                longer[(*ids, token)] = weight * chance
        expected = longer
    found = {ids: weight for ids, weight in distribution(run).items() if weight > 0}
    assert sum(found.values()) == pytest.approx(1, abs=1e-12)
    assert set(found) == {ids for ids, weight in expected.items() if weight > 0}
    for ids, weight in found.items():
        assert weight == pytest.approx(expected[ids], abs=1e-12)


def test_the_head_ends_a_draft_one_token_behind_its_doubt() -> None:
    """Nothing is known of the first token; 1 - a > h ends the draft, within its bounds."""
    table = Table("target")

    class Always:
        def chance(self, hidden_H: Tensor) -> float:
            return 0.8

    def drafted(**settings: Any) -> int:
        stop = Stop(head=Always(), **settings)  # type: ignore[arg-type]
        return speculate(table, table, [0], 99, SamplingConfig(), stop, Stream(0, "test"), ()).drafted

    assert drafted(length=20, threshold=0.15) == 2
    assert drafted(length=20, threshold=0.3) == 3, "1 - 0.8 is not above, 1 - 0.64 is"
    assert drafted(length=20, threshold=0.15, shortest=6) == 6
    assert drafted(length=4, threshold=0.99) == 4
    assert speculate(table, table, [0], 1, SamplingConfig(), Stop(), Stream(0, "test"), ()).drafted == 0


@pytest.mark.parametrize("spec", [SamplingConfig(), SamplingConfig(temperature=0)], ids=["sampled", "greedy"])
@pytest.mark.parametrize("who", ["target", "draft"])
def test_logits_that_are_not_numbers_are_told(who: str, spec: SamplingConfig) -> None:
    class Diverged(Table):
        def logits(self, ids: Sequence[int]) -> Tensor:
            return super().logits(ids) * math.nan

    models = {name: (Diverged if name == who else Table)(name) for name in ("target", "draft")}
    with pytest.raises(ModelError, match=f"the {who}'s logits are not numbers"):
        speculate(models["target"], models["draft"], [0], 9, spec, Stop(), Stream(0, "test"), {EOS})


def test_streams_draw_in_proportion() -> None:
    chance, mass = Stream(0, "test"), torch.tensor([0.0, 3.0, 1.0, 0.0], dtype=torch.float64)
    drawn = np.bincount([chance.token(mass) for _ in range(2000)], minlength=4)
    assert drawn[[0, 3]].tolist() == [0, 0]
    assert drawn[1] / 2000 == pytest.approx(0.75, abs=0.04)
    assert np.mean([chance.stands(0.25) for _ in range(2000)]) == pytest.approx(0.25, abs=0.04)


# --- on models --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def target() -> Policy:
    return tiny_policy(0)


@pytest.fixture(scope="module")
def draft(target: Policy) -> Policy:
    """Near the target, so that some of its tokens stand."""
    near = target.twin()
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in near.parameters():
            weight.add_(0.03 * torch.randn(weight.shape, generator=noise, dtype=torch.float64))
    return near


PROMPT = [5, 9, 17, 30, 6]


@pytest.mark.parametrize("length", [1, 4])
def test_greedy_is_the_targets_greedy(target: Policy, draft: Policy, length: int) -> None:
    spec = SamplingConfig(temperature=0, max_new_tokens=25)
    ((alone,),) = TransformersEngine(target).generate([PROMPT], spec)
    found = Speculator(target, draft, Stop(length=length)).sample(PROMPT, spec)
    assert found.completion.token_ids.tolist() == alone.token_ids.tolist()
    assert found.completion.raw_logprobs == pytest.approx(alone.raw_logprobs, abs=1e-9)
    assert (found.completion.logprobs == 0).all()
    assert 0 < found.accepted < found.drafted
    assert found.passes < len(alone.token_ids)
    assert found.passes + found.accepted == len(alone.token_ids), "one more token a pass"


def test_the_target_drafts_for_itself_without_a_rejection(target: Policy) -> None:
    spec = SamplingConfig(max_new_tokens=24, temperature=0.7)
    found = Speculator(target, target, Stop(length=5)).sample(PROMPT, spec, 3)
    assert found.accepted == found.drafted
    assert found.passes == math.ceil(len(found.completion.token_ids) / 6)


def test_log_probabilities_are_the_targets(target: Policy, draft: Policy) -> None:
    spec = SamplingConfig(max_new_tokens=30, temperature=0.8, seed=2)
    speculator = Speculator(target, draft)
    found = [speculator.sample(PROMPT, spec, number).completion for number in range(3)]
    assert len({each.key for each in found}) == 3
    scored = TransformersEngine(target).score(found)
    for each, scores in zip(found, scored, strict=True):
        assert each.raw_logprobs == pytest.approx(scores.logps_T, abs=1e-9)
        assert (each.logprobs > each.raw_logprobs - 1).all()
    again = Speculator(target, draft).sample(PROMPT, spec, 1).completion
    assert again.key == found[1].key, "keyed by the sample, whatever was sampled before"


def test_completions_end_at_stop_strings_and_limits(target: Policy, draft: Policy) -> None:
    whole = Speculator(target, draft).sample(PROMPT, SamplingConfig(max_new_tokens=25, seed=1)).completion
    short = Speculator(target, draft).sample(PROMPT, SamplingConfig(max_new_tokens=7, seed=1)).completion
    assert (len(short.token_ids), short.finish) == (7, "length")
    stop = target.tokenizer.decode(whole.token_ids[3:5])
    ended = Speculator(target, draft).sample(PROMPT, SamplingConfig(max_new_tokens=25, seed=1, stop=stop)).completion
    assert ended.finish == "stop"
    assert stop not in ended.text
    assert whole.text.startswith(ended.text)


def test_a_stop_string_ends_what_counts(target: Policy) -> None:
    spec = SamplingConfig(max_new_tokens=24, seed=4)
    whole = Speculator(target, target, Stop(length=10)).sample(PROMPT, spec).completion
    stop = target.tokenizer.decode(whole.token_ids[2:4])
    found = Speculator(target, target, Stop(length=10)).sample(PROMPT, replace(spec, stop=stop))
    assert len(found.completion.token_ids) == 4, "in the middle of the first draft"
    assert (found.passes, found.drafted, found.accepted) == (1, 10, 4)


def test_weights_that_change_are_read_with(target: Policy, draft: Policy) -> None:
    spec, (ours, near) = SamplingConfig(max_new_tokens=12), (target.twin(), draft.twin())
    speculator = Speculator(ours, near)
    speculator.sample(PROMPT, spec)
    for policy in (ours, near):
        policy.causal_lm.get_input_embeddings().weight.data.add_(0.05)
    found, anew = speculator.sample(PROMPT, spec), Speculator(ours, near).sample(PROMPT, spec)
    assert found[1:] == anew[1:]
    assert found.completion.raw_logprobs == pytest.approx(anew.completion.raw_logprobs, abs=1e-9)


@pytest.mark.parametrize("shorter", ["target", "draft"])
def test_models_of_one_family_may_lack_the_last_id(target: Policy, draft: Policy, shorter: str) -> None:
    """As Gemma 3 1B does; the id is made a likely one."""
    spec, likely = SamplingConfig(max_new_tokens=25, seed=1), target.vocab_size
    ((first,),) = TransformersEngine(target).generate([PROMPT], replace(spec, temperature=0))
    tokenizer = copy.deepcopy(target.tokenizer)
    tokenizer.add_tokens(["<image>"])
    models = {"target": target.twin().causal_lm, "draft": draft.twin().causal_lm}
    for name, model in models.items():
        model.resize_token_embeddings(likely + (name != shorter), mean_resizing=False)
        if name != shorter:
            head = model.get_output_embeddings().weight.data
            head[likely] = 3 * head[first.token_ids[0]]
    ours, near = (Policy(models[name], tokenizer) for name in ("target", "draft"))
    assert ours.vocab_size - near.vocab_size == (1 if shorter == "draft" else -1)
    found = [Speculator(ours, near).sample(PROMPT, spec, number).completion for number in range(3)]
    assert any(likely in each.token_ids for each in found) == (shorter == "draft")
    for each, scores in zip(found, TransformersEngine(ours).score(found), strict=True):
        assert each.raw_logprobs == pytest.approx(scores.logps_T, abs=1e-9)
    ((alone,),) = TransformersEngine(ours).generate([PROMPT], replace(spec, temperature=0))
    greedy = Speculator(ours, near).sample(PROMPT, replace(spec, temperature=0))
    assert greedy.completion.token_ids.tolist() == alone.token_ids.tolist()
    _, accepted = acceptance_examples(ours, near, found[0], spec, replaced=0.0)
    assert ((accepted >= 0) & (accepted <= 1)).all()
    assert (accepted > 0).any()


def test_what_was_read_is_not_read_again(target: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, plain = Reader(target), Reader(target)
    ids = [*PROMPT, 8, 9, 10, 11]
    widths: list[int] = []
    forward = reader._decoder.forward

    def counted(input_ids: Tensor, *arguments: Any) -> Any:
        widths.append(input_ids.shape[1])
        return forward(input_ids, *arguments)

    monkeypatch.setattr(reader._decoder, "forward", counted)
    with torch.no_grad():
        for sequence, last in ((ids[:5], 1), (ids, 3), ([*ids[:6], 40], 1), (ids[:4], 2)):
            plain._ids, plain._cache = [], None
            for ours, anew in zip(reader.read(sequence, last), plain.read(sequence, last), strict=True):
                assert len(ours) == last
                assert torch.allclose(ours, anew, rtol=1e-9, atol=1e-11)
    assert widths == [5, 4, 1, 2]


# --- the acceptance head ----------------------------------------------------------------------------------------------


def test_the_loss_is_a_weighted_soft_cross_entropy() -> None:
    logits = torch.tensor([[0.3, 1.2], [2.0, -1.0]], dtype=torch.float64)
    accepted = torch.tensor([0.25, 1.0], dtype=torch.float64)
    reject, accept = logits.softmax(-1).log().unbind(-1)
    by_hand = -(6 * 0.75 * reject[0] + 0.25 * accept[0] + accept[1]) / (6 * 0.75 + 0.25 + 1)
    assert float(acceptance_loss(logits, accepted)) == pytest.approx(float(by_hand), rel=1e-12)
    torch.testing.assert_close(  # of weight 1, torch's own
        acceptance_loss(logits, accepted, 1.0),
        torch.nn.functional.binary_cross_entropy_with_logits(logits[:, 1] - logits[:, 0], accepted),
    )


def test_examples_are_the_drafts_own_tokens(target: Policy, draft: Policy) -> None:
    ((completion,),) = TransformersEngine(target).generate([PROMPT], SamplingConfig(max_new_tokens=40))
    number = len(completion.token_ids)
    spec = SamplingConfig(temperature=0.9)
    with torch.no_grad():
        hidden, accepted = acceptance_examples(target, target, completion, spec, replaced=0.0)
        assert accepted.tolist() == [1.0] * number, "the target's own tokens stand"
        assert hidden.shape == (number, 64)
        _, accepted = acceptance_examples(target, draft, completion, spec, replaced=0.0)
        assert (accepted <= 1).all()
        assert 0.01 < float(accepted.mean()) < 0.99
        hidden, accepted = acceptance_examples(target, draft, completion, spec, replaced=0.5)
        assert len(hidden) == len(accepted) < number, "the target's tokens are left out"


def test_chunks_change_nothing(target: Policy, draft: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    ((completion,),) = TransformersEngine(target).generate([PROMPT], SamplingConfig(max_new_tokens=20))
    spec = SamplingConfig(top_p=0.9)
    whole = acceptance_examples(target, draft, completion, spec)
    monkeypatch.setattr("stepkd.sampling.acceptance._CHUNK", 6)
    for ours, theirs in zip(acceptance_examples(target, draft, completion, spec), whole, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_head_learns_what_stands(target: Policy, draft: Policy, tmp_path: Path) -> None:
    """On what it was trained on, its cross-entropy is below that of the best constant."""
    drawn = TransformersEngine(target).generate([PROMPT, PROMPT[::-1]], SamplingConfig(n=4, max_new_tokens=40))
    completions = [each for own in drawn for each in own]
    head = train_acceptance_head(target, draft, completions, epochs=30, batch=4, lr=5e-3, rejection_weight=1.0)
    pairs = [acceptance_examples(target, draft, each, SamplingConfig(), i) for i, each in enumerate(completions)]
    hidden, accepted = (torch.cat(each) for each in zip(*pairs, strict=True))
    rate = accepted.mean()
    constant = float(-(rate * rate.log() + (1 - rate) * (1 - rate).log()))
    assert float(acceptance_loss(head(hidden), accepted, 1.0)) < 0.9 * constant
    head.save(tmp_path / "head.safetensors")
    again = AcceptanceHead.load(tmp_path / "head.safetensors")
    assert torch.equal(again(hidden), head(hidden))
    found = Speculator(target, draft, Stop(length=20, head=again)).sample(PROMPT, SamplingConfig(max_new_tokens=30))
    assert 2 <= found.drafted / found.passes < 20


def test_mistakes_are_told(target: Policy, draft: Policy, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nothing\.safetensors is no acceptance head"):
        AcceptanceHead.load(tmp_path / "nothing.safetensors")
    for name, written in (("text", b"no weights"), ("other", None)):
        path = tmp_path / f"{name}.safetensors"
        save_file({"weight": torch.ones(2)}, path) if written is None else path.write_bytes(written)
        with pytest.raises(ModelError, match=rf"{name}\.safetensors is no acceptance head"):
            AcceptanceHead.load(path)
    with pytest.raises(ConfigError, match="length=0: must be at least 1"):
        Stop(length=0)
    other = target.twin()
    other.tokenizer = copy.deepcopy(target.tokenizer)
    other.tokenizer.add_tokens(["<image>"])
    with pytest.raises(ModelError, match=r"the draft's vocabulary is not the model's .* take a draft of the same"):
        Speculator(target, other)
    with pytest.raises(ConfigError, match="reads 8 hidden units and the draft has 64"):
        Speculator(target, draft, Stop(head=AcceptanceHead(8)))
    with pytest.raises(DataError, match="no completion with tokens"):
        train_acceptance_head(target, draft, [Completion(np.array(PROMPT), np.array([]))])
    with pytest.raises(ConfigError, match="temperature 0"):
        train_acceptance_head(target, draft, [], SamplingConfig(temperature=0))
