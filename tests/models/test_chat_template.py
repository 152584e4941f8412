"""``policy.chat_template``: used in training, sampling and scoring, kept in checkpoints, written into exports."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from stepkd.cli import main
from stepkd.errors import ConfigError
from stepkd.models.checkpoint import load_policy, load_trained, save_policy
from stepkd.models.load import load_tokenizer
from stepkd.models.policy import Policy
from stepkd.models.spec import LabelTokens, PolicyConfig, spec_from_dict

ROOT = Path(__file__).resolve().parents[2]
OWN = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "own.jinja"
    path.write_text(OWN)
    return path


def rendered(tokenizer: object) -> str:
    messages = [{"role": "user", "content": "1+1?"}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))  # type: ignore[attr-defined]


def test_a_file_and_its_text_are_the_same_setting(file: Path) -> None:
    spec = PolicyConfig(path="tiny-0.1m", chat_template=str(file))
    assert spec == PolicyConfig(path="tiny-0.1m", chat_template=OWN)
    file.unlink()
    assert rendered(load_tokenizer(spec_from_dict(asdict(spec)))) == "[user] 1+1?\n[assistant] "


def test_a_run_is_trained_sampled_and_exported_under_it(file: Path, tmp_path: Path) -> None:
    words = ["--config", str(ROOT / "recipes" / "tiny" / "sft.yaml"), "--model.policy.path", "tiny-0.1m"]
    words += ["--data.template", "{style: chat}", "--trainer.max_steps", "1", "--data.validation", "null"]
    words += ["--data.global_batch_size", "4", "--data.train.options.n", "8"]
    assert main(["fit", *words, "--model.policy.chat_template", str(file), "--out", str(tmp_path / "run")]) == 0
    file.unlink()
    assert main(["export", str(tmp_path / "run"), "--to", str(tmp_path / "export")]) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "export").chat_template == OWN
    for model in ("run", "export"):
        problems = ["--benchmark", "task", "--data", "task=modular:terms=3,n=1", "--sampling.max_new_tokens", "4"]
        asked = ["--model", str(tmp_path / model), "--out", str(tmp_path / f"{model}-evaluated")]
        assert main(["evaluate", *asked, *problems, "--device", "cpu"]) == 0
        (row,) = map(json.loads, (tmp_path / f"{model}-evaluated" / "results.jsonl").read_text().splitlines())
        assert row["prompt"].startswith("[user] ")
        assert row["prompt"].endswith("\n[assistant] ")
    again = PolicyConfig(path=str(tmp_path / "run"))
    assert load_policy(again).tokenizer.chat_template == OWN, "also where another run starts from it"


def test_an_exported_reward_model_keeps_it(file: Path, tmp_path: Path) -> None:
    policy = Policy.load(PolicyConfig(path="tiny-0.1m", chat_template=str(file)))
    policy.attach_step_head(LabelTokens())
    save_policy(policy, tmp_path / "prm")
    loaded = load_trained(tmp_path / "prm")
    assert loaded.step_head is not None
    assert loaded.tokenizer.chat_template == OWN


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("absent.jinja", r"chat_template='absent.jinja': no readable Jinja file, and no Jinja text"),
        ("{% if %}", r"writes nothing of a message \(it holds no {{ }}\)"),
        ("{{ messages[0]['content'] }}\n{% for %}", "policy.chat_template, line 2: "),
    ],
)
def test_what_is_no_chat_template_is_named(value: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_tokenizer(PolicyConfig(path="tiny-0.1m", chat_template=value))


def test_a_template_that_wants_other_messages_is_no_error_at_load() -> None:
    refusing = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('system first') }}{% endif %}{{ messages }}"
    tokenizer = load_tokenizer(PolicyConfig(path="tiny-0.1m", chat_template=refusing))
    assert tokenizer.chat_template == refusing
