"""Claim files: ``recipes/claims/<name>.yaml``, read and checked before anything runs.

``recipes/claims/README.md`` explains the keys. A claim has jobs, which are what users run (``fit``, ``label``,
``evaluate``, ...: :mod:`stepkd.claims.jobs`), and settings, which the texts of jobs and metrics refer to as
``$name``. Variants, arms and the quick version are settings on top. Its statements are reproduced, not reproduced, or
inconclusive.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import pydantic
from pydantic import Field

from stepkd.claims.jobs import KINDS, Do, References
from stepkd.errors import ConfigError, DataError, nearest
from stepkd.settings import build_settings
from stepkd.statistics import (
    Estimate,
    FloatArray,
    Interval,
    estimate_difference,
    estimate_mean,
    estimate_ratio,
    estimate_seed_ratio,
)
from stepkd.yaml_files import check_keys, mapping, overlaid, read_yaml

Verdict: TypeAlias = Literal["reproduced", "not reproduced", "inconclusive"]
Direction: TypeAlias = Literal["higher", "lower"]
Measure: TypeAlias = Literal["difference", "ratio", "seed_ratio"]
SeedValues: TypeAlias = Mapping[str, Mapping[str, Sequence[FloatArray]]]
"""arm -> metric -> one (P, K, 2) array per seed, in the seeds' order."""


@dataclass(frozen=True)
class Statement:
    """One statement about a metric: of two arms (``better`` and ``worse``), or of one ``arm`` against a number.

    What must lie beyond the bound: for a difference the gain in the claimed direction (``better - worse`` if higher is
    better, ``worse - better`` if lower is), above it; for a ratio ``better / worse``, for one arm its mean, above it if
    higher is better, below it if lower is.
    """

    metric: str
    """Name of a metric of the claim."""
    better: str | None = None
    """Arm that the claim holds to be better."""
    worse: str | None = None
    """Arm that it is compared with."""
    arm: str | None = None
    """The one arm of a statement against a number."""
    direction: Direction = "higher"
    """Which values of the metric are better."""
    measure: Measure = "difference"
    """``difference``, ``ratio`` or ``seed_ratio``; only between two arms."""
    bound: float | None = None
    """What must be passed: between two arms by default 0 (difference) or 1 (ratio); one arm needs a number."""
    variants: tuple[str, ...] = ()
    """Variants that it is about; empty: all."""
    paper: str = ""
    """The paper's number for it, shown beside the result."""

    def __post_init__(self) -> None:
        if len(self.arms) != (2 if self.arm is None else 1):
            raise ConfigError("a statement names better and worse (two arms), or arm (one arm and a bound)")
        if self.better is not None and self.better == self.worse:
            raise ConfigError(f"better and worse are the same arm, {self.better!r}")
        if self.arm is not None and (self.bound is None or self.is_ratio):
            raise ConfigError(f"a statement about one arm ({self.arm!r}) has a bound, and no measure")

    @property
    def is_ratio(self) -> bool:
        """Whether it is about ``better / worse``."""
        return self.measure != "difference"

    @property
    def limit(self) -> float:
        """The number to be beyond."""
        return float(self.is_ratio) if self.bound is None else float(self.bound)

    @property
    def below(self) -> bool:
        """Whether the quantity must lie below the bound."""
        return self.direction == "lower" and (self.is_ratio or self.arm is not None)

    @property
    def arms(self) -> tuple[str, ...]:
        """Arms that it names."""
        return tuple(name for name in (self.better, self.worse, self.arm) if name is not None)

    def estimate(self, values: SeedValues) -> Estimate:
        """The quantity, from the values of every seed."""
        first, *second = (values[name][self.metric] for name in self.arms)
        if not second:
            return estimate_mean(first)
        better, worse = first, second[0]
        if self.is_ratio:
            return (estimate_ratio if self.measure == "ratio" else estimate_seed_ratio)(better, worse)
        return estimate_difference(better, worse) if self.direction == "higher" else estimate_difference(worse, better)

    def verdict(self, interval: Interval) -> Verdict:
        """Reproduced if the whole interval lies beyond the bound, not reproduced if all of it lies before it."""
        low, high = (-interval.high, -interval.low) if self.below else (interval.low, interval.high)
        bound = -self.limit if self.below else self.limit
        if math.isnan(low) or math.isnan(high):
            return "inconclusive"
        if low > bound:
            return "reproduced"
        return "not reproduced" if high < bound else "inconclusive"

    def __str__(self) -> str:
        first, second = (self.better, self.worse) if self.direction == "higher" else (self.worse, self.better)
        quantity = f"{self.metric}: {first} - {second}"
        if self.is_ratio:
            quantity = f"{self.metric}: {self.better} / {self.worse}{' per seed' * (self.measure == 'seed_ratio')}"
        if self.arm is not None:
            quantity = f"{self.metric} of {self.arm}"
        return f"{quantity} {'<' if self.below else '>'} {self.limit:g}"

    def to_dict(self) -> dict[str, Any]:
        """What it says, as JSON values, without the paper's number."""
        names = ("arm",) if self.arm is not None else ("better", "worse", "measure", "direction")
        said = {name: value for name, value in asdict(self).items() if name in ("metric", *names)}
        return said | {"bound": self.limit, "below": self.below}


