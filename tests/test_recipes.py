"""Every recipe parses, stays short, says how to run it, and builds with a tiny model; overlays fit all methods."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from stepkd.data.templates import TEMPLATES
from stepkd.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1] / "recipes"
ITERATED = sorted([*ROOT.glob("iterate_*.yaml"), *(ROOT / "tiny").glob("iterate_*.yaml")])
DEBUG = ROOT / "debug.yaml"
METHODS = sorted(path for path in ROOT.glob("*.yaml") if path not in [*ITERATED, DEBUG])
TINY = sorted(path for path in (ROOT / "tiny").glob("*.yaml") if path not in ITERATED)
OVERLAYS = sorted((ROOT / "base").glob("*.yaml"))
TEACHERS = sorted((ROOT / "teacher").glob("*.yaml"))
ENGINES = sorted((ROOT / "engine").glob("*.yaml"))
EVALUATIONS = sorted((ROOT / "eval").glob("*.yaml"))
SEARCHES = sorted((ROOT / "search").glob("*.yaml"))
PARITY = sorted((ROOT / "parity").glob("*.yaml"))
SCORERS = [path for path in PARITY if "\nscorer:" in path.read_text(encoding="utf-8")]
LOGGERS = sorted((ROOT / "logger").glob("*.yaml"))
STRATEGIES = sorted((ROOT / "strategy").glob("*.yaml"))
CLAIMS = sorted((ROOT / "claims").glob("*.yaml"))
SHARED = sorted((ROOT / "claims" / "base").glob("*.yaml"))
EVERY = sorted(ROOT.rglob("*.yaml"))


def instantiate(*configs: Path, extra: Sequence[str] = (), build: bool = True) -> Any:
    """Parse and (unless told otherwise) build module and data through the real command-line class."""
    from stepkd.training.fit import StepkdCLI

    class OnlyParsed(StepkdCLI):
        def instantiate_classes(self) -> None:
            pass

    cli = StepkdCLI() if build else OnlyParsed()
    cli.start([*(part for config in configs for part in ("--config", str(config))), *extra], run=False)
    return cli


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", EVERY, ids=name)
def test_house_rules(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    settings = [line for line in lines if line.strip() and not line.startswith("#")]
    assert len(settings) <= 40, f"{len(settings)} lines of settings"
    assert lines[0].startswith("# ")
    if path in METHODS + TINY + ITERATED:
        assert any(f"recipes/{name(path)}" in line and line.startswith("#") for line in lines), (
            "no command in the header"
        )
    elif path in CLAIMS:  # tests/claims/test_claim_recipes.py checks what they run
        assert any(f"stepkd claims run {path.stem}" in line and line.startswith("#") for line in lines), (
            "no command in the header"
        )
    elif path in SEARCHES:
        assert any(f"--config search/{path.stem}" in line and line.startswith("#") for line in lines), (
            "no command in the header"
        )
    elif path not in [*SHARED, *SCORERS]:
        assert not has_list(yaml.safe_load("\n".join(lines))), "a list in an overlay replaces the method's list"


@pytest.mark.parametrize("benchmark", ["aime24", "math500", "gsm8k"])
@pytest.mark.parametrize("path", EVALUATIONS, ids=name)
def test_settings_of_evaluations_draw_what_the_field_draws(path: Path, benchmark: str) -> None:
    from stepkd.cli.parser import parse
    from stepkd.evaluation.config import EvaluateConfig

    words = ["--config", f"eval/{path.stem}", "--model", "tiny-0.1m", "--benchmark", benchmark, "--out", "x"]
    config = parse(EvaluateConfig, words, command="evaluate")
    many = {"aime24": 64, "math500": 4, "gsm8k": 1}[benchmark] if path.stem == "sampled" else 1
    assert (config.drawn.n, config.drawn.temperature) == (many, 0.6 if path.stem == "sampled" else 0)
    assert config.drawn.max_new_tokens == {"aime24": 4096, "math500": 2048, "gsm8k": 1024}[benchmark]
    if path.stem == "sampled":
        assert parse(EvaluateConfig, [*words, "--sampling.n", "8"], command="evaluate").drawn.n == 8


def test_every_search_method_has_a_recipe() -> None:
    from stepkd.evaluation.config import METHODS

    named = {each["class_path"] for path in SEARCHES for each in yaml.safe_load(path.read_text("utf-8"))["methods"]}
    assert named | {"Greedy"} == {method.__name__ for method in METHODS}, "Greedy is run by every one"


@pytest.mark.parametrize("path", SEARCHES, ids=name)
def test_searches_take_the_model_and_scorer_of_the_command_line(path: Path, tmp_path: Path) -> None:
    from stepkd.cli.parser import parse
    from stepkd.evaluation.config import SearchJobConfig
    from stepkd.yaml_files import yaml_text

    words = ["--config", f"search/{path.stem}", "--model", "tiny-0.1m", "--scorer", "checker", "--out", "x"]
    config = parse(SearchJobConfig, words, command="search")
    names = [method.name for method in config.all_methods]
    assert (names[0], config.model, config.scorer) == ("greedy", "tiny-0.1m", "checker")
    assert len(names) > 1
    (tmp_path / "config.yaml").write_text(yaml_text(config))
    again = parse(SearchJobConfig, ["--config", str(tmp_path / "config.yaml")], command="search")
    assert again == config, "config.yaml of a job starts it again"


PUBLISHED = {
    "qwen2.5-math-prm-7b": [(72.0, 96.4), (68.0, 90.4), (55.7, 85.5), (55.2, 83.0)],
    "math-shepherd-7b": [(32.4, 91.7), (18.0, 82.0), (15.0, 71.1), (14.2, 73.0)],
    "qwen2.5-math-1.5b-prm800k": [(22.71, 93.78), (38.22, 70.69), (27.08, 53.98), (27.93, 54.77)],
}
"""Accuracies in percent on solutions with and without an error, of ProcessBench's four subsets; the first recipe's are
from memory, and give the four F1 that are quoted."""


@pytest.mark.parametrize("path", SCORERS, ids=name)
def test_parity_of_reward_models_is_the_mean_f1_of_four_subsets(path: Path) -> None:
    from stepkd.cli.parser import parse
    from stepkd.data.sources.problems import SUBSETS
    from stepkd.evaluation.config import EvaluatePRMConfig

    words = ["--config", f"parity/{path.stem}", "--check_parity", "--out", "x"]
    config = parse(EvaluatePRMConfig, words, command="evaluate-prm")
    reference = config.reference
    assert reference is not None
    assert (config.sets, config.limit, reference.ran) == (SUBSETS, None, "not run here")
    header = path.read_text(encoding="utf-8").partition("\nscorer:")[0]
    assert f"--config parity/{path.stem}" in header
    assert "Not run here" in header
    f1, variance = [], 0.0
    for (a, b), n, m in zip(PUBLISHED[path.stem], (207, 594, 661, 759), (193, 406, 339, 241), strict=True):
        f1.append(2 * a * b / (a + b))
        slopes = 2 * b * b / (a + b) ** 2, 2 * a * a / (a + b) ** 2
        variance += slopes[0] ** 2 * a * (100 - a) / n + slopes[1] ** 2 * b * (100 - b) / m
    half = 1.96 * variance**0.5 / 4
    quoted = [float(each) for each in re.findall(r"\b\d\d\.\d+\b", reference.source)][:4]
    assert quoted == pytest.approx(f1, abs=0.06)
    accepted = [sum(f1) / 4 + each for each in (0, -half, half)]
    assert [reference.value, reference.low, reference.high] == pytest.approx(accepted, abs=0.1)


@pytest.mark.parametrize("path", [path for path in PARITY if path not in SCORERS], ids=name)
def test_recipes_of_parity_say_what_was_measured_where_and_what_is_accepted(path: Path) -> None:
    from stepkd.cli.parser import parse
    from stepkd.evaluation.config import EvaluateConfig
    from stepkd.statistics import wilson_interval

    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert {"model", "benchmark", "template", "style", "sampling", "reference"} <= set(raw), (
        "nothing is left to defaults"
    )
    assert {"temperature", "max_new_tokens"} <= set(raw["sampling"])
    words = ["--config", f"parity/{path.stem}", "--check_parity", "--out", "x"]
    config = parse(EvaluateConfig, words, command="evaluate")
    reference = config.reference
    assert reference is not None
    assert all(text.strip() for text in (reference.source, reference.settings, reference.ran))
    problems = config.limit or {"gsm8k": 1319, "math500": 500}[config.benchmark]
    accepted = wilson_interval(reference.value / 100 * problems, problems)
    assert [reference.low, reference.high] == pytest.approx([100 * accepted.low, 100 * accepted.high], abs=0.06)
    header = path.read_text(encoding="utf-8").partition("\nmodel:")[0]
    assert f"--config parity/{path.stem}" in header
    assert ("Not run here" in header) == (reference.ran == "not run here")


def has_list(value: Any) -> bool:
    if isinstance(value, dict):
        return any(has_list(item) for item in value.values())
    return isinstance(value, list)


@cache
def distilling() -> list[Path]:
    """Methods whose teacher is another model."""

    def teacher(path: Path) -> dict[str, Any]:
        return yaml.safe_load(path.read_text(encoding="utf-8"))["model"]["init_args"].get("teacher", {})

    return [path for path in METHODS + TINY if teacher(path).get("class_path") == "Local"]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS + TINY, ids=name)
def test_method_builds_with_a_tiny_model_for_a_first_look(method: Path) -> None:
    extra = ["--model.policy.path", "tiny-0.1m"]
    extra += ["--model.teacher.path", "tiny-0.1m"] if method in distilling() else []
    if "StepDistillation" in method.read_text(encoding="utf-8"):  # its teacher is a reward model that is not there
        extra += ["--model.losses", "[StepCrossEntropy]"]
    cli = instantiate(method, ROOT / "base" / "tiny.yaml", DEBUG, extra=extra)
    assert cli.model.policy_spec.lora is None, "base/tiny.yaml takes it away"
    assert (cli.config.trainer.max_steps, cli.config.checkpoint.every_n_steps) == (4, None)
    assert cli.config.data.init_args.train.limit == 64
    cli.model.configure_model()
    assert cli.model.policy.trainable_parameters()


def samples(method: Path) -> bool:
    return re.search("    (rollout|source):", method.read_text(encoding="utf-8")) is not None


def compositions() -> Iterator[Any]:
    """A method with an overlay of every kind at a time.

    SFT and GKD with every overlay there is of a kind, distillation with every teacher, what samples with every engine,
    and every method with FSDP2, QLoRA and a logger. An overlay changes its own section alone: crossing all of them
    says no more.
    """
    qlora = next(path for path in OVERLAYS if path.stem == "qwen2.5-1.5b-qlora")
    fsdp2 = next(path for path in STRATEGIES if path.stem == "fsdp2")
    kinds = [sorted(OVERLAYS, key=lambda path: path != qlora), sorted(STRATEGIES, key=lambda path: path != fsdp2)]
    for at, method in enumerate(METHODS):
        own = [TEACHERS] * (method in distilling()) + [ENGINES] * samples(method)
        for turn in range(max(map(len, kinds + own if method.stem in ("sft", "gkd") else [[fsdp2], *own]))):
            chosen = [kind[turn % len(kind)] for kind in kinds + own]
            chosen.insert(2, LOGGERS[(at + turn) % len(LOGGERS)])
            yield pytest.param(method, chosen, id="-".join(path.stem for path in [method, *chosen]))


@pytest.mark.slow
@pytest.mark.parametrize(("method", "overlays"), [*compositions()])
def test_overlays_of_every_kind_compose_with_every_method(method: Path, overlays: list[Path]) -> None:
    _, strategy, logger, *_ = overlays
    cli = instantiate(method, *overlays, build=False)
    found, settings = cli.config.model.init_args, [yaml.safe_load(path.read_text("utf-8")) for path in overlays]
    base = settings[0]["model"]["init_args"]
    assert found.policy.path == base["policy"]["path"]
    assert (found.policy.lora is None) == (base["policy"].get("lora") is None)
    assert cli.config.data.init_args.chat_kwargs == settings[0].get("data", {}).get("init_args", {}).get("chat_kwargs")
    for path, name, wanted in ((strategy, "strategy", settings[1]), (logger, "logger", settings[2])):
        assert set(wanted) == {"trainer"}, "it changes nothing but where a recipe runs, and where its numbers go"
        assert_chosen(cli.config.trainer[name], wanted["trainer"][name], path)
    for path, wanted in zip(overlays[3:], settings[3:], strict=True):
        (part,) = wanted["model"]["init_args"]
        assert_chosen(found[part], wanted["model"]["init_args"][part], path)


def assert_chosen(found: Any, wanted: Any, path: Path) -> None:
    """The class that an overlay names (or a word of Lightning's), with its settings."""
    if isinstance(wanted, str):
        assert found == wanted, path
    else:
        assert found.class_path.endswith(wanted["class_path"]), path
        settings = wanted.get("init_args", {})
        assert not settings or found.init_args.as_dict().items() >= settings.items(), path


@pytest.mark.parametrize("path", ENGINES, ids=name)
def test_an_overlay_of_an_engine_is_for_jobs_too(path: Path) -> None:
    from stepkd.cli.parser import parse
    from stepkd.evaluation.config import EvaluateConfig
    from stepkd.labels.settings import LabelConfig, StepPairConfig

    wanted = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]["init_args"]["engine"]
    changed = {"Transformers": ("max_rows", "8", 8), "VLLM": ("gpu_memory", "0.9", 0.9)}
    key, text, value = changed.get(
        wanted["class_path"], ("urls", '["http://a:1", "http://b:2"]', ("http://a:1", "http://b:2"))
    )
    solutions = "--solutions Sampled --solutions.problems gsm8k --solutions.model tiny-0.1m"
    jobs = {EvaluateConfig: "--model tiny-0.1m", LabelConfig: solutions, StepPairConfig: "--completions x.jsonl"}
    for kind, words in jobs.items():
        given = ["--config", f"engine/{path.stem}", *words.split(), "--out", "x"]
        found = parse(kind, given, command="a job").engine
        assert type(found).__name__ == wanted["class_path"]
        assert {name: getattr(found, name) for name in wanted["init_args"]} == {
            name: (each,) if name == "urls" else each for name, each in wanted["init_args"].items()
        }
        assert parse(kind, [*given, f"--engine.{key}", text], command="a job").engine == replace(found, **{key: value})


