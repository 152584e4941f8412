"""An answer ends in what the chat template writes behind it, wherever an end is added or looked for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from stepkd.data.encode import Encoder
from stepkd.data.feedback import FeedbackEncoder, PairEncoder
from stepkd.data.step_encode import StepEncoder
from stepkd.data.templates import PromptTemplate
from stepkd.grading.pool import Grader
from stepkd.labels.solutions import ExistingSolutions
from stepkd.models.checkpoint import export_model
from stepkd.models.policy import Policy
from stepkd.models.spec import PolicyConfig, tiny_tokenizer
from stepkd.steps.format import StepFormat
from stepkd.steps.segment import get_segmenter
from stepkd.steps.text import text_from_ids

_GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
FAMILIES: dict[str, tuple[str, str, list[str]]] = {
    "gemma": (_GEMMA, "<end_of_turn>", ["<bos>", "<start_of_turn>", "<end_of_turn>"]),
    "chatml": (_CHATML, "<|im_end|>", ["<|im_start|>", "<|im_end|>"]),
    "llama-3": (
        _LLAMA3,
        "<|eot_id|>",
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    ),
}
"""Family: chat template, what it writes behind an answer, special tokens (the first of three or more begins a text)."""


def chat_tokenizer(family: str) -> Any:
    """The character tokenizer of the tiny world (end token ``<eos>``) with a family's special tokens and template."""
    template, _, special = FAMILIES[family]
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    if len(special) > 2:
        tokenizer.bos_token = special[0]
    tokenizer.chat_template = template
    return tokenizer


NEWLINE = get_segmenter("newline")
CHAT, PLAIN = PromptTemplate(style="chat"), PromptTemplate(style="plain")
PROBLEM = {"id": "a", "prompt": "1+1?", "answer": "2"}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def ends(family: str, tokenizer: Any) -> dict[str, int]:
    """The last id that a completion should have, by the template's style."""
    return {"chat": tokenizer.convert_tokens_to_ids(FAMILIES[family][1]), "plain": tokenizer.eos_token_id}


def save_model(family: str, path: Path, *, eos: Any = None) -> Path:
    """A random model of a family; ``eos`` is what its generation settings list."""
    tokenizer = chat_tokenizer(family)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=len(tokenizer)
    )
    config.update({"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id})
    model = LlamaForCausalLM(config)
    if eos is not None:
        model.generation_config.eos_token_id = eos
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("template", [CHAT, PLAIN], ids=["chat", "plain"])
def test_solutions_feedback_and_pairs_end_as_the_template_does(family: str, template: PromptTemplate) -> None:
    tokenizer = chat_tokenizer(family)
    end = ends(family, tokenizer)[template.style]
    text = "1+1=2\n#### 2"
    solution = Encoder(tokenizer, template, NEWLINE).example(PROBLEM | {"solution": text})
    assert solution is not None
    assert tokenizer.decode(solution.token_ids[:-1]) == text
    assert solution.token_ids[-1] == end
    assert solution.spans[-1][1] == len(solution.token_ids), "the end belongs to the last step"
    rows = PROBLEM | {"completions": ["1+1=2\n", "#### 2"], "labels": [True, True], "outcome": True}
    feedback = FeedbackEncoder(tokenizer, template, NEWLINE).example(rows)
    assert feedback is not None
    assert feedback.token_ids.tolist() == solution.token_ids.tolist()
    pair = PairEncoder(tokenizer, template, NEWLINE).example(PROBLEM | {"chosen": text, "rejected": "#### 3"})
    assert pair is not None
    assert (pair.token_ids[-1], pair.rejected.token_ids[-1]) == (end, end)


def test_training_text_is_the_chat_templates_own(family: str) -> None:
    """Prompt and completion are the start of what the template writes for the whole conversation."""
    tokenizer = chat_tokenizer(family)
    example = Encoder(tokenizer, CHAT, NEWLINE).example(PROBLEM | {"solution": "#### 2"})
    assert example is not None
    messages = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "#### 2"}]
    whole = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False)["input_ids"]
    ids = [*example.prompt_ids, *example.token_ids]
    assert whole[: len(ids)] == ids
    assert tokenizer.decode(whole[len(ids) :]).strip() == ""


@pytest.mark.parametrize("written", [0, 1])
def test_an_end_that_the_text_has_is_not_doubled(family: str, written: int) -> None:
    tokenizer = chat_tokenizer(family)
    end = [FAMILIES[family][1], tokenizer.eos_token][written]
    example = Encoder(tokenizer, CHAT, NEWLINE).example(PROBLEM | {"solution": f"#### 2{end}"})
    assert example is not None
    assert example.token_ids[-1] == tokenizer.convert_tokens_to_ids(end)
    assert tokenizer.decode(example.token_ids[:-1]) == "#### 2"