def overall(verdicts: Sequence[Verdict]) -> Verdict:
    """Verdict of a claim: reproduced only if every statement is; not reproduced as soon as one is not."""
    if "not reproduced" in verdicts:
        return "not reproduced"
    return "reproduced" if verdicts and set(verdicts) == {"reproduced"} else "inconclusive"


# ---- the file --------------------------------------------------------------------------------------------------------

Text: TypeAlias = Annotated[
    str,
    pydantic.StringConstraints(strip_whitespace=True, min_length=1),
    pydantic.AfterValidator(lambda text: " ".join(text.split())),
]
Name: TypeAlias = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.@+-]*$")]
"""Can be the name of a folder or row."""
Seeds: TypeAlias = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


def _or(empty: Any) -> pydantic.BeforeValidator:
    """What a key without a value stands for."""
    return pydantic.BeforeValidator(lambda raw: empty if raw is None else raw)


Changes: TypeAlias = Annotated[dict[str, Any], _or({})]
"""Settings on top of others; a key without a value changes none."""


def _statements(raw: Any) -> Any:
    if not isinstance(raw, list):
        return raw
    found = []
    for number, item in enumerate(raw, start=1):
        where = f"statement {number}"
        try:
            found.append(build_settings(Statement, mapping(item, where), where))
        except ConfigError as error:
            text = str(error)
            raise ConfigError(text if text.startswith(where) else f"{where}: {text}") from error
    return tuple(found)


class Quick(pydantic.BaseModel):
    """How the quick version is smaller."""

    model_config = pydantic.ConfigDict(strict=True)
    seeds: Seeds | None = None
    settings: Changes = {}
    variants: Annotated[list[str], Field(min_length=1)] | None = None


