"""Generated problems: ``reasoning_gym`` (the library's procedural sets) and ``task`` (the tiny world).

The library is maintained elsewhere; its ``gsm_symbolic`` set gives GSM8K-style word problems with a worked solution
that ends in ``#### <answer>``. Most of its other sets give a question and an answer only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from stepkd.data.rows import Row, did_you_mean
from stepkd.data.sources.registry import Benchmark, Options, RawRow, SourceOption, register
from stepkd.errors import ConfigError
from stepkd.yaml_files import check_keys

GENERATED_SPLITS = ("train", "validation", "test")
"""The splits of a generated source; they never share a random stream."""
_SEED_STRIDE = 2**20


def stream_seed(seed: int, split: str, source: str) -> int:
    """Return the first library seed of a (seed, split) pair.

    Many sets draw item ``i`` from the stream ``seed + i``, so that neighbouring seeds give the same items shifted by
    one. Pairs are therefore kept 2**20 apart.

    Args:
        seed: the user's seed, from 0.
        split: train, validation or test.
        source: for the message.

    Raises:
        ConfigError: an unknown split or a negative seed.
    """
    if split not in GENERATED_SPLITS:
        hint = did_you_mean(split, GENERATED_SPLITS)
        raise ConfigError(f"source {source!r} has no split {split!r}; {hint}")
    if seed < 0:
        raise ConfigError(f"seed={seed} of source {source!r}: must be 0 or more")
    return (seed * len(GENERATED_SPLITS) + GENERATED_SPLITS.index(split)) * _SEED_STRIDE


def _generate_gym(options: Options, split: str) -> Iterator[Row]:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ConfigError("source 'reasoning_gym' needs the library; run `pip install reasoning-gym`") from error

    name, size = options["dataset"], options["size"]
    if name not in DATASETS:
        raise ConfigError(f"reasoning_gym has no dataset {name!r}; {did_you_mean(name, DATASETS)}")
    if not 1 <= size <= _SEED_STRIDE:
        raise ConfigError(f"size={size} of source 'reasoning_gym': must lie between 1 and {_SEED_STRIDE}")
    seed = stream_seed(options["seed"], split, "reasoning_gym")
    try:
        items: Any = reasoning_gym.create_dataset(name, size=size, seed=seed, **options["config"])
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"reasoning_gym refused config={dict(options['config'])} for {name!r}: {error}") from error
    for index in range(size):
        item = items[index]
        solution = item["metadata"].get("answer_cot")
        row = {"id": f"{name}/{split}/{index}", "prompt": item["question"], "answer": item["answer"], "dataset": name}
        yield row | ({"solution": solution} if isinstance(solution, str) and solution.strip() else {})


def _map_gym(raw: RawRow, options: Options) -> Row:
    if raw["answer"] is None:
        raise raw.error(
            f"{raw['dataset']!r} has no single gold answer (it is judged by its own scorer); choose another dataset",
            column="answer",
        )
    return dict(raw)


register(
    Benchmark(
        name="reasoning_gym",
        help="generated problems (reasoning-gym)",
        map_row=_map_gym,
        splits={split: split for split in GENERATED_SPLITS},
        options={
            "dataset": SourceOption("gsm_symbolic", "name of the set in the library"),
            "size": SourceOption(500, "number of problems"),
            "seed": SourceOption(0, "same seed and split: the same problems"),
            "config": SourceOption({}, "further settings of the set, by the library's names"),
        },
        generate=_generate_gym,
        template="gsm8k",
        extractors=("hash", "boxed", "answer_phrase", "last_number"),
        max_new_tokens=1024,
    )
)


def _generate_task(options: Options, split: str) -> Iterator[Row]:
    from stepkd.tasks.rows import Noise, make_rows

    noise = options["noise"]
    if noise is not None:
        check_keys(noise, list(Noise.__dataclass_fields__), "noise of source 'task'")
        if "rate" not in noise:
            raise ConfigError("noise of source 'task' needs a rate in [0, 1], for example noise: {rate: 0.15}")
        noise = Noise(**noise)
    part: Any = split  # stepkd.tasks checks it
    yield from make_rows(
        options["task"], options["n"], seed=options["seed"], split=part, noise=noise, unique=options["unique"]
    )


register(
    Benchmark(
        name="task",
        help="the tiny world: every step has an exact checker",
        splits={split: split for split in GENERATED_SPLITS},
        options={
            "task": SourceOption("modular", "task text, for example modular:terms=5,modulus=10; see stepkd.tasks"),
            "n": SourceOption(1000, "number of rows"),
            "seed": SourceOption(0, "same seed and split: the same rows"),
            "noise": SourceOption(None, "slips in the demonstrations: {rate, kind, recover, seed}; none: clean"),
            "unique": SourceOption(True, "every problem at most once"),
        },
        generate=_generate_task,
        template="task",
        extractors=("hash",),
        max_new_tokens=256,
    )
)
