"""Teachers, divergences and engines are chosen by name through fit's own parser, each with its own settings alone."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from stepkd.data.templates import PromptTemplate
from stepkd.errors import ConfigError
from stepkd.modules.gkd_settings import JSD, Beside, SkewReverseKL
from stepkd.sampling.config import Transformers, VLLMServer
from stepkd.teachers.config import Local, Routed, SelfAverage, Served, TopK
from stepkd.teachers.own import AverageTeacher
from stepkd.teachers.routed import RoutedTeacher
from stepkd.teachers.server import ServerTeacher
from stepkd.training.fit import check_fit


def parsed(*words: str, settings: dict[str, Any] | None = None) -> Any:
    return check_fit(["tiny/gkd"], settings, words=words).module


def test_a_recipe_names_its_teacher() -> None:
    module = parsed("--model.teacher.path", "x", "--model.teacher.top_k.k", "4")
    assert module.arguments["teacher"] == Local("x", top_k=TopK(4))
    assert module.divergence == JSD(scaled=True)
    assert module.engine == Transformers()


def test_the_command_line_chooses_others_and_leaves_what_only_the_old_one_had() -> None:
    module = parsed(
        *("--model.teacher", "Served", "--model.teacher.urls", "http://x", "--model.teacher.top_k.k", "8"),
        *("--model.divergence", "SkewReverseKL", "--model.divergence.skew", "0.2", "--model.cross_entropy", "Beside"),
        *("--model.engine", "VLLMServer", "--model.engine.urls", "http://y"),
    )
    assert module.arguments["teacher"] == Served("http://x", top_k=TopK(8))
    assert isinstance(module.teacher, ServerTeacher)
    assert module.teacher.spec == Served("http://x", top_k=TopK(8))
    assert module.divergence == SkewReverseKL(skew=0.2)
    assert module.cross_entropy == Beside(1.0)
    assert module.engine == VLLMServer("http://y")


def test_a_settings_file_chooses_by_class_path() -> None:
    text = "{teacher: {class_path: SelfAverage, init_args: {decay: 0.9}}, source: {sampling: {temperature: 0.7}}}"
    module = parsed(settings={"model": {"init_args": yaml.safe_load(text)}})
    assert module.arguments["teacher"] == SelfAverage(0.9)
    assert isinstance(module.teacher, AverageTeacher)
    sampling = module.source.sampling
    assert (sampling.temperature, sampling.max_new_tokens) == (0.7, 64), "the recipe's length stays"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.teacher", "Serve"], "model.teacher: no class 'Serve'; did you mean 'Served'"),
        (["--model.teacher", "Served"], "model.teacher.urls"),
        (["--model.teacher", "SelfBase", "--model.teacher.decay", "0.5"], "'decay' is not a setting of model.teacher"),
        (["--model.teacher.dtyp", "float32"], "'dtyp' is not a setting of model.teacher; did you mean .*dtype"),
        (["--model.divergence", "ForwardKL", "--model.divergence.beta", "0.5"], "is not a setting of model.divergence"),
        (["--model.teacher", "SelfAverage", "--model.teacher.decay", "x"], "model.teacher.decay: expected float"),
    ],
)
def test_a_mistake_is_told_of_the_chosen_class_alone(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parsed(*words)
    assert "Local" not in str(caught.value)


def test_a_map_of_teachers_is_read_by_the_column_that_routes() -> None:
    text = (
        "{teacher: {class_path: Routed, init_args: {column: kind, teachers: {math: {class_path: Local, "
        "init_args: {path: x, top_k: {k: 4}}}, code: {class_path: Served, "
        "init_args: {urls: 'http://y', template: {system: Add.}}}}}}}"
    )
    module = parsed(settings={"model": {"init_args": yaml.safe_load(text)}})
    served = Served("http://y", template=PromptTemplate(system="Add."))
    assert module.arguments["teacher"] == Routed({"math": Local("x", top_k=TopK(4)), "code": served}, "kind")
    assert isinstance(module.teacher, RoutedTeacher)
    assert list(module.teacher.teachers) == ["code", "math"]
