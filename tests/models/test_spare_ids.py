"""Token ids beyond a model's embeddings: harmless where no text holds them, else an error whose remedy works."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stepkd.data.encode import Encoder
from stepkd.data.templates import get_template
from stepkd.errors import DataError, ModelError
from stepkd.models.policy import Policy
from stepkd.models.spec import PolicyConfig, build_tiny
from stepkd.sampling.engine import SamplingConfig
from stepkd.sampling.transformers_engine import TransformersEngine
from stepkd.steps.segment import get_segmenter
from stepkd.teachers.config import Local
from stepkd.teachers.local import LocalTeacher

SPARE = "<image_soft_token>"


def save(path: Path, *, special: bool = True, **more: Any) -> Path:
    """A tiny model of 100 rows whose tokenizer has an id 100, as Gemma 3 1B has 262,144 of 262,144."""
    model, tokenizer = build_tiny("tiny-0.1m", seed=3)
    tokenizer.add_tokens([SPARE], special_tokens=special)
    for name, value in more.items():
        setattr(tokenizer, name, value)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def ids(policy: Policy, text: str) -> torch.Tensor:
    row = {"id": "a", "prompt": text, "solution": "#### 2"}
    example = Encoder(policy.tokenizer, get_template("task"), get_segmenter("newline")).example(row)
    assert example is not None
    return torch.tensor([[*example.prompt_ids, *example.token_ids]])


@pytest.mark.parametrize("special", [True, False])
def test_a_spare_id_that_no_text_holds_is_harmless(tmp_path: Path, special: bool) -> None:
    policy = Policy.load(PolicyConfig(path=str(save(tmp_path / "spare", special=special))))
    plain = Policy(*build_tiny("tiny-0.1m", seed=3))
    assert policy.vocab_size == 100
    tokens = ids(policy, "1+1=")
    assert torch.equal(policy.hidden(tokens, torch.ones_like(tokens)), plain.hidden(tokens, torch.ones_like(tokens)))
    spec = SamplingConfig(n=2, temperature=1.0, max_new_tokens=8)
    prompts = [tuple(tokens[0, :4].tolist())]
    drawn, expected = (TransformersEngine(each).generate(prompts, spec) for each in (policy, plain))
    assert [r.key for r in drawn[0]] == [r.key for r in expected[0]]


def test_a_text_that_holds_it_is_an_error_whose_remedy_works(tmp_path: Path) -> None:
    folder = save(tmp_path / "spare")
    policy = Policy.load(PolicyConfig(path=str(folder)))
    tokens = ids(policy, f"1+1={SPARE}")
    assert int(tokens.max()) == 100
    with pytest.raises(DataError, match=re.escape(f"a text holds '{SPARE}' (id 100)")) as error:
        policy.hidden(tokens, torch.ones_like(tokens))
    with pytest.raises(DataError, match=re.escape(f"a text holds '{SPARE}' (id 100)")):
        TransformersEngine(policy).generate([tuple(tokens[0].tolist())], SamplingConfig(max_new_tokens=4))
    grown = follow(str(error.value), folder, tmp_path / "grown")
    policy = Policy.load(PolicyConfig(path=str(grown)))
    assert policy.vocab_size == 101
    assert torch.isfinite(policy.hidden(tokens, torch.ones_like(tokens))).all()


def follow(message: str, folder: Path, out: Path) -> Path:
    """Do what the message says."""
    found = re.search(r"in transformers: (.*); then name that folder", message)
    assert found is not None, message
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    exec(found.group(1).replace("FOLDER", repr(str(out))), {"model": model, "tokenizer": tokenizer})
    return out


@pytest.mark.parametrize("kind", ["an ordinary token", "the end token"])
def test_ids_that_ordinary_texts_need_are_refused_at_load_and_the_remedy_works(tmp_path: Path, kind: str) -> None:
    folder = save(tmp_path / "model", **({"eos_token": SPARE} if kind == "the end token" else {}))
    if kind == "an ordinary token":
        import json

        file = folder / "tokenizer.json"
        values = json.loads(file.read_text())
        values["added_tokens"] = [each for each in values["added_tokens"] if each["content"] != SPARE]
        values["model"]["vocab"]["word"] = 100
        file.write_text(json.dumps(values))
    with pytest.raises(ModelError, match="the tokenizer knows 101 ids but the model has only 100 embedding") as error:
        Policy.load(PolicyConfig(path=str(folder)))
    assert Policy.load(PolicyConfig(path=str(follow(str(error.value), folder, tmp_path / "grown")))).vocab_size == 101
    other = save(tmp_path / "other")
    assert "policy.tokenizer" in str(error.value)
    assert Policy.load(PolicyConfig(path=str(folder), tokenizer=str(other))).vocab_size == 100


def test_a_pad_token_without_an_embedding_is_replaced(tmp_path: Path) -> None:
    policy = Policy.load(PolicyConfig(path=str(save(tmp_path, pad_token=SPARE))))
    assert policy.tokenizer.pad_token == policy.tokenizer.eos_token
    found = TransformersEngine(policy).generate([(5, 6, 7), (5,)], SamplingConfig(max_new_tokens=4))
    assert len(found) == 2


def test_a_teacher_with_a_row_for_the_spare_id_teaches_a_student_without(tmp_path: Path) -> None:
    """Gemma 3 4B has 262,208 rows, 1B has 262,144, under one tokenizer of 262,145 ids."""
    student = Policy.load(PolicyConfig(path=str(save(tmp_path / "student"))))
    model, _ = build_tiny("tiny-0.1m", seed=4)
    model.resize_token_embeddings(128)
    model.save_pretrained(tmp_path / "teacher")
    student.tokenizer.save_pretrained(tmp_path / "teacher")
    teacher = LocalTeacher(Local(str(tmp_path / "teacher")))
    teacher.bind(student.tokenizer, student.vocab_size)
    hidden = torch.randn(2, model.config.hidden_size)
    assert teacher.policy.head(hidden).shape == student.head(hidden).shape == (2, 100)
    other = LocalTeacher(Local(str(tmp_path / "student")))
    with pytest.raises(ModelError, match="the teacher has logits for 100 tokens and the student for 101"):
        other.bind(student.tokenizer, 101)
