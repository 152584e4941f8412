"""Generated problems: ``reasoning_gym`` (the library's procedural sets) and ``task`` (the tiny world)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from stepkd.data.rows import Row
from stepkd.data.sources.source import Options
from stepkd.errors import ConfigError, DataError, check_choice
from stepkd.settings import build_settings
from stepkd.yaml_files import mapping

GENERATED_SPLITS = ("train", "validation", "test")
"""The splits of a generated source; they never share a random stream."""
_SEED_STRIDE = 2**20


def stream_seed(seed: int, split: str) -> int:
    """Return the first library seed of a (seed, split) pair.

    Many sets draw item ``i`` from the stream ``seed + i``, so that neighbouring seeds give the same items shifted by
    one. Pairs are therefore kept 2**20 apart.

    Args:
        seed: the user's seed, from 0.
        split: train, validation or test.

    Raises:
        ConfigError: an unknown split or a negative seed.
    """
    check_choice("split of source 'reasoning_gym'", split, GENERATED_SPLITS)
    if seed < 0:
        raise ConfigError(f"seed={seed} of source 'reasoning_gym': must be 0 or more")
    return (seed * len(GENERATED_SPLITS) + GENERATED_SPLITS.index(split)) * _SEED_STRIDE


def gym_rows(options: Options, split: str) -> Iterator[Row]:
    """Problems of a set of reasoning-gym, with a worked solution where the set has one."""
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ConfigError("source 'reasoning_gym' needs the library; run `pip install reasoning-gym`") from error

    name, size = options["dataset"], options["size"]
    check_choice("dataset of source 'reasoning_gym'", name, DATASETS)
    if not 1 <= size <= _SEED_STRIDE:
        raise ConfigError(f"size={size} of source 'reasoning_gym': must lie between 1 and {_SEED_STRIDE}")
    seed = stream_seed(options["seed"], split)
    try:
        items: Any = reasoning_gym.create_dataset(name, size=size, seed=seed, **options["config"])
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"reasoning_gym refused config={dict(options['config'])} for {name!r}: {error}") from error
    for index in range(size):
        item = items[index]
        solution = item["metadata"].get("answer_cot")
        if item["answer"] is None:
            raise DataError(
                f"{name!r} has no single gold answer (it is judged by its own scorer); choose another dataset",
                path=f"reasoning_gym:{split}",
            )
        row = {"id": f"{name}/{split}/{index}", "prompt": item["question"], "answer": item["answer"], "dataset": name}
        yield row | ({"solution": solution} if isinstance(solution, str) and solution.strip() else {})


def task_rows(options: Options, split: Any) -> Iterator[Row]:
    """Rows of the tiny world."""
    from stepkd.tasks.rows import Noise, critique_rows, make_rows

    noise, where = options["noise"], "noise of source 'task'"
    if noise is not None:
        noise = build_settings(Noise, mapping(noise, where), where)
    for row in make_rows(options["task"], options["n"], seed=options["seed"], split=split, noise=noise):
        yield from critique_rows(row) if options["critiques"] else [row]
