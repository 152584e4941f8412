"""What paths hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from left import begin

from stepkd.data.io import read_samples
from stepkd.errors import ConfigError, DataError
from stepkd.report.folders import find_folders
from stepkd.report.page import page_html


def test_folders_below_a_path_are_found_in_the_order_in_which_they_were_begun(
    tmp_path: Path, evaluation: Callable[..., Path], training: Callable[..., Path], scores: Path, claim: Path
) -> None:
    evaluation("late", minute=50)
    training("run")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "settings.json").write_text('{"theme": "of another program"}')
    found = find_folders([tmp_path])
    assert [(folder.name, folder.kind) for folder in found] == [
        ("run", "fit"),
        ("scores", "scoring job"),
        ("claim", "claim"),
        ("late", "evaluation"),
    ]
    assert all(folder.state == "finished" for folder in found)


def test_a_folder_given_twice_is_one_and_several_paths_keep_their_names(
    tmp_path: Path, evaluation: Callable[..., Path]
) -> None:
    a, b = evaluation("one/evals/x", minute=1), evaluation("two/evals/x", minute=2)
    assert [folder.name for folder in find_folders([a.parents[1], a, b.parents[1]])] == ["one/evals/x", "two/evals/x"]
    assert [folder.name for folder in find_folders([a])] == ["x"]


def test_links_that_lead_in_a_circle_are_not_followed(tmp_path: Path, scores: Path) -> None:
    (scores / "round").symlink_to(tmp_path)
    assert [folder.name for folder in find_folders([tmp_path])] == ["scores"]


def test_a_trainer_of_ones_own_that_logs_is_a_training(training: Callable[..., Path]) -> None:
    run = training("run", rollouts=True)
    (run / "run.json").unlink()
    (folder,) = find_folders([run / "metrics.jsonl"])
    assert (folder.kind, folder.name, len(folder.solutions)) == ("fit", "run", 2)


def test_settings_are_flat_and_those_without_a_value_are_left_out(training: Callable[..., Path]) -> None:
    (folder,) = find_folders([training("run")])
    assert folder.settings["optimizer.lr"] == 0.001
    assert folder.settings["model.class_path"] == "stepkd.modules.SFTModule"


def test_an_unfinished_evaluation_has_the_rows_that_are_done(evaluation: Callable[..., Path]) -> None:
    (folder,) = find_folders([evaluation("running", finished=False)])
    assert folder.state == "unfinished"
    assert len(folder.rows) == 4
    assert folder.summary == {}


def test_a_path_without_anything_is_refused_with_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist: give the --out"):
        find_folders([tmp_path / "none"])
    with pytest.raises(ConfigError, match="holds nothing that a command left"):
        find_folders([tmp_path])


def test_damaged_rows_are_refused_with_their_file(evaluation: Callable[..., Path]) -> None:
    folder = evaluation("broken")
    (folder / "results.jsonl").write_text('{"id": "a"\n')
    with pytest.raises(DataError, match=r"broken/results.jsonl: a damaged part"):
        _ = find_folders([folder])[0].rows


def test_folders_of_one_last_name_have_names_that_tell_them_apart(evaluation: Callable[..., Path]) -> None:
    a, b = evaluation("exp1/gsm8k", minute=1), evaluation("exp2/gsm8k", minute=2)
    assert [folder.name for folder in find_folders([a, b])] == ["exp1/gsm8k", "exp2/gsm8k"]
    other = evaluation("exp2/math", minute=3)
    assert [folder.name for folder in find_folders([a, other])] == ["gsm8k", "math"]
    assert [folder.name for folder in find_folders([a, a])] == ["gsm8k"]


@pytest.mark.parametrize("text", ['{"id": "a"}\n', '["step"]\n', "3\n", "no JSON\n", "", '{"step": 0, "samples": []}'])
def test_files_of_other_programs_and_torn_ones_are_no_training(
    tmp_path: Path, scores: Path, training: Callable[..., Path], text: str
) -> None:
    run = training("run")
    (tmp_path / "data").mkdir()
    for name in ("samples.jsonl", "metrics.jsonl"):
        (tmp_path / "data" / name).write_text(text)
    (run / "samples.jsonl").write_text(text)
    found = find_folders([tmp_path])
    assert [(folder.name, len(folder.solutions)) for folder in found] == [("run", 0), ("scores", 8)]
    assert page_html("t", found, 5)


def test_samples_of_another_program_are_refused(tmp_path: Path) -> None:
    for text in ("3\n", "no JSON\n", '{"samples": []}\n'):
        (tmp_path / "samples.jsonl").write_text(text)
        with pytest.raises(DataError, match="not the samples of a run"):
            read_samples(tmp_path)


def test_a_teachers_cache_has_no_state_since_it_has_no_summary(tmp_path: Path) -> None:
    begin(tmp_path / "cache", "teacher's cache", 1)
    assert [folder.state for folder in find_folders([tmp_path])] == [""]


@pytest.mark.parametrize("text", ["{", "3", "[1]"])
def test_a_damaged_summary_is_refused_with_its_file(evaluation: Callable[..., Path], text: str) -> None:
    folder = evaluation("broken")
    (folder / "summary.json").write_text(text)
    with pytest.raises(DataError, match=r"broken/summary.json: damaged"):
        _ = find_folders([folder])[0].summary
