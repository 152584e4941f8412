"""Claim files: ``recipes/claims/<name>.yaml``, read and checked before anything runs.

``recipes/claims/README.md`` explains the keys. A claim has jobs, which are what users run (``fit``, ``label``,
``evaluate``, ...: :mod:`stepkd.claims.jobs`), and settings, which the texts of jobs and metrics refer to as
``$name``. Variants, arms and the quick version are settings on top.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepkd.claims.jobs import KINDS
from stepkd.claims.statements import Statement
from stepkd.errors import ConfigError, DataError, StepkdError, nearest
from stepkd.settings import build_settings
from stepkd.yaml_files import check_keys, mapping, overlaid, read_yaml

OWN = ("claim", "source", "statements")
INHERITED = ("jobs", "metrics", "arms", "seeds", "quick", "settings", "variants", "run", "equal")
"""Keys that a claim takes from its ``base`` where it has none of its own."""
MERGED = ("jobs", "metrics", "settings")
"""Those of them that are merged key by key with the claim's own."""
NEEDED = (*OWN, "jobs", "metrics", "arms", "seeds", "quick")
QUICK = ("seeds", "settings", "variants")
GIVEN = ("seed", "arm")
"""Names that every text may refer to, beside settings and jobs."""
REFERENCE = re.compile(r"\$(\w+)")
METRIC = re.compile(r"(\w+)(?:\.(.+))?")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@+-]*")


@dataclass(frozen=True)
class Claim:
    """A claim, ready to run."""

    name: str
    """File name without the ending."""
    path: Path
    """The file."""
    claim: str
    """What is claimed, one sentence."""
    source: str
    """Paper and number."""
    jobs: Mapping[str, Mapping[str, Any]]
    """Job -> its kind, with its settings."""
    metrics: Mapping[str, str]
    """Metric -> ``job.column``; the job may be a setting that refers to one."""
    variants: Mapping[str, Mapping[str, Any]]
    """Variant -> all settings; one called ``main`` when the file names none."""
    arms: Mapping[str, Mapping[str, Any]]
    """Arm -> its settings, which go before those of the variant."""
    run: str
    """Name of the run's folder; claims that share it share its rows."""
    seeds: tuple[int, ...]
    """Seeds, in the file's order."""
    statements: tuple[Statement, ...]
    """What must hold."""
    equal: Mapping[str, tuple[str, ...]]
    """Metric -> arms that must share it in every seed."""
    quick: bool = False
    """Whether this is the reduced version."""

    def identity(self) -> dict[str, Any]:
        """What decides the value of a seed, as JSON values."""
        plain = {"variants": self.variants, "arms": self.arms, "jobs": self.jobs, "metrics": self.metrics}
        return dict(json.loads(json.dumps(plain)))

    def statements_of(self, variant: str) -> list[Statement]:
        """Statements about this variant."""
        return [statement for statement in self.statements if not statement.variants or variant in statement.variants]

    def fingerprint(self) -> str:
        """Short hash of everything that decides the verdict but recipes and code."""
        whole = self.identity() | {
            "seeds": list(self.seeds),
            "equal": {metric: list(arms) for metric, arms in self.equal.items()},
            "statements": [
                statement.to_dict() | {"variants": list(statement.variants)} for statement in self.statements
            ],
        }
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:16]


def load_claim(path: str | Path, *, quick: bool = False) -> Claim:
    """Read a claim file; both its full and its quick version are checked.

    Args:
        path: the YAML file.
        quick: return the reduced version.

    Raises:
        DataError: unreadable, or something in it cannot be; the message names the file and the key.
    """
    path = Path(path)
    raw = read_yaml(path, "claim")
    try:
        raw = _with_base(raw, path)
        if missing := [key for key in NEEDED if key not in raw]:
            raise ConfigError(f"a claim needs the key {missing[0]!r}")
        full, reduced = (_build(path, raw, quick=flag) for flag in (False, True))
    except StepkdError as error:
        raise DataError(str(error), path=path) from error
    return reduced if quick else full