def test_an_overlay_of_an_engine_follows_settings_of_its_job_and_fits_no_other_command(tmp_path: Path) -> None:
    from stepkd.cli.compare import CompareConfig
    from stepkd.cli.parser import parse
    from stepkd.evaluation.config import EvaluateConfig, ScoreConfig
    from stepkd.sampling.config import VLLM, VLLMServer
    from stepkd.scorers.load import Judge

    (tmp_path / "mine.yaml").write_text("model: tiny-0.1m\nout: x\nengine:\n  class_path: VLLM\n")
    words = ["--config", str(tmp_path / "mine.yaml"), "--config=engine/transformers"]
    found = parse(EvaluateConfig, words, command="evaluate")
    assert (found.model, type(found.engine).__name__) == ("tiny-0.1m", "Transformers")
    words = "--config engine/vllm_server --scorer Judge --scorer.path m --scorer.engine.urls http://a:1 --completions c"
    scorer = parse(ScoreConfig, [*words.split(), "--out", "x"], command="score").scorer
    assert scorer == Judge("m", engine=VLLMServer(("http://a:1",)))
    scored = "scorer: {class_path: Judge, init_args: {path: a}}\ncompletions: c\nout: x\n"
    (tmp_path / "scored.yaml").write_text(scored)
    served = VLLMServer(("http://localhost:8000",))
    for words, expected in (
        (
            "--config engine/vllm_server --scorer=Judge --scorer.path m --completions c --out x",
            Judge("m", engine=served),
        ),
        (f"--config engine/vllm_server --config {tmp_path}/scored.yaml", Judge("a", engine=served)),
        (f"--config {tmp_path}/scored.yaml --config engine/vllm_server", Judge("a", engine=served)),
        (
            f"--config {tmp_path}/scored.yaml --scorer Judge --scorer.path m --scorer.engine VLLM",
            Judge("m", engine=VLLM()),
        ),
    ):
        assert parse(ScoreConfig, words.split(), command="score").scorer == expected
    (tmp_path / "more.yaml").write_text("model: {init_args: {engine: {class_path: VLLM}}}\ntrainer: {max_steps: 3}\n")
    with pytest.raises(ConfigError, match="model has no settings of its own"):
        parse(EvaluateConfig, ["--config", str(tmp_path / "more.yaml"), "--out", "x"], command="evaluate")
    with pytest.raises(ConfigError, match="'model' is not a setting"):
        parse(CompareConfig, ["a", "b", "--config", "engine/vllm"], command="compare")


