"""Prompt templates: the exact text, begin-of-sequence once, ids, and the built-in examples."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from stepkd.data.config import DataConfig
from stepkd.data.datamodule import overlap_report
from stepkd.data.load import load_rows
from stepkd.data.sources.problems import final_answer
from stepkd.data.templates import EXEMPLARS, TEMPLATES, PromptTemplate, get_template
from stepkd.errors import ConfigError, DataError

CHAT = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}{% if not enable_thinking|default(true) %}<quick>{% endif %}"
)
ROW = {"id": "r", "prompt": "1+1?", "answer": "2"}


def make_tokenizer(*, chat_template: str | None = None, bos: bool = True) -> Any:
    """A byte-level tokenizer that puts <s> before every text, as Llama's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<s>": 0, "</s>": 1} | {letter: index for index, letter in enumerate(letters, start=2)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = chat_template
    return fast


PLAIN_TOKENIZER = make_tokenizer()
CHAT_TOKENIZER = make_tokenizer(chat_template=CHAT)


def ids(template: PromptTemplate, tokenizer: Any, row: dict[str, Any] = ROW) -> list[int]:
    text = template.render(row, tokenizer)
    found: list[int] = tokenizer(text, add_special_tokens=template.adds_special_tokens(tokenizer))["input_ids"]
    return found


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("tokenizer", [PLAIN_TOKENIZER, CHAT_TOKENIZER], ids=["plain", "chat"])
def test_begin_of_sequence_exactly_once(name: str, tokenizer: Any) -> None:
    found = ids(TEMPLATES[name], tokenizer)
    assert found[0] == 0
    assert found.count(0) == 1
    assert found.count(1) == 0


def test_the_trap_is_real() -> None:
    """Adding special tokens to a chat text would give two."""
    template = PromptTemplate()
    text = template.render(ROW, CHAT_TOKENIZER)
    assert CHAT_TOKENIZER(text, add_special_tokens=True)["input_ids"].count(0) == 2
    assert not template.adds_special_tokens(CHAT_TOKENIZER)


def test_a_plain_template_with_its_own_begin_of_sequence() -> None:
    assert ids(PromptTemplate(plain="<s>{prompt}"), PLAIN_TOKENIZER).count(0) == 1
    assert ids(PromptTemplate(system="<s>Be brief."), PLAIN_TOKENIZER).count(0) == 1


def test_a_tokenizer_without_begin_of_sequence_gets_none() -> None:
    assert ids(PromptTemplate(), make_tokenizer(bos=False)).count(0) == 0


def test_auto_follows_the_tokenizer() -> None:
    assert PromptTemplate().render(ROW, PLAIN_TOKENIZER) == "1+1?"
    assert PromptTemplate().render(ROW, CHAT_TOKENIZER) == "<s><user>1+1?\n<assistant>"
    assert PromptTemplate(style="plain").render(ROW, CHAT_TOKENIZER) == "1+1?"
    with pytest.raises(ConfigError, match=r"style 'chat', but the tokenizer .* has no chat template; use 'plain'"):
        PromptTemplate(style="chat").render(ROW, PLAIN_TOKENIZER)


def test_plain_text_with_everything() -> None:
    template = PromptTemplate(
        system="Solve.",
        plain="Q: {prompt}\nA:\n",
        few_shot=[{"prompt": "2+2?", "solution": "2+2=4"}],
        answer_prefix="First,",
    )
    assert template.render(ROW, PLAIN_TOKENIZER) == "Solve.\n\nQ: 2+2?\nA:\n2+2=4\n\nQ: 1+1?\nA:\nFirst,"


def test_chat_text_with_everything() -> None:
    template = PromptTemplate(
        system="Solve.",
        user="{prompt} Go.",
        few_shot=[{"prompt": "2+2?", "solution": "2+2=4"}],
        answer_prefix="First,",
        chat_kwargs={"enable_thinking": False},
    )
    assert template.render(ROW, CHAT_TOKENIZER) == (
        "<s><system>Solve.\n<user>2+2? Go.\n<assistant>2+2=4\n<user>1+1? Go.\n<assistant><quick>First,"
    )