def _with_base(raw: Any, path: Path) -> dict[str, Any]:
    """The claim's keys, with those that it takes from the claim that it is based on."""
    check_keys(raw, (*OWN, "base", *INHERITED), "the claim")
    raw = dict(raw)
    if (base := raw.pop("base", None)) is None:
        return raw
    file = path.parent / f"{base}.yaml"
    if not file.is_file():
        raise ConfigError(f"base: no claim {base!r} in {path.parent}")
    own, below = raw, _with_base(read_yaml(file, "claim"), file)
    merged = {key: value for key, value in below.items() if key in INHERITED} | own
    for key in MERGED:
        both = overlaid(mapping(below.get(key), key), mapping(own.get(key), key))
        merged[key] = {name: value for name, value in both.items() if key != "metrics" or value is not None}
    return merged


def _build(path: Path, raw: Mapping[str, Any], *, quick: bool) -> Claim:
    for key in ("claim", "source"):
        if not isinstance(raw[key], str) or not raw[key].strip():
            raise ConfigError(f"{key}: must be text, got {raw[key]!r}")
    check_keys(raw["quick"], QUICK, "quick")
    reduced: Mapping[str, Any] = raw["quick"] if quick else {}
    name = path.name.removesuffix(".yaml")
    run = raw.get("run", name)
    if not isinstance(run, str) or not _NAME.fullmatch(run):
        raise ConfigError(f"run: {run!r} cannot be a folder's name; use letters, digits and _ . @ + -")
    settings = mapping(raw.get("settings"), "settings")
    if taken := [key for key in settings if key in GIVEN or key in mapping(raw["jobs"], "jobs")]:
        raise ConfigError(f"settings: {taken[0]!r} is the name of a job, or of the seed or arm: take another name")
    arms = {arm: _known(settings, changes, f"arms: {arm}") for arm, changes in _named(raw["arms"], "arms").items()}
    if not arms:
        raise ConfigError("arms: name at least one")
    claim = Claim(
        name=name,
        path=path,
        claim=" ".join(raw["claim"].split()),
        source=" ".join(raw["source"].split()),
        jobs=_jobs(raw["jobs"]),
        metrics=_named(raw["metrics"], "metrics"),
        variants=_variants(settings, raw, reduced),
        arms=arms,
        run=f"{run}-quick" if quick else run,
        seeds=_seeds(reduced.get("seeds", raw["seeds"])),
        statements=_statements(raw["statements"]),
        equal=_equal(raw.get("equal"), raw["metrics"], arms),
        quick=quick,
    )
    _check_references(claim, settings)
    _check_statements(claim, all_variants=_named(raw.get("variants"), "variants") or {"main": {}})
    return claim


def _jobs(raw: Any) -> dict[str, Mapping[str, Any]]:
    jobs = _named(raw, "jobs")
    for name, job in jobs.items():
        given = mapping(job, f"jobs: {name}")
        if len(given) != 1:
            raise ConfigError(f"jobs: {name}: must be one kind with its settings, got {', '.join(given) or 'none'}")
        ((kind, settings),) = given.items()
        _check_known(kind, KINDS, f"jobs: {name}: no kind of job")
        mapping(settings, f"jobs: {name}: {kind}")
    return jobs


def _variants(settings: Mapping[str, Any], raw: Mapping[str, Any], reduced: Mapping[str, Any]) -> dict[str, Any]:
    declared = _named(raw.get("variants"), "variants") or {"main": {}}
    chosen = _names(reduced.get("variants", list(declared)), "quick: variants")
    smaller = _known(settings, reduced.get("settings"), "quick: settings")
    built = {}
    for name in chosen:
        _check_known(name, declared, "quick: no variant")
        built[name] = {**settings, **_known(settings, declared[name], f"variants: {name}"), **smaller}
    return built


def _known(settings: Mapping[str, Any], raw: Any, where: str) -> dict[str, Any]:
    """Settings on top of the claim's, all of which it has."""
    changes = mapping(raw, where)
    for name in changes:
        _check_known(name, settings, f"{where}: the claim has no setting")
    return changes


