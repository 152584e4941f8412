"""What the name of a model means; nothing here reaches a network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from stepkd.errors import ModelError
from stepkd.models.checkpoint import load_trained
from stepkd.models.load import load_tokenizer, model_config
from stepkd.models.policy import Policy
from stepkd.models.source import trained_template
from stepkd.models.spec import PolicyConfig
from stepkd.scorers.load import load_scorer


class Hub:
    """A hub that answers every request in one way, and counts them."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.answer: Exception | None = None

    def __call__(self, url: str, *, timeout: float) -> None:
        assert timeout <= 10
        self.asked.append(url)
        if self.answer is not None:
            raise self.answer


class Answer:
    """The part of a response that the hub's errors read."""

    def __init__(self) -> None:
        self.headers: dict[str, str] = {}
        self.status_code = 404
        self.request = None


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    """Online as far as stepkd can tell, in an empty folder with an empty cache."""
    fake = Hub()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", fake)
    return fake


def load_adapter_of(name: str) -> Any:
    folder = Path("adapter")
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(f'{{"base_model_name_or_path": "{name}"}}')
    return Policy.load(PolicyConfig(path="adapter"))


DOORS: list[Callable[[str], Any]] = [
    lambda name: Policy.load(PolicyConfig(path=name)),  # students
    load_trained,  # teachers, references, models of every command
    load_scorer,
    lambda name: load_scorer(f"judge:{name}"),
    lambda name: load_scorer(f"trl:{name}"),
    lambda name: load_scorer(f"math-shepherd:{name}"),
    lambda name: load_tokenizer(PolicyConfig(path=name)),
    lambda name: load_tokenizer(PolicyConfig(path="tiny-0.1m", tokenizer=name)),
    lambda name: model_config(PolicyConfig(path=name)),
    load_adapter_of,
]


@pytest.mark.parametrize("load", DOORS)
@pytest.mark.parametrize("name", ["nosuchmodel", "org/nosuchmodel"])
def test_a_name_that_is_nothing_costs_one_request_and_names_both_readings(
    load: Callable[[str], Any], name: str, hub: Hub
) -> None:
    hub.answer = errors.RepositoryNotFoundError("404", response=Answer())
    with pytest.raises(ModelError) as caught:
        load(name)
    assert f"no folder '{name}' here, and no model '{name}' on the hub (unknown there" in str(caught.value)
    assert len(hub.asked) == 1
    assert hub.asked[0].endswith(f"/{name}/resolve/main/config.json")


def test_a_name_that_is_nothing_is_not_searched_for_a_template(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The template may be asked for before the model is loaded, which then says what is wrong."""
    searched: list[str] = []
    monkeypatch.setattr("transformers.utils.cached_file", lambda path, *_, **__: searched.append(path))
    hub.answer = errors.RepositoryNotFoundError("404", response=Answer())
    assert trained_template("org/nosuchmodel") is None
    assert (len(hub.asked), searched) == (1, [])
    hub.answer = None
    assert trained_template("org/amodel") is None
    assert searched == ["org/amodel"]


@pytest.mark.parametrize("load", DOORS)
@pytest.mark.parametrize("name", ["runs/typo", "./typo", "/no/such", "a/b/c", "~/no-such-model"])
def test_what_can_only_be_a_folder_is_never_asked_for(load: Callable[[str], Any], name: str, hub: Hub) -> None:
    Path("runs/typos").mkdir(parents=True)
    with pytest.raises(ModelError) as caught:
        load(name)
    assert str(caught.value).startswith(("no model folder at", f"no folder '{name}' here"))
    assert ("Did you mean 'runs/typos'" in str(caught.value)) == (name == "runs/typo")
    assert not hub.asked


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (
            errors.GatedRepoError("403", response=Answer()),
            "gated: accept its terms at https://huggingface.co/org/name",
        ),
        (errors.RevisionNotFoundError("404", response=Answer()), "it has no revision 'v9'"),
        (TimeoutError("slow"), "no model 'org/name' on the hub (it cannot be reached: TimeoutError)"),
        (errors.RepositoryNotFoundError("401", response=Answer()), "if it is private, log in with hf auth login"),
    ],
)
def test_a_refusal_of_the_hub_is_told_with_its_reason(answer: Exception, expected: str, hub: Hub) -> None:
    hub.answer = answer
    for _ in range(2):  # a refusal is not remembered
        with pytest.raises(ModelError) as caught:
            Policy.load(PolicyConfig(path="org/name", revision="v9"))
        assert expected in str(caught.value)
    assert len(hub.asked) == 2


def test_offline_mode_asks_nobody(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: True)
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE is set, and it is not in the cache"):
        Policy.load(PolicyConfig(path="org/offline"))
    assert not hub.asked


def test_a_name_the_hub_does_not_allow(hub: Hub) -> None:
    with pytest.raises(ModelError, match="no name that the hub allows"):
        load_trained("org/a model?")
    assert not hub.asked


def test_a_model_in_the_cache_is_not_asked_for(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("org").mkdir()  # not even where a folder of the organisation's name is here
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: "/cache/config.json")
    with pytest.raises(ModelError, match="cannot load 'org/cached'"):  # it is not really there
        Policy.load(PolicyConfig(path="org/cached"))
    assert not hub.asked


def test_a_mistyped_preset_is_answered_with_one(hub: Hub) -> None:
    hub.answer = errors.RepositoryNotFoundError("404", response=Answer())
    with pytest.raises(ModelError, match=r"Did you mean 'tiny-0\.5m'"):
        load_trained("tiny-0.5mm")


def test_a_folder_of_runs_names_the_models_in_it(hub: Hub) -> None:
    for name in ("sft", "kdrl"):
        Path("runs", name).mkdir(parents=True)
        Path("runs", name, "last.ckpt").touch()
    Path("runs/run.json").write_text('{"kind": "quickstart", "status": "finished", "stepkd": "0"}')
    with pytest.raises(ModelError) as caught:
        load_trained("runs")
    assert "run folder (kind 'quickstart', status finished) without a checkpoint" in str(caught.value)
    assert "there are models in runs/kdrl, runs/sft" in str(caught.value)