class Claim(pydantic.BaseModel):
    """A claim: the keys of its file, those of its base among them."""

    model_config = pydantic.ConfigDict(strict=True, frozen=True)
    path: Path
    """The file."""
    is_quick: bool
    """Whether this is the reduced version."""
    claim: Text
    """What is claimed, one sentence."""
    source: Text
    """Paper and number."""
    statements: Annotated[tuple[Statement, ...], pydantic.BeforeValidator(_statements), Field(min_length=1)]
    """What must hold."""
    jobs: dict[Name, Annotated[dict[str, dict[str, Any] | None], Field(min_length=1, max_length=1)]]
    """Job -> its kind, with its settings."""
    metrics: dict[Name, Annotated[str, Field(pattern=r"^\w+(\..+)?$")]]
    """Metric -> ``job.column``; the job may be a setting that refers to one."""
    arms: Annotated[dict[Name, Changes], Field(min_length=1)]
    """Arm -> its settings, which override those of the variant."""
    seeds: Seeds
    """Seeds, in the file's order."""
    quick: Quick
    """How the quick version is smaller."""
    settings: Changes = {}
    """What texts refer to."""
    variants: Annotated[dict[Name, Changes], pydantic.BeforeValidator(lambda raw: raw or {"main": {}})] = {"main": {}}
    """Variant -> all settings; one called ``main`` when the file names none."""
    run: Name = ""
    """Name of the folder of its jobs, beside its own; claims that have one in common share their jobs."""
    equal: Annotated[dict[str, list[str] | None], _or({})] = {}
    """Metric -> arms that must share it in every seed; None: all."""

    @property
    def name(self) -> str:
        """File name without the ending."""
        return self.path.name.removesuffix(".yaml")

    @property
    def folder(self) -> str:
        """Name of its run's folder."""
        return f"{self.name}-quick" if self.is_quick else self.name

    def wanted(self) -> list[tuple[str, dict[str, Any]]]:
        """Kind and settings of every different job of all arms, with names in place of folders.

        Raises:
            ConfigError: a text refers to nothing, or to itself.
        """
        wanted: dict[str, tuple[str, dict[str, Any]]] = {}

        def note(name: str, kind: str, settings: Mapping[str, Any]) -> str:
            wanted[json.dumps([kind, settings])] = kind, dict(settings)
            return f"folders/{name}"

        for variant in self.variants:
            for arm in self.arms:
                asked = Arm(self, variant, arm, self.seeds[0], note)
                for metric in self.metrics:
                    asked.source(metric)
        return list(wanted.values())

    def identity(self) -> dict[str, Any]:
        """What decides the value of a seed, as JSON values."""
        plain = {"variants": self.variants, "arms": self.arms, "jobs": self.jobs, "metrics": self.metrics}
        return dict(json.loads(json.dumps(plain)))

    def statements_of(self, variant: str) -> list[Statement]:
        """Statements about this variant."""
        return [statement for statement in self.statements if not statement.variants or variant in statement.variants]

    def check_statements(self, variant: str, values: Mapping[str, Collection[str]]) -> None:
        """Every arm has the metrics that statements name of it.

        Raises:
            DataError: one has not.
        """
        for statement in self.statements_of(variant):
            for arm in statement.arms:
                if statement.metric not in values[arm]:
                    raise DataError(f"statement {str(statement)!r}: the arm {arm!r} has no {statement.metric!r}")

    def fingerprint(self) -> str:
        """Short hash of everything that decides the verdict but recipes and code."""
        whole = self.identity() | {
            "seeds": self.seeds,
            "equal": {metric: list(self.arms if arms is None else arms) for metric, arms in self.equal.items()},
            "statements": [
                statement.to_dict() | {"variants": list(statement.variants)} for statement in self.statements
            ],
        }
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:16]


class Arm(References):
    """One arm of a seed: its settings and jobs.

    Args:
        claim, variant, arm, seed: which.
        do: runs a job that a text refers to.
    """

    def __init__(self, claim: Claim, variant: str, arm: str, seed: int, do: Do) -> None:
        named = {**claim.variants[variant], **claim.arms[arm], "seed": seed, "arm": arm}
        super().__init__(named, claim.jobs, do)
        self.metrics = claim.metrics

    def source(self, metric: str) -> tuple[str, str] | None:
        """Folder of the job that a metric comes from, and the column; None where this arm has no such job."""
        self._way = [f"metrics: {metric}"]
        name, _, column = self.metrics[metric].partition(".")
        folder = self.of(name)
        return None if folder is None else (folder, self.value(column or metric))


def load_claim(path: str | Path, *, quick: bool = False) -> Claim:
    """Read a claim file; both its full and its quick version are checked.

    Args:
        path: the YAML file.
        quick: return the reduced version.

    Raises:
        DataError: unreadable, or something in it cannot be; the message names the file and the key.
    """
    path = Path(path)
    try:
        raw = _with_base(read_yaml(path, "claim"), path)
        full, reduced = (_build(raw, path, quick=flag) for flag in (False, True))
    except ConfigError as error:
        raise DataError(str(error), path=path) from error
    return reduced if quick else full


