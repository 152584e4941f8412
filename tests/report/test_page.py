"""The page: escaping, policy, size, anchors; and every kind of folder has its section."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from left import HOSTILE, begin, evaluation_rows, scored_rows, search_rows

from stepkd.evaluation.process import summarise_process
from stepkd.report.folders import find_folders
from stepkd.report.page import page_html, write_report
from stepkd.runs.files import write_json, write_jsonl
from stepkd.runs.job import Job, JobOptions


class Parsed(HTMLParser):
    """Elements with their attributes, and texts by the element that holds them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append((self.elements[-1][0] if self.elements else "", data))

    def named(self, tag: str) -> list[dict[str, str | None]]:
        """Attributes of every such element."""
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def data(self) -> Any:
        """The embedded solutions."""
        (text,) = (data for tag, data in self.texts if tag == "script" and data.startswith("["))
        return json.loads(text)

    @property
    def words(self) -> str:
        """All text outside scripts and style sheets."""
        return " ".join(" ".join(data for tag, data in self.texts if tag not in ("script", "style")).split())


def page(*paths: Path, most: int = 500) -> Parsed:
    return Parsed(page_html("title", find_folders(paths), most))


def test_hostile_texts_are_text_everywhere(tmp_path: Path) -> None:
    rows = []
    for number, text in enumerate(HOSTILE):
        (row,) = evaluation_rows("f")
        row["samples"][0] |= {"completion": text, "extracted": text, "step_labels": None}
        rows.append(row | {"id": text, "index": number, "prompt": text, "answer": text})
    name = "</script><img src=x onerror=alert(1)>"
    folder = tmp_path / name.replace("/", "∕")
    begin(folder, "evaluation", 1, benchmark={"name": HOSTILE[0], "data": "d"}, **{text: text for text in HOSTILE})
    write_jsonl(folder / "results.jsonl", rows)
    html = page_html(HOSTILE[0], find_folders([folder]), 500)
    found = Parsed(html)
    assert not {tag for tag, _ in found.elements} & {"img", "iframe", "object", "embed", "link", "base", "image"}
    assert len(found.named("script")) == 2
    assert not any(
        key.startswith("on") or key in ("src", "style", "srcdoc") for _, each in found.elements for key in each
    )
    assert not re.search("[\u202a-\u202e\u2066-\u2069\x07\ud800-\udfff]", html)
    assert [each["id"] for each in found.data][:2] == list(HOSTILE[:2])
    assert found.data[3]["prompt"] == "right⟨U+202E⟩left ⟨U+2066⟩isolate⟨U+2069⟩ bell⟨U+0007⟩ half⟨U+D800⟩"
    assert found.data[0]["solutions"][0]["steps"] == [HOSTILE[0]]
    assert HOSTILE[2] in found.words  # a setting: no template reads it again
    assert "7 * 7" in found.words


