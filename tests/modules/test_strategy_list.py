"""Strategies are a list: what is on it trains as one process does, everything else is refused by name."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy, StrategyRegistry

from stepkd.errors import ConfigError
from stepkd.modules.distributed import check_strategy
from stepkd.training.fit import check_fit

OVERLAYS = Path(__file__).resolve().parents[2] / "recipes" / "strategy"
LIGHTNING = "lightning.pytorch.strategies."
REFUSED = r"is not supported: .*--config recipes/strategy/fsdp2\.yaml"


class Own(DDPStrategy):
    """A user's."""


def path(name: str, **options: Any) -> dict[str, Any]:
    return {"class_path": LIGHTNING + name, "init_args": options}


@pytest.mark.parametrize(
    "strategy",
    [
        "auto",
        "ddp",
        "ddp_find_unused_parameters_false",
        "ddp_find_unused_parameters_true",
        "single_device",
        path("DDPStrategy", start_method="popen", process_group_backend="gloo", find_unused_parameters=True),
        {"class_path": "stepkd.training.sharded.FSDP2Strategy"},
        DDPStrategy(gradient_as_bucket_view=True),
        SingleDeviceStrategy(),
    ],
)
def test_what_trains_as_one_process_passes(strategy: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_strategy(strategy)


@pytest.mark.parametrize(
    "strategy",
    [
        "no_such_strategy",
        path("ModelParallelStrategy"),
        path("FSDPStrategy", sharding_strategy="FULL_SHARD"),
        path("DDPStrategy", start_method="spawn"),
        path("DDPStrategy", static_graph=True),
        path("DDPStrategy", model_averaging_period=4),
        path("XLAStrategy"),
        {"class_path": "types.SimpleNamespace"},
        ModelParallelStrategy(),
        DDPStrategy(static_graph=True),
        DDPStrategy(start_method="spawn"),
        Own(start_method="spawn"),
    ],
)
def test_anything_else_is_refused_with_the_overlay_that_shards(strategy: Any) -> None:
    with pytest.raises(ConfigError, match=REFUSED):
        check_strategy(strategy)


def test_every_name_of_lightnings_was_looked_at() -> None:
    allowed = {"ddp", "ddp_find_unused_parameters_false", "ddp_find_unused_parameters_true", "single_device"}
    for name in StrategyRegistry.available_strategies():
        if name in allowed or name.startswith("deepspeed"):
            continue
        with pytest.raises(ConfigError, match=REFUSED):
            check_strategy(name)


@pytest.mark.parametrize("strategy", ["deepspeed_stage_2", path("DeepSpeedStrategy", stage=3), Own()])
def test_untested_strategies_pass_with_a_warning(strategy: Any) -> None:
    with pytest.warns(UserWarning, match=r"is untested: compare train/grad_norm"):
        check_strategy(strategy)


def test_a_warning_is_shown_once() -> None:
    """The command looks at the recipe, and the module at what was made of it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(2):
            check_strategy(Own())
    assert len(caught) == 1


@pytest.mark.filterwarnings("ignore:.*is untested")
@pytest.mark.parametrize("overlay", sorted(OVERLAYS.iterdir()), ids=lambda file: file.stem)
def test_our_own_overlays_pass(overlay: Path) -> None:
    check_strategy(yaml.safe_load(overlay.read_text())["trainer"]["strategy"])


def test_the_command_refuses_before_it_builds_anything(repo_root: Path) -> None:
    recipe = str(repo_root / "recipes" / "tiny" / "sft.yaml")
    for strategy in ("ddp_spawn", "ModelParallelStrategy", "FSDPStrategy"):
        with pytest.raises(ConfigError, match=REFUSED):
            check_fit([recipe], words=["--trainer.strategy", strategy])
