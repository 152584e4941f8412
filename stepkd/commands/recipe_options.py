"""How commands other than ``fit`` take a recipe: ``--config FILE``, overlays behind it, ``--set KEY=VALUE``."""

from __future__ import annotations

import argparse

from stepkd.errors import ConfigError


def add_recipe_arguments(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """Add ``--config`` and ``--set``."""
    parser.add_argument(
        "--config", action="append", required=required, default=[], metavar="FILE", help="recipe, then its overlays"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any setting of the recipe")


def recipe_words(arguments: argparse.Namespace) -> list[str]:
    """The recipe and its settings as words of ``stepkd fit``.

    Raises:
        ConfigError: a setting that is not KEY=VALUE.
    """
    words = [word for path in arguments.config for word in ("--config", path)]
    for setting in arguments.set:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {setting}: write KEY=VALUE, for instance model.init_args.chunk_size=256")
        words += [f"--{key}", value]
    return words
