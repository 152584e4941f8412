"""Two processes give the gradients of one, with unequal tokens and micro-batches per rank (float64, gloo)."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import pytest
import torch

from stepkd.tasks.rows import make_rows

WORKER = Path(__file__).with_name("ddp_worker.py")


def launch(out: Path, rows: int, *extra: str, ranks: int = 1, **variables: str) -> dict[str, Any]:
    words = [str(out), str(rows), *extra]
    done = forked.run(words, ranks=ranks, script=WORKER, CUDA_VISIBLE_DEVICES="", **variables)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out, weights_only=True)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, Any]]:
    """What one process makes of so many rows."""
    folder = tmp_path_factory.mktemp("single")
    return functools.cache(lambda rows: launch(folder / f"{rows}.pt", rows))


@pytest.mark.parametrize("rows", [pytest.param(13, marks=pytest.mark.slow), 1])
def test_two_processes_equal_one(rows: int, single: Any, tmp_path: Path, distance: Any) -> None:
    """With one row, rank 1 has nothing but dummy batches; with more: test_invariance.py, of all methods."""
    two = launch(tmp_path / "two.pt", rows, ranks=2)
    one = single(rows)
    assert (one["world"], two["world"]) == (1, 2)
    assert two["tokens"] == one["tokens"]
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-6)
    assert distance(two["gradients"], one["gradients"]) < 1e-10
    assert distance(two["weights"], one["weights"]) < 1e-8  # Adam divides by the gradient's own size


@pytest.mark.slow
@pytest.mark.parametrize("rows", [13, 1])
def test_two_processes_with_half_a_model_each_equal_one(rows: int, single: Any, tmp_path: Path, distance: Any) -> None:
    """FSDP2; with one row, rank 1 has nothing but dummy batches, and gathers weights all the same.

    Micro-batch by micro-batch the gradients are summed over ranks: no rank holds whole ones until the last.
    """
    two = launch(tmp_path / "two.pt", rows, ranks=2, STRATEGY="fsdp2")
    one = single(rows)
    assert two["world"] == 2
    assert two["summed"].count(False) == 2, "a step begins without gradients, and there are two"
    assert len(two["summed"]) > 2 or rows == 1
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-6)
    assert distance(two["gradients"], one["gradients"]) < 1e-10
    assert distance(two["weights"], one["weights"]) < 1e-8


@pytest.mark.slow
def test_half_an_adapted_model_each(tmp_path: Path, distance: Any) -> None:
    """LoRA on a frozen base that is sharded too, with activations computed again."""
    one = launch(tmp_path / "one.pt", 5, ADAPT="1")
    two = launch(tmp_path / "two.pt", 5, ranks=2, ADAPT="1", STRATEGY="fsdp2")
    assert one["gradients"].keys() == two["gradients"].keys()
    assert all("lora_" in name for name in two["gradients"])
    assert distance(two["gradients"], one["gradients"]) < 1e-10
    assert distance(two["weights"], one["weights"]) < 1e-8


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_train_the_reward_model_of_one(strategy: str, tmp_path: Path, distance: Any) -> None:
    """Either head, class weights, and as many labelled steps on a rank as its rows happen to have."""
    one = launch(tmp_path / "one.pt", 7, "prm")
    two = launch(tmp_path / "two.pt", 7, "prm", ranks=2, STRATEGY=strategy)
    for head in ("label_tokens", "classifier"):
        a, b = two[head], one[head]
        assert (a["world"], b["world"]) == (2, 1)
        assert a["labelled"][0] != a["labelled"][1], "the test needs unequal ranks"
        assert sum(a["labelled"]) == sum(b["labelled"])
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
        assert distance(a["gradients"], b["gradients"]) < 1e-10
        assert distance(a["weights"], b["weights"]) < 1e-8


def test_an_infinite_loss_on_one_rank_stops_both_and_names_the_row(tmp_path: Path) -> None:
    done = forked.run([str(tmp_path / "x.pt"), "13", "4"], ranks=2, script=WORKER, CUDA_VISIBLE_DEVICES="")
    assert sorted(re.findall(r"RANK (\d) STOPPED", done.stdout)) == ["0", "1"], done.stderr[-2000:]
    row = make_rows("modular:terms=2-9", 13, seed=5)[4]["id"]
    assert done.stdout.count(row) == 2
    assert not (tmp_path / "x.pt").exists()


def test_deepspeed_takes_one_micro_batch() -> None:
    from stepkd.errors import ConfigError
    from stepkd.modules.distributed import check_micro_batches

    deepspeed = type("DeepSpeedStrategy", (), {})()
    check_micro_batches(deepspeed, 1)
    check_micro_batches(object(), 2)
    with pytest.raises(ConfigError, match="the step has 2 micro-batches, and DeepSpeed takes the gradient of one"):
        check_micro_batches(deepspeed, 2)


def test_deepspeed_clips_in_its_engine() -> None:
    from stepkd.modules.distributed import clip_in_engine

    deepspeed = type("DeepSpeedStrategy", (), {})
    for own, limit, expected in ({}, 1.0, 1.0), ({"gradient_clipping": 0.3}, 1.0, 0.3), ({}, None, None):
        strategy: Any = deepspeed()
        strategy.config = dict(own)
        clip_in_engine(strategy, limit)
        assert strategy.config.get("gradient_clipping") == expected
    other: Any = type("DDPStrategy", (), {})()
    other.config = {}
    clip_in_engine(other, 1.0)
    assert other.config == {}