def _seeds(raw: Any) -> tuple[int, ...]:
    good = isinstance(raw, list) and all(isinstance(x, int) and not isinstance(x, bool) and x >= 0 for x in raw)
    if not good or not raw or len(set(raw)) != len(raw):
        raise ConfigError(f"seeds: must be a list of different whole numbers from 0, got {raw!r}")
    return tuple(raw)


def _statements(raw: Any) -> tuple[Statement, ...]:
    if not isinstance(raw, list) or not raw:
        raise ConfigError(f"statements: must be a list of at least one statement, got {raw!r}")
    statements = []
    for number, item in enumerate(raw, start=1):
        where = f"statement {number}"
        try:
            statements.append(build_settings(Statement, mapping(item, where), where))
        except ConfigError as error:
            text = str(error)
            raise ConfigError(text if text.startswith(where) else f"{where}: {text}") from error
    return tuple(statements)


def _check_references(claim: Claim, settings: Mapping[str, Any]) -> None:
    """Every text refers to what there is, nothing to itself, and every metric to a job."""
    known = {**settings, **claim.jobs, **dict.fromkeys(GIVEN)}

    def check(value: Any, where: str, above: tuple[str, ...]) -> None:
        for name in references(value):
            _check_known(name, known, f"{where}: no setting or job")
            if name in above:
                raise ConfigError(f"{where}: {' -> '.join([*above, name])} refers to itself")
            check(known[name], where, (*above, name))

    for name, value in settings.items():
        check(value, f"settings: {name}", (name,))
    for name, job in claim.jobs.items():
        check(job, f"jobs: {name}", (name,))
    for arm, changes in claim.arms.items():
        check(changes, f"arms: {arm}", ())
    for name, text in claim.metrics.items():
        found = METRIC.fullmatch(text) if isinstance(text, str) else None
        if found is None:
            raise ConfigError(f"metrics: {name}: must be JOB.COLUMN, or JOB for the column of that name, got {text!r}")
        _check_known(found[1], [*claim.jobs, *settings], f"metrics: {name}: no job or setting")
        check(text, f"metrics: {name}", ())


def references(value: Any) -> Iterator[str]:
    """Names that texts in a value refer to."""
    if isinstance(value, str):
        yield from REFERENCE.findall(value)
    elif isinstance(value, Mapping | list):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from references(each)


def _check_statements(claim: Claim, all_variants: Mapping[str, Any]) -> None:
    """Every statement names arms, metrics and variants that there are."""
    for number, statement in enumerate(claim.statements, start=1):
        where = f"statement {number}"
        for arm in statement.arms:
            _check_known(arm, claim.arms, f"{where}: no arm")
        for variant in statement.variants:
            _check_known(variant, all_variants, f"{where}: no variant")
        _check_known(statement.metric, claim.metrics, f"{where}: no metric")


def _equal(raw: Any, metrics: Collection[str], arms: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    equal = {}
    for metric, names in mapping(raw, "equal").items():
        _check_known(metric, metrics, "equal: no metric")
        chosen = tuple(arms) if names is None else tuple(_names(names, f"equal: {metric}"))
        for arm in chosen:
            _check_known(arm, arms, f"equal: {metric}: no arm")
        equal[metric] = chosen
    return equal


def _check_known(name: str, known: Collection[str], problem: str) -> None:
    if name not in known:
        raise ConfigError(f"{problem} {name!r}.{nearest(name, known)} Known: {', '.join(known) or 'none'}")


def _named(raw: Any, where: str) -> dict[str, Any]:
    """A mapping whose keys can be names of folders and rows."""
    named = mapping(raw, where)
    for name in named:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ConfigError(f"{where}: {name!r} cannot be a name; use letters, digits and _ . @ + -")
    return named


def _names(raw: Any, where: str) -> Sequence[str]:
    if not isinstance(raw, list) or not all(isinstance(name, str) for name in raw):
        raise ConfigError(f"{where}: must be a list of names, got {raw!r}")
    return raw