def test_a_student_for_several_devices_brings_its_strategy() -> None:
    student = ROOT / "base" / "qwen2.5-7b-lora-fsdp2.yaml"
    cli = instantiate(ROOT / "sft.yaml", student, build=False)
    wanted = yaml.safe_load(student.read_text(encoding="utf-8"))["trainer"]["strategy"]
    assert cli.config.trainer.strategy.class_path == wanted["class_path"]


def chat_tokenizer(chat_template: str) -> Any:
    """A stand-in that knows nothing but its chat template."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab={"</s>": 0}, merges=[])))
    tokenizer.chat_template = chat_template
    return tokenizer


THINKING = (  # as Qwen3's: it thinks unless told not to, and writes the empty block itself then
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
ASKED = TEMPLATES["gsm8k"].user.replace("{prompt}", "1+1?")


@pytest.mark.parametrize("size", ["0.6b", "1.7b"])
def test_thinking_is_off_and_on_in_the_chat_template(size: str) -> None:
    base, on = ROOT / "base" / f"qwen3-{size}-lora.yaml", ("--data.init_args.chat_kwargs.enable_thinking", "true")
    row, begin = {"id": "r", "prompt": "1+1?"}, f"<|im_start|>user\n{ASKED}<|im_end|>\n<|im_start|>assistant\n"
    off = instantiate(ROOT / "sft.yaml", base).datamodule.template
    assert off == replace(TEMPLATES["gsm8k"], chat_kwargs={"enable_thinking": False})
    assert off.render(row, chat_tokenizer(THINKING)) == f"{begin}<think>\n\n</think>\n\n"
    thinking = instantiate(ROOT / "sft.yaml", base, extra=on).datamodule.template
    assert thinking.render(row, chat_tokenizer(THINKING)) == begin


def test_a_model_without_a_system_role_gets_none_unless_one_is_asked_for() -> None:
    template = instantiate(ROOT / "sft.yaml", ROOT / "base" / "gemma-3-1b-lora.yaml").datamodule.template
    row = {"id": "r", "prompt": "1+1?"}
    written = f"<start_of_turn>user\n{ASKED}<end_of_turn>\n<start_of_turn>model\n"
    assert template.render(row, chat_tokenizer(NO_SYSTEM)) == written
    with pytest.raises(ConfigError, match="System role not supported; drop the system message"):
        replace(template, system="Be brief.").render(row, chat_tokenizer(NO_SYSTEM))


def test_null_of_a_part_is_null_on_the_command_line_and_a_measured_dtype_is_refused() -> None:
    words = [word for key in ("dtype", "revision", "attention") for word in (f"--model.policy.{key}", "null")]
    policy = instantiate(ROOT / "tiny" / "sft.yaml", extra=words, build=False).config.model.init_args.policy
    assert (policy.dtype, policy.revision, policy.attention) == (None, None, None)
    with pytest.raises(ConfigError, match=r"model\.policy\.dtype: auto is measured, for jobs that sample"):
        instantiate(ROOT / "tiny" / "sft.yaml", extra=["--model.policy.dtype", "auto"], build=False)


def test_text_of_reward_options_stays_text() -> None:
    """What YAML would read as a comment, a number or nothing, on the command line and in a recipe."""
    from stepkd.modules import RewardConfig

    options = {
        "pattern": "#### ",
        "a": "5",
        "b": "null",
        "c": ["#x", 1],
        "d": {"e": "# f"},
        "g": 2,
        "h": None,
        "i": 0.5,
    }
    given = [{"name": "package.module:function", "options": options}, "accuracy"]
    for build in (False, True):
        cli = instantiate(
            ROOT / "tiny" / "grpo.yaml", extra=("--model.init_args.rewards", yaml.safe_dump(given)), build=build
        )
        found = cli.model.reward_specs[0] if build else cli.config.model.init_args.rewards[0]
        assert found.options == options
    assert cli.model.reward_specs[1] == RewardConfig("accuracy")


def test_the_seed_reaches_module_and_data() -> None:
    cli = instantiate(ROOT / "tiny" / "sft.yaml", extra=("--seed_everything", "7"))
    assert (cli.model.seed, cli.datamodule.seed) == (7, 7)


def test_index_lists_every_recipe() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    indexed = [path for path in EVERY if path not in CLAIMS + SHARED]  # recipes/claims/README.md lists those
    missing = [name(path) for path in indexed if f"`{name(path)}`" not in text]
    assert not missing
