"""Loss and gradient of every method are the same whatever the padding, micro-batch split, chunk size and ranks; those
of SFT are those of plain logits."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import forked
import pytest
import torch

from stepkd.data.collate import plan
from stepkd.models.spec import LoRAConfig

_SPEC = importlib.util.spec_from_file_location("methods_worker", Path(__file__).with_name("methods_worker.py"))
assert _SPEC is not None
worker = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(worker)  # type: ignore[union-attr]

TOLERANCE = 1e-10  # float64, relative norm

# ---- all methods ----------------------------------------------------------------------------------------------------

LAYOUTS: dict[str, dict[str, Any]] = {
    "padded on the left and more, in one chunk": {
        "layout": {"padding_side": "left", "pad_to": 200},
        "chunk_size": 100_000,
    },
    "micro-batches": {"micro_batch_tokens": 150},
    "one row at a time in chunks": {"micro_batch_tokens": 1, "chunk_size": 3},
    "every row with its own prompt": {"shares": False},
}
AT_ONCE = {
    "all at once": {"layout": {"padding_side": "left", "pad_to": 200}, "micro_batch_tokens": 150, "chunk_size": 3}
}
CASES = [(name, layout) for name in worker.MAIN for layout in LAYOUTS]
CASES += [(name, layout) for name in worker.VARIANTS for layout in AT_ONCE]
RARE = [pytest.param(name, layout, marks=pytest.mark.slow) for name in worker.VARIANTS for layout in LAYOUTS]


@pytest.fixture(scope="module", autouse=True)
def norms_in_full_precision() -> Iterator[None]:
    """See :func:`preference_worker.full_precision_norm`."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaRMSNorm, "forward", worker.preference.full_precision_norm)
        yield


@cache
def plain(name: str) -> Any:
    """One micro-batch, padded on the right."""
    return worker.run(name, micro_batch_tokens=100_000)


@pytest.mark.parametrize(("name", "layout"), [*CASES, *RARE])
def test_layout_of_every_method(name: str, layout: str, distance: Callable[..., float]) -> None:
    settings = (LAYOUTS | AT_ONCE)[layout]
    module = worker.run(name, **{"micro_batch_tokens": 100_000, **settings})
    assert distance(module.gradients, plain(name).gradients) < TOLERANCE
    assert worker.facts(module)["losses"] == pytest.approx(worker.facts(plain(name))["losses"], rel=1e-6)
    assert (module.split > 1) == ("micro_batch_tokens" in settings)
    several = any(method in name for method in ("dpo", "kto", "implicit", "kdrl"))  # completions of a prompt
    assert (plain(name).taken_over > 0) == several, "what rows of one prompt begin with is computed once"
    assert module.taken_over == 0 or settings.get("shares", True)


@pytest.mark.parametrize("name", [name for name in worker.METHODS if name != "kdrl"])
def test_every_row_twice_is_the_same_loss(name: str, distance: Callable[..., float]) -> None:
    """Sums and counts grow alike: nothing is divided by a number of rows, or not at all."""
    points = {"reference_point": worker.NO_POINTS} if "kto" in name else {}
    once = worker.run(name, micro_batch_tokens=200, **points) if points else plain(name)
    twice = worker.run(name, copies=2, micro_batch_tokens=200, **points)
    assert distance(twice.gradients, once.gradients) < TOLERANCE
    assert worker.facts(twice)["losses"] == pytest.approx(worker.facts(once)["losses"], rel=1e-6)


def test_every_loss_counts_and_has_a_gradient() -> None:
    for name in worker.METHODS:
        assert all(value != 0 for value in worker.facts(plain(name))["losses"].values()), name
        assert sum(float(gradient.norm()) for gradient in plain(name).gradients.values()) > 0, name


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return launched(tmp_path_factory.mktemp("ranks") / "two.pt", worker.MAIN)


def launched(out: Path, names: Sequence[str], **variables: str) -> dict[str, Any]:
    """Methods over two processes, whose shares of rows and micro-batches differ."""
    script = Path(worker.__file__)
    done = forked.run([str(out), *names], ranks=2, script=script, timeout=600, CUDA_VISIBLE_DEVICES="", **variables)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out, weights_only=True)


