"""Claim files: ``recipes/claims/<name>.yaml``, read and checked against the experiment before anything runs.

Keys: ``claim`` (one sentence), ``source`` (paper and number), ``experiment``, ``settings``, ``seeds``, ``statements``
(:class:`~stepkd.claims.statements.Statement`), ``quick`` (what ``claims quick`` has of seeds, settings and variants);
optional: ``variants`` (name -> settings on top), ``arms`` (name -> settings of that arm; needed where the experiment
has none of its own), ``run`` (name of the run's folder: claims that name the same one, with the same experiment and
settings, share its rows; default: the claim's name), ``equal`` (the equal budgets: fact -> arms that must share it in
every seed, null for all arms).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stepkd.claims.experiment import Experiment, get_experiment
from stepkd.claims.statements import Statement
from stepkd.errors import ConfigError, DataError, StepkdError, nearest
from stepkd.settings import build_settings
from stepkd.yaml_files import check_keys, mapping, read_yaml

REQUIRED = ("claim", "source", "experiment", "seeds", "statements", "quick")
OPTIONAL = ("settings", "variants", "arms", "run", "equal")
QUICK = ("seeds", "settings", "variants")
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
    experiment_name: str
    """As in the file."""
    experiment: Experiment
    """What runs."""
    variants: Mapping[str, Any]
    """Variant -> settings; one called ``main`` when the file names none."""
    arms: Mapping[str, Any]
    """Arm -> its settings, or None."""
    run: str
    """Name of the run's folder; claims that share it share its rows."""
    seeds: tuple[int, ...]
    """Seeds, in the file's order."""
    statements: tuple[Statement, ...]
    """What must hold."""
    equal: Mapping[str, tuple[str, ...]]
    """Fact -> arms that must share it in every seed."""
    quick: bool = False
    """Whether this is the reduced version."""

    def identity(self) -> dict[str, Any]:
        """What decides the value of a seed, as JSON values."""
        plain = {
            "experiment": self.experiment_name,
            "variants": {name: asdict(settings) for name, settings in self.variants.items()},
            "arms": {name: None if arm is None else asdict(arm) for name, arm in self.arms.items()},
        }
        return dict(json.loads(json.dumps(plain)))

    def statements_of(self, variant: str) -> list[Statement]:
        """Statements about this variant."""
        return [statement for statement in self.statements if not statement.variants or variant in statement.variants]

    def fingerprint(self) -> str:
        """Short hash of everything that decides the verdict but the code: settings, arms, seeds and statements."""
        whole = self.identity() | {
            "seeds": list(self.seeds),
            "equal": {fact: list(arms) for fact, arms in self.equal.items()},
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
        DataError: unreadable, or it does not fit the experiment; the message names the file and the key.
    """
    path = Path(path)
    raw = read_yaml(path, "claim")
    try:
        check_keys(raw, (*REQUIRED, *OPTIONAL), "the claim")
        if missing := [key for key in REQUIRED if key not in raw]:
            raise ConfigError(f"a claim needs the key {missing[0]!r}")
        full, reduced = (_build(path, raw, quick=flag) for flag in (False, True))
    except StepkdError as error:
        raise DataError(str(error), path=path) from error
    return reduced if quick else full


def _build(path: Path, raw: Mapping[str, Any], *, quick: bool) -> Claim:
    for key in ("claim", "source", "experiment"):
        if not isinstance(raw[key], str) or not raw[key].strip():
            raise ConfigError(f"{key}: must be text, got {raw[key]!r}")
    experiment = get_experiment(raw["experiment"])
    check_keys(raw["quick"], QUICK, "quick")
    reduced: Mapping[str, Any] = raw["quick"] if quick else {}
    variants = _variants(experiment, raw, reduced)
    arms = _arms(experiment, raw.get("arms"))
    name = path.name.removesuffix(".yaml")
    run = raw.get("run", name)
    if not isinstance(run, str) or not _NAME.fullmatch(run):
        raise ConfigError(f"run: {run!r} cannot be a folder's name; use letters, digits and _ . @ + -")
    claim = Claim(
        name=name,
        path=path,
        claim=" ".join(raw["claim"].split()),
        source=" ".join(raw["source"].split()),
        experiment_name=raw["experiment"],
        experiment=experiment,
        variants=variants,
        arms=arms,
        run=f"{run}-quick" if quick else run,
        seeds=_seeds(reduced.get("seeds", raw["seeds"])),
        statements=_statements(raw["statements"]),
        equal=_equal(experiment, raw.get("equal"), arms),
        quick=quick,
    )
    _check_statements(claim, all_variants=_named(raw.get("variants"), "variants") or {"main": {}})
    return claim


def _variants(experiment: Experiment, raw: Mapping[str, Any], reduced: Mapping[str, Any]) -> dict[str, Any]:
    declared = _named(raw.get("variants"), "variants") or {"main": {}}
    chosen = _names(reduced.get("variants", list(declared)), "quick: variants")
    base, smaller = mapping(raw.get("settings"), "settings"), mapping(reduced.get("settings"), "quick: settings")
    built: dict[str, Any] = {}
    for name in chosen:
        _check_known(name, declared, "quick: no variant")
        changes = mapping(declared[name], f"variants: {name}")
        built[name] = build_settings(experiment.settings, {**base, **changes, **smaller}, "settings")
    return built


def _arms(experiment: Experiment, raw: Any) -> dict[str, Any]:
    arms = _named(raw, "arms") or dict(experiment.arms)
    if not arms:
        raise ConfigError("arms: the experiment has none of its own, so the claim must name them")
    if experiment.arm_settings is not None:
        return {
            name: build_settings(experiment.arm_settings, mapping(changes, f"arms: {name}"), f"arms: {name}")
            for name, changes in arms.items()
        }
    for name, changes in arms.items():
        _check_known(name, experiment.arms, "arms: no arm")
        if changes:
            raise ConfigError(f"arms: {name}: the arms of this experiment have no settings of their own")
    return dict.fromkeys(arms)


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


def _check_statements(claim: Claim, all_variants: Mapping[str, Any]) -> None:
    """Every statement names arms, metrics and variants that there are."""
    for number, statement in enumerate(claim.statements, start=1):
        where = f"statement {number}"
        for arm in statement.arms:
            _check_known(arm, claim.arms, f"{where}: no arm")
        for variant in statement.variants:
            _check_known(variant, all_variants, f"{where}: no variant")
        for variant, settings in claim.variants.items():
            if statement in claim.statements_of(variant):
                known = [*claim.experiment.metric_names(settings), *claim.experiment.facts]
                _check_known(statement.metric, known, f"{where}: no metric")


def _equal(experiment: Experiment, raw: Any, arms: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    equal = {}
    for fact, names in mapping(raw, "equal").items():
        _check_known(fact, experiment.facts, "equal: no fact")
        chosen = tuple(arms) if names is None else tuple(_names(names, f"equal: {fact}"))
        for arm in chosen:
            _check_known(arm, arms, f"equal: {fact}: no arm")
        equal[fact] = chosen
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
