"""A teacher computes the prompt of a group once, as the student does; micro-batches are planned for what both save."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from stepkd.data.collate import collate
from stepkd.data.completion import Completion
from stepkd.data.encode import Encoder
from stepkd.data.templates import get_template
from stepkd.models.policy import Policy
from stepkd.models.spec import LoRAConfig, PolicyConfig, tiny_tokenizer
from stepkd.modules.dpo import DPOModule
from stepkd.modules.kdrl import KDRLModule
from stepkd.modules.preference import ReferenceConfig
from stepkd.steps.segment import get_segmenter
from stepkd.tasks.rows import make_rows
from stepkd.teachers.config import Local, SelfBase, SelfSnapshot
from stepkd.teachers.local import LocalTeacher
from stepkd.teachers.signals import Teacher

STUDENT = PolicyConfig(path="tiny-0.1m", dtype="float64")
COMPLETIONS, PROMPT = 8, 60


def group() -> list[Completion]:
    """Eight completions of different lengths, of one prompt; each begins with a token of its own."""
    encoder = Encoder(tiny_tokenizer(), get_template("task"), get_segmenter("newline"))
    (example,) = encoder.examples(make_rows("modular:terms=9", 1, seed=3))
    prompt = (example.prompt_ids.tolist() * PROMPT)[:PROMPT]
    ids = [(5 + i, *example.token_ids[: 3 + i]) for i in range(COMPLETIONS)]
    return [replace(example, prompt_ids=prompt, token_ids=each, step_ends=None) for each in ids]


def local(**settings: Any) -> tuple[Teacher, Callable[[], Policy]]:
    teacher = LocalTeacher(Local("tiny-0.5m", dtype="float64", **settings))
    teacher.bind(tiny_tokenizer())
    return teacher, lambda: teacher.policy


def own(spec: Any, **policy: Any) -> tuple[Teacher, Callable[[], Policy]]:
    student = Policy.load(replace(STUDENT, **policy))
    teacher = spec.build()
    teacher.follow(student)
    read = teacher._copy if isinstance(spec, SelfSnapshot) else (student._frozen or [student])[0]
    return teacher, lambda: read


TEACHERS: dict[str, Callable[[], tuple[Teacher, Callable[[], Policy]]]] = {
    "another model": local,
    "another model with its own prompts": lambda: local(template="math"),
    "the student a while ago": lambda: own(SelfSnapshot()),
    "the student before training": lambda: own(SelfBase()),
    "the student without its adapter": lambda: own(SelfBase(), lora=LoRAConfig(r=2)),
}


@pytest.mark.parametrize("name", list(TEACHERS))
def test_a_prompt_of_eight_completions_is_computed_once(name: str) -> None:
    teacher, read = TEACHERS[name]()
    examples, computed = group(), []
    embeddings = read().causal_lm.get_input_embeddings()
    embeddings.register_forward_pre_hook(lambda _, given: computed.append(given[0].numel()))
    together = teacher.signals(collate(examples, 0, share=True), temperature=1.0)
    prompt = len(teacher.prompts(examples)[0])
    assert computed == [prompt + sum(len(example.token_ids) for example in examples)]
    apart = [teacher.signals(collate([each], 0), temperature=1.0).tensors[0] for each in examples]
    assert torch.allclose(together.tensors[0], torch.cat(apart), rtol=1e-10, atol=1e-12)


def test_batches_are_planned_without_the_saving_where_the_teacher_has_none() -> None:
    for attention, shares in (("sdpa", True), ("eager", False)):
        module = KDRLModule(STUDENT, teacher=Local("tiny-0.1m", dtype="float32", attention=attention))
        module.configure_model()
        assert module.model.can_unpad
        assert module.shares_prompts is shares
        rows = [len(batch.examples) for batch in module.prepare_examples(group())]
        assert rows == [COMPLETIONS]
        module.micro_batch_tokens = 200
        batches = module.prepare_examples(group())
        assert (len(batches) == 1) is shares
        assert all((batch.shared_BT is not None) is shares for batch in batches)


def test_batches_are_planned_without_the_saving_where_the_reference_has_none() -> None:
    module = DPOModule(STUDENT, reference=ReferenceConfig(path="tiny-0.1m"))
    module.configure_model()
    assert module.shares_prompts
    module.model.set_reference(Policy.load(replace(STUDENT, dtype="float32", attention="eager")))
    assert not module.shares_prompts
