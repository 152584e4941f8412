"""Names of a package that load with their first use: importing a light module of a package loads nothing heavy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazily(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """The ``__getattr__`` of a package that promises names: it returns the value of one.

    Args:
        package: ``__name__`` of the package.
        homes: module of the package, without the package's name -> the names that it defines, in one string.

    Raises:
        AttributeError: (of the function) the package promises no such name.
    """

    def load(name: str) -> Any:
        for module, names in homes.items():
            if name in names.split():
                return getattr(import_module(f"{package}.{module}"), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return load