def test_braces_are_taken_literally() -> None:
    row = {"prompt": "Is {prompt} = \\boxed{x} {0}?"}
    template = PromptTemplate(user="{prompt} in \\boxed{}", plain="{prompt} in \\boxed{}")
    assert template.render(row, PLAIN_TOKENIZER) == "Is {prompt} = \\boxed{x} {0}? in \\boxed{}"
    assert "<user>Is {prompt} = \\boxed{x} {0}? in \\boxed{}\n" in template.render(row, CHAT_TOKENIZER)


def test_chat_prompts_are_used_as_they_are() -> None:
    user = {"role": "user", "content": "1+1?"}
    template = PromptTemplate(system="Ours.", user="{prompt} Go.")
    assert template.render({"prompt": [user]}, CHAT_TOKENIZER) == "<s><system>Ours.\n<user>1+1?\n<assistant>"
    own = [{"role": "system", "content": "Theirs."}, user]
    assert template.render({"prompt": own}, CHAT_TOKENIZER) == "<s><system>Theirs.\n<user>1+1?\n<assistant>"
    assert own == [{"role": "system", "content": "Theirs."}, user]
    assert template.render({"prompt": [user]}, PLAIN_TOKENIZER) == "Ours.\n\n1+1?"
    with pytest.raises(DataError, match="r, column 'prompt': holds 2 chat messages, which plain style cannot write"):
        template.render({"id": "r", "prompt": own}, PLAIN_TOKENIZER)


def test_examples_stand_after_a_prompts_own_system_message() -> None:
    template = PromptTemplate(few_shot=[{"prompt": "2+2?", "solution": "4"}])
    own = [{"role": "system", "content": "Theirs."}, {"role": "user", "content": "1+1?"}]
    text = "<s><system>Theirs.\n<user>2+2?\n<assistant>4\n<user>1+1?\n<assistant>"
    assert template.render({"prompt": own}, CHAT_TOKENIZER) == text


@pytest.mark.parametrize("prompt", [None, "", 3, []])
def test_rows_without_a_usable_prompt(prompt: object) -> None:
    with pytest.raises(DataError, match="r, column 'prompt': must be text or chat messages"):
        PromptTemplate().render({"id": "r", "prompt": prompt}, PLAIN_TOKENIZER)