OWN = ("claim", "source", "statements")
"""Keys that a claim does not take from its base."""
MERGED = ("jobs", "metrics", "settings")
"""Keys that are merged key by key with those of its base."""


def _with_base(raw: Any, path: Path) -> dict[str, Any]:
    """The claim's keys, with those that it takes from the claim that it is based on."""
    check_keys(raw, ["base", *(name for name in Claim.model_fields if name not in ("path", "is_quick"))], "the claim")
    own = dict(raw)
    if (base := own.pop("base", None)) is None:
        return own
    file = path.parent / f"{base}.yaml"
    if not file.is_file():
        raise ConfigError(f"base: no claim {base!r} in {path.parent}")
    below = _with_base(read_yaml(file, "claim"), file)
    merged = {key: value for key, value in below.items() if key not in OWN} | own
    for key in MERGED:
        both = overlaid(mapping(below.get(key), key), mapping(own.get(key), key))
        merged[key] = {name: value for name, value in both.items() if key != "metrics" or value is not None}
    return merged


def _build(raw: Mapping[str, Any], path: Path, *, quick: bool) -> Claim:
    check_keys(raw.get("quick"), list(Quick.model_fields), "quick")
    try:
        claim = Claim.model_validate({**raw, "path": path, "is_quick": quick})
    except pydantic.ValidationError as error:
        found = error.errors()[0]
        place = ": ".join(map(str, found["loc"]))
        if found["type"] == "missing":
            raise ConfigError(f"a claim needs the key {place!r}") from None
        raise ConfigError(f"{place}: {found['msg']}, got {found['input']!r}") from None
    _check_names(claim)
    reduced = claim.quick if quick else Quick()
    chosen = list(claim.variants) if reduced.variants is None else reduced.variants
    claim = claim.model_copy(
        update={
            "variants": {name: claim.settings | claim.variants[name] | reduced.settings for name in chosen},
            "run": f"{claim.run}-quick" if quick and claim.run else claim.run,
            "seeds": reduced.seeds or claim.seeds,
        }
    )
    if len(set(claim.seeds)) < len(claim.seeds):
        raise ConfigError(f"seeds: must differ, got {claim.seeds}")
    claim.wanted()
    return claim


def _check_names(claim: Claim) -> None:
    """Everything that one part of a claim names is there in another."""
    for name, job in claim.jobs.items():
        _check_known(next(iter(job)), KINDS, f"jobs: {name}: no kind of job")
    for name in claim.settings:
        if name in ("seed", "arm", *claim.jobs):
            raise ConfigError(f"settings: {name!r} is the name of a job, or of the seed or arm: take another name")
    changed = {"quick: settings": claim.quick.settings}
    changed |= {f"arms: {arm}": changes for arm, changes in claim.arms.items()}
    changed |= {f"variants: {variant}": changes for variant, changes in claim.variants.items()}
    for where, changes in changed.items():
        for name in changes:
            _check_known(name, claim.settings, f"{where}: the claim has no setting")
    for variant in claim.quick.variants or ():
        _check_known(variant, claim.variants, "quick: no variant")
    for metric, arms in claim.equal.items():
        _check_known(metric, claim.metrics, f"equal: {metric}: no metric")
        for arm in arms or ():
            _check_known(arm, claim.arms, f"equal: {metric}: no arm")
    for number, statement in enumerate(claim.statements, start=1):
        where = f"statement {number}"
        _check_known(statement.metric, claim.metrics, f"{where}: no metric")
        for arm in statement.arms:
            _check_known(arm, claim.arms, f"{where}: no arm")
        for variant in statement.variants:
            _check_known(variant, claim.variants, f"{where}: no variant")


def _check_known(name: str, known: Collection[str], problem: str) -> None:
    if name not in known:
        raise ConfigError(f"{problem} {name!r}.{nearest(name, known)} Known: {', '.join(known) or 'none'}")