@pytest.mark.parametrize("name", worker.MAIN)
def test_two_processes_equal_one(name: str, two_ranks: dict[str, Any], distance: Callable[..., float]) -> None:
    check_ranks(name, two_ranks[name], distance)


@pytest.mark.slow
@pytest.mark.parametrize(("names", "strategy"), [(worker.VARIANTS, "auto"), (tuple(worker.METHODS), "fsdp2")], ids=str)
def test_two_processes_of_other_methods_or_with_half_a_model_each_equal_one(
    names: Sequence[str], strategy: str, tmp_path: Path, distance: Callable[..., float]
) -> None:
    for name, two in launched(tmp_path / "two.pt", names, STRATEGY=strategy).items():
        check_ranks(name, two, distance)


def check_ranks(name: str, two: dict[str, Any], distance: Callable[..., float]) -> None:
    one = worker.facts(worker.run(name, steps=2, micro_batch_tokens=150))
    assert (one["world"], two["world"]) == (1, 2), name
    assert distance(two["gradients"], one["gradients"]) < TOLERANCE, name
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-6), name


# ---- supervised fine-tuning against plain logits --------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"padding_side": "left"},
        {"pad_to": 200},
        {"padding_side": "left", "pad_to": 173},
        {"chunk_size": 1},
        {"chunk_size": 7},
        {"chunk_size": 100_000},
    ],
    ids=str,
)
def test_padding_and_chunks(
    settings: dict[str, Any], examples: Any, one_step: Any, brute_force: Any, distance: Any
) -> None:
    module = one_step(examples, micro_batch_tokens=100_000, **settings)
    assert distance(module.gradients, brute_force[1]) < TOLERANCE
    logged = module.trainer.callback_metrics
    assert float(logged["train/ce"]) == pytest.approx(brute_force[0], rel=1e-6)  # logged in float32
    assert float(logged["train/loss"]) == float(logged["train/ce"])


@pytest.mark.parametrize("parts", [1, 2, 4, 8, 16])
def test_micro_batch_split(parts: int, examples: Any, one_step: Any, brute_force: Any, distance: Any) -> None:
    budget = next(tokens for tokens in range(1, 10_000) if len(plan(examples, tokens)) <= parts)
    module = one_step(examples, micro_batch_tokens=budget)
    assert len(module.shapes) == len(plan(examples, budget))
    assert parts // 2 < len(module.shapes) <= parts
    assert distance(module.gradients, brute_force[1]) < TOLERANCE


def test_order_of_the_rows_does_not_matter(examples: Any, one_step: Any, brute_force: Any, distance: Any) -> None:
    module = one_step(examples[::-1], micro_batch_tokens=300)
    assert distance(module.gradients, brute_force[1]) < TOLERANCE


def test_gradient_checkpointing_changes_nothing(examples: Any, one_step: Any, brute_force: Any, distance: Any) -> None:
    module = one_step(examples, policy={"gradient_checkpointing": True}, micro_batch_tokens=500)
    assert distance(module.gradients, brute_force[1]) < TOLERANCE


def test_lora_gradients_do_not_depend_on_the_split(examples: Any, one_step: Any, distance: Any) -> None:
    # The head is adapted too, which covers LoRA in the chunked, recomputed head.
    policy = {"lora": LoRAConfig(r=4, target_modules=["q_proj", "down_proj", "lm_head"])}
    whole = one_step(examples, policy=policy, micro_batch_tokens=100_000, chunk_size=100_000)
    split = one_step(examples, policy=policy, micro_batch_tokens=200, chunk_size=5)
    assert all("lora" in name for name in whole.gradients)
    assert any("lm_head" in name for name in whole.gradients)
    assert len(split.shapes) > len(whole.shapes)
    assert distance(split.gradients, whole.gradients) < TOLERANCE


def test_float32_stays_within_its_precision(examples: Any, one_step: Any, brute_force: Any, distance: Any) -> None:
    module = one_step(examples, dtype="float32", micro_batch_tokens=300, chunk_size=11)
    gradients = {name: value.double() for name, value in module.gradients.items()}
    assert distance(gradients, brute_force[1]) < 1e-5