def test_the_policy_allows_the_pages_own_script_and_style_and_no_connection(quickstart: Path) -> None:
    html = page_html("t", find_folders([quickstart]), 500)
    policy = next(each["content"] for each in Parsed(html).named("meta") if each.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    for name, text in (
        ("style-src", html.partition("<style>")[2].partition("</style>")[0]),
        ("script-src", html.rpartition("<script>")[2].partition("</script>")[0]),
    ):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{name} 'sha256-{digest}'" in policy
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!#)|url\((?!#)|@import|https?://""", html)


def test_anchors_are_unique_and_every_link_has_its_target(quickstart: Path, search: Path) -> None:
    rows = [row | {"id": name} for row, name in zip(evaluation_rows("ccc"), ("a b", "a/b", "a-b"), strict=True)]
    begin(quickstart / "odd", "evaluation", 40, benchmark={"name": "task", "data": "d"})
    write_jsonl(quickstart / "odd" / "results.jsonl", rows)
    found = page(quickstart)
    anchors = [each["anchor"] for each in found.data]
    assert len(set(anchors)) == len(anchors)
    assert {"problem-a-b", "problem-p0"} <= set(anchors)
    ids = [each["id"] for _, each in found.elements if "id" in each]
    assert len(set(ids)) == len(ids)
    links = {each["href"] for each in found.named("a")}
    assert {link for link in links if link and not link.startswith("#show-")} <= {f"#{each}" for each in ids}


def test_every_kind_of_folder_has_its_sections(quickstart: Path, judgement: Path, claim: Path, iterated: Path) -> None:
    found = page(quickstart)
    titles = ["What ran", "Claims", "Accuracy", "Iterations", "Best of N", "Step scores", "Step labels", "Training"]
    assert re.findall(r"nav (.*?) Skip", "nav " + found.words + " Skip")  # there is text at all
    for title in [*titles, "Lengths", "Solutions", "Settings"]:
        assert title in found.words
    for number in ("b_beats_a: reproduced", "0.250 0.125 to 0.375", "paper: +3.0", "it is no result"):
        assert number in found.words  # claims
    for number in ("iterated: 64 problems", "▲ +6.2 +3.0 to +9.0"):
        assert number in found.words  # iterations
    for number in ("task modular, percent", "student-sampled minus teacher-sampled", "75.0", "-25.0 -50.0 to"):
        assert number in found.words  # accuracy: six of eight samples, and the difference
    for number in ("prm: 9 problems, percent", "some sample correct (ceiling) 50.0 40.0 to 60.0"):
        assert number in found.words
    assert "judged, gsm8k" in found.words
    assert "modular:terms=4" in found.words


def test_a_critics_own_prediction_stands_below_its_f1_by_a_threshold(judgement: Path) -> None:
    summary = json.loads((judgement / "summary.json").read_text())
    section = summary["sets"]["gsm8k"]
    section |= {"predicted": section["fixed"], "critiques": {"critiques": 6, "generated_tokens": 77}}
    section |= {
        "order_swap": None,
        "independent_swap": {"change_rate": section["fixed"]["f1"] | {"value": 0.123}, "swaps": 31},
    }
    write_json(judgement / "summary.json", summary)
    found = page(judgement).words
    assert "judged, gsm8k: the critic's own prediction (6 critiques, 77 tokens)" in found
    assert "Two lines exchanged scorer and set score falls, % dependent pairs score moves, %" in found
    row = found.partition("score moves, % independent pairs")[2]
    assert re.search(r"judged, gsm8k +12\.3 [-0-9. to]*31 ", row), row[:200]


def test_what_chance_gives_and_the_mean_of_subsets_stand_beside_first_errors(judgement: Path) -> None:
    rows = [json.loads(line) for line in (judgement / "results.jsonl").read_text().splitlines()]
    both = [*rows, *({**row, "set": "math", "id": f"math/{n}", "error_type": "own"} for n, row in enumerate(rows))]
    summary = summarise_process([{**row, "ignored_errors": 2 * ("error_type" in row)} for row in both])
    write_json(judgement / "summary.json", summary)
    found = page(judgement).words
    (chance,) = {f"{100 * each['baselines']['random']['f1']:.1f}" for each in summary["sets"].values()}
    first = found.partition("F1 at random, %")[2]
    assert f" {chance} " in first
    assert "judged: mean of 2 subsets of ProcessBench" in first
    chances = summary["sets"]["math"]["prm_score"]["all"]["baselines"]
    of_both = " ".join(f"{100 * chances[rule]:.1f}" for rule in ("always positive", "random"))
    assert f" {of_both} 6 " in found.partition("PRMScore: judged")[2]
    assert "12 numbers of incorrect steps lie behind the last step and count no step." in found


@pytest.mark.parametrize(
    "given", ["search", "evaluation", "training", "labels", "scores", "judgement", "claim", "iterated"]
)
def test_a_folder_alone_makes_a_page_without_the_sections_it_has_nothing_for(
    given: str, request: pytest.FixtureRequest
) -> None:
    made = request.getfixturevalue(given)
    found = page(made("alone") if callable(made) else made)
    assert "What ran" in found.words
    expected = {
        "evaluation": {"accuracy", "lengths", "solutions"},
        "training": {"curves"},
        "search": {"methods", "lengths", "solutions"},
        "labels": {"labels", "lengths", "solutions"},
        "scores": {"best-of-n", "scores", "lengths", "solutions"},
        "judgement": {"scores", "lengths", "solutions"},
        "claim": {"claims"},
        "iterated": {"iterations"},
    }[given]
    sections = {str(each["id"]) for each in found.named("section")}
    assert sections - {"runs", "settings"} == expected


def test_the_main_settings_are_short_and_secrets_are_hidden(quickstart: Path) -> None:
    found = page(quickstart)
    assert "from labels/x" in found.words  # the policy's path, without the place of the run folder
    assert "hf_secret" not in found.words
    assert "hub.token (hidden)" in found.words


def test_a_search_has_its_table_of_methods_its_curves_and_its_bins(search: Path) -> None:
    words = page(search).words
    for text in ("search: methods and their cost", "minus best of N, points", "costs 6.0", "4.0", "by product of"):
        assert text in words
    assert re.search(r"4 beam@4x2 83\.3 [\d.]+ to [\d.]+ 60 160 8\.0 13\.89 .* ▲? ?\+50\.0", words)
    assert "best N fall from there, points" in words
    assert "0 (n = 1)" in words
    assert "on 4 samples of every problem" in words


def test_answers_of_a_search_have_their_decisions_as_text(search: Path) -> None:
    found = page(search)
    (problem,) = (each for each in found.data if each["id"] == "s2")
    runs = {each["run"]: each for each in problem["solutions"]}
    assert list(runs) == [f"search, {name}" for name in ("greedy", "self_consistency@4", "best_of_n@4", "beam@4x2")]
    assert runs["search, greedy"]["trace"] == []
    prune, choice = runs["search, beam@4x2"]["trace"]
    assert (prune["head"], prune["told"]) == ("step 1, prune, kept 2 of 4", True)
    assert prune["candidates"][0] == ["first", 0.9, 1, ""]
    assert prune["candidates"][2:] == [["<b>third</b>", 0.1, 0, ""], ["⟨U+202E⟩fourth", None, 0, ""]]
    assert choice["candidates"] == [["solution 1", 0.9, 1, "answer 3"], ["solution 2", 0.2, 0, ""]]
    assert choice["head"] == "choice, kept 1 of 2, vote weighted"
    best = runs["search, best_of_n@4"]
    assert (best["steps"], best["scores"]) == (["pool 2", "#### 3"], [0.9, None])  # as the shared sample was scored
    assert (best["labels"], best["values"]) == ([True, True], {"score": 0.9, "tokens drawn": 40, "scorer calls": 4})


def test_filters_count_all_solutions_and_the_page_holds_some(quickstart: Path) -> None:
    found = page(quickstart, most=4)
    assert sum(len(each["solutions"]) for each in found.data) == 4
    assert "4 of 26 solutions" in found.words
    assert "all solutions 26" in found.words
    assert "correct answer with an incorrect step 4" in found.words
    assert page(quickstart, most=0).data == []


@pytest.mark.slow
def test_decisions_that_are_too_long_end_with_how_many_are_missing(tmp_path: Path, search: Path) -> None:
    rows = []
    for number in range(500):
        row = search_rows(1)[-1] | {"id": f"s{number}", "index": number}
        steps = [f"{i} " + "数" * 400 for i in range(16)]
        row["trace"] = [{"event": "prune", "step": i, "steps": steps, "scores": [0.1] * 16} for i in range(40)]
        rows.append(row)
    write_jsonl(search / "results.jsonl", rows)
    path = write_report([search])
    assert path.stat().st_size < 5_000_000
    found = Parsed(path.read_text()).data
    assert sum(len(each["solutions"]) for each in found) == 500
    assert found[7]["solutions"][0]["untold"] == "… 40 more rounds"
    rows = rows[:50]
    write_jsonl(search / "results.jsonl", rows)
    (solution,) = page(search).data[7]["solutions"]
    assert re.fullmatch(r"… \d+ more rounds", solution["untold"])
    assert 0 < len(solution["trace"]) < 40
    assert solution["trace"][0]["candidates"][0][0].endswith(" more characters")


@pytest.mark.slow
def test_500_long_solutions_stay_below_5_mb(tmp_path: Path) -> None:
    rows = []
    for number in range(500):
        row = scored_rows(scores=False)[0] | {"id": f"q{number}/0", "problem_id": f"q{number}", "prompt": "p" * 40_000}
        steps = [f"{number} {i} " + "数" * 40 for i in range(300)]
        rows.append(row | {"steps": steps, "step_labels": [True] * 300, "step_values": [0.123456789] * 300})
    begin(tmp_path / "long", "labelling job", 1)
    write_jsonl(tmp_path / "long" / "labels.jsonl", rows)
    path = write_report([tmp_path / "long"])
    assert path == tmp_path / "long" / "report.html"
    assert path.stat().st_size < 5_000_000
    found = Parsed(path.read_text())
    assert len(found.data) == 500
    assert re.fullmatch(r"… \d+ more steps", found.data[7]["solutions"][0]["more"])
    assert found.data[7]["prompt"].endswith(" more characters")


def test_the_same_folders_give_the_same_page(quickstart: Path) -> None:
    folders = find_folders([quickstart])
    assert page_html("t", folders, 500) == page_html("t", find_folders([quickstart]), 500)


def test_a_report_in_a_jobs_folder_hinders_neither_resuming_nor_overwriting(tmp_path: Path, scores: Path) -> None:
    write_report([scores])
    again = Job(scores, "scoring job", ("results.jsonl", "summary.json"), JobOptions(overwrite=True))
    again.begin({"reduction": "min"})
    assert not (scores / "report.html").exists()
    write_json(scores / "report.html", {})
    Job(scores, "scoring job").begin({"reduction": "min"})


def test_an_evaluation_that_is_not_finished_shows_what_is_done(evaluation: Callable[..., Path]) -> None:
    found = page(evaluation("running", finished=False))
    assert "unfinished" in found.words
    assert "75.0" in found.words


def test_scores_without_labels_have_a_page_without_first_incorrect_steps(scores: Path) -> None:
    write_jsonl(scores / "results.jsonl", [{**row, "step_labels": None} for row in scored_rows()])
    found = page(scores)
    assert "scores: lowest score" in found.words
    assert "First incorrect steps" not in found.words


def test_secrets_are_hidden_where_settings_differ(tmp_path: Path) -> None:
    for number, name in enumerate(("a", "b")):
        secrets = {"api_key": f"k1-{number}", "access_key": f"k2-{number}", "env": {"HF_TOKEN": f"k3-{number}"}}
        begin(tmp_path / name, "evaluation", number, seed=number, tokens=64 + number, **secrets)
    found = page(tmp_path)
    assert "Settings that differ" in found.words
    assert "tokens 64 65" in found.words
    assert not re.search(r"k[123]-[01]", found.words)
    assert "access_key (hidden)" in found.words


def test_what_a_shortened_solution_lacks_has_no_mark(tmp_path: Path) -> None:
    (row,) = scored_rows(scores=False)[:1]
    steps = [f"{i} " + "x" * 40_000 for i in range(100)]
    for end in range(70, 80):  # the first incorrect step and a disagreement, about where the page's part ends
        marks = {"step_labels": [i != end for i in range(100)], "step_scores": [0.9] * 100}
        begin(tmp_path / f"{end}", "scoring job", 1)
        write_jsonl(tmp_path / f"{end}" / "results.jsonl", [{**row, **marks, "steps": steps}])
        (solution,) = page(tmp_path / f"{end}").data[0]["solutions"]
        kept = len(solution["steps"])
        assert 70 < kept < 80
        assert solution["more"] == f"… {100 - kept} more steps"
        assert len(solution["labels"]) == len(solution["scores"]) == kept
        assert all(i < kept for i in solution["disagrees"])


def test_problems_of_one_id_stand_under_their_own_prompts_and_answers(evaluation: Callable[..., Path]) -> None:
    (row,) = evaluation_rows("c")
    a = evaluation("a", rows=[row | {"id": "test/0", "prompt": "one", "answer": "1"}])
    b = evaluation("b", rows=[row | {"id": "test/0", "prompt": "two", "answer": "2"}])
    for most in (500, 4):
        found = page(a, b, most=most).data
        heads = [(each["prompt"], each["answer"], {own["run"] for own in each["solutions"]}) for each in found]
        assert heads == [("one", "1", {"a"}), ("two", "2", {"b"})]
    assert len({each["anchor"] for each in found}) == 2


def test_killed_quick_starts_and_iterated_trainings_say_how_far_they_came(quickstart: Path, iterated: Path) -> None:
    folders = quickstart, iterated
    for stages, iterations, states in (
        ("null", 2, ("2 of 8 stages", "2 of 3 models")),
        ("[teacher, prm]", 1, ("finished", "finished")),
    ):
        (quickstart / "config.yaml").write_text(f"stages: {stages}\n")
        (iterated / "config.yaml").write_text(f"iterations: {iterations}\n")
        found = {folder.path: folder.state for folder in find_folders([quickstart])}
        assert tuple(found[each] for each in folders) == states
        assert all((each in page(quickstart).words) == (each != "finished") for each in states)


def test_variants_of_a_claim_are_named(claim: Path) -> None:
    assert "main: pass@1" not in page(claim).words
    found = json.loads((claim / "summary.json").read_text())
    own = found["b_beats_a"]
    own["metrics"]["small"] = own["metrics"]["main"]
    own["statements"] = [{**own["statements"][0], "variant": name} for name in ("main", "small")]
    write_json(claim / "summary.json", found)
    for name in ("main", "small"):
        assert f"{name}: pass@1: b > a" in page(claim).words


def test_columns_that_are_no_percentages_are_named(iterated: Path) -> None:
    assert "iterated: 64 problems, percent except tokens" in page(iterated).words


def test_values_of_another_type_than_their_column_are_left_out(scores: Path) -> None:
    odd = {"tokens": [1], "reward": "high", "rewards": [1.0], "score": float("nan"), "step": "2", "correct": "yes"}
    rows = [{**row, **odd, "step_scores": [float("inf"), "x", 0.5], "labels": 3} for row in scored_rows()]
    (scores / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for each in (own for problem in page(scores).data for own in problem["solutions"]):
        assert each["scores"] == [None, None, 0.5]
        assert each["values"] == {"reward": None, "score": None}
        assert (each["tokens"] >= 5, each["correct"]) == (True, None)


def test_what_sampled_stands_with_build_dtype_and_tokens(
    evaluation: Callable[..., Path], labels: Path, tmp_path: Path
) -> None:
    here = {"engine": {"name": "Transformers"}, "versions": {"transformers": "5.23.0"}, "dtype": "float32"}
    served = {"name": "VLLMServer", "vllm": "0.30.0", "dtype": "torch.bfloat16"}
    paths = [
        evaluation("here", **here),
        evaluation("served", engine=served, dtype="float32"),
        evaluation("silent", engine={**served, "dtype": "None"}, dtype="float32"),
        evaluation("older"),
        labels,
    ]
    settings = json.loads((labels / "settings.json").read_text())
    own = {"engine": {"name": "VLLM", "vllm": "0.30.0"}, "model": {"name": "m", "dtype": "bfloat16"}}
    write_json(labels / "settings.json", {**settings, **own})
    summary = json.loads((labels / "summary.json").read_text())
    counts = {"sampling": {"tokens_generated": 1000}, "labelling": {"generated_tokens": 234}}
    write_json(labels / "summary.json", {**summary, **counts})
    words = page(*paths).words
    # Four problems: of lengths 10 to 13, and the last one, which was cut off, of 90, with a correct one beside each.
    tokens = sum((10, 10, 11, 11, 12, 12, 90, 13))
    assert f"here Transformers transformers 5.23.0 float32 {tokens}" in words
    assert f"served VLLMServer vLLM 0.30.0 bfloat16 {tokens}" in words
    assert f"silent VLLMServer vLLM 0.30.0 – {tokens}" in words
    assert "labels VLLM vLLM 0.30.0 bfloat16 1,234" in words
