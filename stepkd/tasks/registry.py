"""Tasks by name: ``modular`` or ``modular:terms=5,modulus=10``."""

from __future__ import annotations

import dataclasses
from typing import Any

from stepkd.errors import ConfigError, check_choice
from stepkd.tasks.addition import LongAddition
from stepkd.tasks.arithmetic import ArithmeticChain
from stepkd.tasks.base import Task
from stepkd.tasks.cellular import CellularAutomaton
from stepkd.tasks.modular import ModularChain
from stepkd.tasks.star_graph import StarGraph

TASKS: dict[str, type[Task]] = {
    task.name: task for task in (ArithmeticChain, ModularChain, LongAddition, StarGraph, CellularAutomaton)
}
"""Every task class by its name."""


def list_tasks() -> list[str]:
    """Return the names of all tasks."""
    return list(TASKS)


def get_task(spec: str) -> Task:
    """Build a task from its name and settings.

    Args:
        spec: ``name`` or ``name:key=value,key=value``, for example ``modular:terms=3-6,modulus=7``. Settings left out
            keep their defaults. `Task.spec` is such a text.

    Returns:
        The task.

    Raises:
        ConfigError: an unknown task or setting (the nearest one is named), a setting given twice or without a value,
            or a value out of range.
    """
    name, colon, settings = spec.strip().partition(":")
    check_choice("task", name, TASKS)
    task = TASKS[name]
    values: dict[str, Any] = {}
    fields = {field.name: field for field in dataclasses.fields(task)}
    for item in settings.split(",") if colon else []:
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not value:
            raise ConfigError(f"task {spec!r}: {item!r} is not of the form key=value; write e.g. {task().spec}")
        check_choice(f"setting of task {name!r}", key, fields)
        if key in values:
            raise ConfigError(f"task {spec!r}: the setting {key!r} is given twice")
        values[key] = _whole_number(f"{name}: {key}", value) if fields[key].type == "int" else value
    return task(**values)


def _whole_number(name: str, value: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise ConfigError(f"{name}={value!r} is not a whole number") from None