def test_a_sampled_solution_is_scored_without_its_end(family: str) -> None:
    """Whichever of the special tokens it stopped at; the unknown token is text, and stays."""
    tokenizer = chat_tokenizer(family)
    encoder = StepEncoder(tokenizer, PLAIN, format=StepFormat(marker=None), marker_id=None)
    text = tuple(tokenizer("1+1=2\n#### 2\n", add_special_tokens=False)["input_ids"])
    expected = encoder.layout_from_ids(text_from_ids(tokenizer, text), [(0, 6), (6, len(text))])
    special = {tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(FAMILIES[family][2])}
    for end in special:
        ids = (*text, end)
        found = encoder.layout_from_ids(text_from_ids(tokenizer, ids), [(0, 6), (6, len(ids))])
        assert (found.ids, found.spans, found.read_at) == (expected.ids, expected.spans, expected.read_at)
    unknown = (*text, tokenizer.unk_token_id)
    kept = encoder.layout_from_ids(text_from_ids(tokenizer, unknown), [(0, 6), (6, len(unknown))])
    assert tokenizer.unk_token_id in kept.ids


@pytest.mark.parametrize("template", [CHAT, PLAIN], ids=["chat", "plain"])
def test_given_solutions_are_labelled_with_the_end_of_their_style(
    family: str, template: PromptTemplate, tmp_path: Path
) -> None:
    policy = Policy.load(PolicyConfig(path=str(save_model(family, tmp_path))))
    with Grader() as grader:
        rows: Any = [PROBLEM | {"solution": "#### 2"}]
        bench = SimpleNamespace(rows=rows, template=template, grader=grader, policy=policy)
        source = ExistingSolutions(bench, keep_steps=True)  # type: ignore[arg-type]
        (record,) = source.work([0])
        (solution,) = source.solutions(record)
    assert solution.token_ids[-1] == ends(family, policy.tokenizer)[template.style]


def test_sampling_stops_at_the_turns_end_and_at_what_the_generation_settings_list(family: str, tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(family)
    end = ends(family, tokenizer)["chat"]
    agreeing = Policy.load(PolicyConfig(path=str(save_model(family, tmp_path / "a", eos=[1, 5, end]))))
    apart = Policy.load(PolicyConfig(path=str(save_model(family, tmp_path / "b", eos=[1, 5]))))
    assert agreeing.eos_ids == apart.eos_ids == {1, 5, end}
    out = export_model(tmp_path / "b", tmp_path / "export")
    assert AutoModelForCausalLM.from_pretrained(out).generation_config.eos_token_id == [1, 5, end]
    same = export_model(tmp_path / "a", tmp_path / "same")
    assert AutoModelForCausalLM.from_pretrained(same).generation_config.eos_token_id == [1, 5, end]


@pytest.mark.parametrize(
    "chat",
    [
        None,
        "{{ messages[0]['content'] }}",
        "{{ raise_exception('no') }}",
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}",
    ],
)
def test_a_template_that_writes_no_token_behind_an_answer_leaves_the_end_token(chat: str | None) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = chat
    style = "plain" if chat is None else "chat"
    assert PromptTemplate(style="auto").resolved_style(tokenizer) == style
    assert PromptTemplate(style="auto").end_id(tokenizer) == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("chat", "end"),
    [
        # Llama 2 and Mistral: the end token behind a blank.
        ("{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }} "
         "{{ eos_token }}{% endif %}{% endfor %}", "<eos>"),
        # Phi 3: a turn's end, and at the very end of the conversation the end token too.
        ("{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}{{ eos_token }}", "<|end|>"),
        # Qwen 3: thoughts before the last answer.
        ("{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n\n</think>\n\n"
         "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}", "<|im_end|>"),
        # DeepSeek R1: what stands before the thoughts' end is dropped.
        ("{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% if m.role == 'assistant' %}<|end|>{% endif %}"
         "{% endfor %}", "<|end|>"),
        # A template that wants a system message.
        ("{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}"
         "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}", "<|end|>"),
        # One that refuses it.
        ("{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
         "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}", "<|end|>"),
        # Words behind the answer, before the token.
        ("{% for m in messages %}{{ m.content }}\n### End <|end|>{% endfor %}", "<|end|>"),
    ],
    ids=["llama-2", "phi-3", "qwen-3", "deepseek-r1", "system first", "no system", "words"],
)  # fmt: skip
def test_the_end_of_an_answer_in_other_families(chat: str, end: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>", "<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = chat
    assert CHAT.end_id(tokenizer) == tokenizer.convert_tokens_to_ids(end)
    assert PLAIN.end_id(tokenizer) == tokenizer.eos_token_id


def test_a_model_that_was_trained_on_chat_stops_in_plain_transformers(tmp_path: Path) -> None:
    """Trained on one answer, a model writes the turn's end, and its export stops there."""
    policy = Policy.load(PolicyConfig(path=str(save_model("gemma", tmp_path / "model"))))
    example = Encoder(policy.tokenizer, CHAT, NEWLINE).example(PROBLEM | {"solution": "#### 2"})
    assert example is not None
    ids = torch.tensor([[*example.prompt_ids, *example.token_ids]])
    labels = ids.clone()
    labels[:, : len(example.prompt_ids)] = -100
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=0.01)
    for _ in range(40):
        policy.model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    policy.model.save_pretrained(tmp_path / "trained")
    policy.tokenizer.save_pretrained(tmp_path / "trained")
    model = AutoModelForCausalLM.from_pretrained(export_model(tmp_path / "trained", tmp_path / "export"))
    found = model.generate(torch.tensor([example.prompt_ids.tolist()]), max_new_tokens=40, do_sample=False)
    assert found[0, len(example.prompt_ids) :].tolist() == example.token_ids.tolist()