def test_a_chat_template_that_refuses() -> None:
    refusing = make_tokenizer(chat_template="{{ raise_exception('System role not supported') }}")
    with pytest.raises(ConfigError, match="refuses the messages: System role not supported; drop the system message"):
        PromptTemplate(system="x").render(ROW, refusing)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"style": "chta"}, "unknown template.style 'chta': did you mean 'chat'"),
        ({"user": "Solve this."}, "user of a prompt template must hold {prompt} once, found 0 times"),
        ({"plain": "{prompt}{prompt}"}, "plain of a prompt template must hold {prompt} once, found 2 times"),
        ({"answer_line": "####"}, "answer_line of a prompt template must hold {answer} once"),
        ({"few_shot": 5}, "few_shot=5: there are 4 built-in examples"),
        ({"few_shot": -1}, "few_shot=-1"),
        ({"few_shot": [{"prompt": "x"}]}, "few_shot example 1 must have 'prompt' and 'solution' only"),
        ({"few_shot": [{"prompt": "x", "solution": 4}]}, "few_shot example 1 must have"),
        ({"chat_kwargs": {"return_dict": True, "tokenize": True}}, "chat_kwargs must not set return_dict, tokenize"),
        ({"few_shot": [{"prompt": "x", "solution": " "}]}, "few_shot example 1 must have 'prompt' and 'solution' only"),
    ],
)
def test_bad_templates(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        PromptTemplate(**settings)


def test_prompt_id_changes_with_everything_that_shapes_the_text() -> None:
    variants: list[dict[str, Any]] = [
        {},
        {"style": "plain"},
        {"system": "x"},
        {"user": "{prompt} x"},
        {"plain": "{prompt} x"},
        {"few_shot": 1},
        {"few_shot": 2},
        {"few_shot": [{"prompt": "a", "solution": "b"}]},
        {"few_shot": 1, "answer_line": "So {answer}"},
        {"separator": "\n"},
        {"answer_prefix": "x"},
        {"chat_kwargs": {"enable_thinking": False}},
    ]
    found = {PromptTemplate(**variant).prompt_id() for variant in variants}
    assert len(found) == len(variants)
    assert all(re.fullmatch("[0-9a-f]{12}", one) for one in found)
    assert PromptTemplate().prompt_id() == PromptTemplate(answer_line="unused {answer}").prompt_id()


def test_prompt_id_counts_the_tokenizers_chat_template() -> None:
    template = PromptTemplate()
    other = make_tokenizer(chat_template=CHAT + " ")
    assert template.prompt_id(CHAT_TOKENIZER) != template.prompt_id(PLAIN_TOKENIZER)
    assert template.prompt_id(CHAT_TOKENIZER) != template.prompt_id(other)
    assert template.prompt_id(PLAIN_TOKENIZER) == PromptTemplate(style="plain").prompt_id(PLAIN_TOKENIZER)


def test_prompt_id_is_the_same_in_every_process() -> None:
    assert PromptTemplate(style="plain").prompt_id() == "936d41d18042"


@pytest.mark.parametrize("name", TEMPLATES)
def test_built_in_templates(name: str) -> None:
    template = get_template(name)
    assert get_template(template) is template
    for tokenizer in (PLAIN_TOKENIZER, CHAT_TOKENIZER):
        assert ROW["prompt"] in template.render(ROW, tokenizer)


def test_task_template_adds_nothing() -> None:
    for tokenizer in (PLAIN_TOKENIZER, CHAT_TOKENIZER):
        assert get_template("task").render(ROW, tokenizer) == ROW["prompt"]


def test_math_template_asks_for_a_box_and_shows_one() -> None:
    template = PromptTemplate(
        style="plain", plain=TEMPLATES["math"].plain, answer_line=TEMPLATES["math"].answer_line, few_shot=1
    )
    text = template.render(ROW, PLAIN_TOKENIZER)
    assert "final answer within \\boxed{}." in text
    assert "The final answer is $\\boxed{102}$." in text


def test_unknown_template() -> None:
    with pytest.raises(ConfigError, match=r"no prompt template named 'gsm8'\. Did you mean 'gsm8k'"):
        get_template("gsm8")


def test_built_in_examples_compute() -> None:
    for example in EXEMPLARS:
        equations = re.findall(r"(\d[\d+*/ -]*) = (\d+)", example["reasoning"])
        assert len(equations) >= 3
        for left, right in equations:
            assert eval(left) == int(right), left
        assert equations[-1][1] == example["answer"]
    text = PromptTemplate(style="plain", few_shot=4).render(ROW, PLAIN_TOKENIZER)
    assert [final_answer(part) for part in text.split("\n\n")[:4]] == [example["answer"] for example in EXEMPLARS]


def test_built_in_examples_share_nothing_with_gsm8k(data_dir: Path) -> None:
    for split in ("train", "test"):
        known = load_rows(DataConfig(source="gsm8k", path=str(data_dir / "gsm8k"), split=split))
        report = overlap_report(
            (row["prompt"] for row in known), {each["prompt"]: each["prompt"] for each in EXEMPLARS}
        )
        assert not any(report.values())


def test_a_template_can_stand_in_a_recipe() -> None:
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--template", type=PromptTemplate)
    for few_shot in (2, [{"prompt": "a", "solution": "b"}]):
        value: dict[str, Any] = {"system": "x", "few_shot": few_shot, "chat_kwargs": {"enable_thinking": False}}
        parsed = parser.instantiate(parser.parse_object({"template": value})).template
        assert parsed == PromptTemplate(**value)
