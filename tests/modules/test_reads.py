"""A method requires the columns that it reads, and no others; rows in memory will do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch import Trainer

from stepkd.data.config import DataConfig
from stepkd.data.datamodule import StepData
from stepkd.errors import ConfigError, DataError
from stepkd.models.spec import LabelTokens, PolicyConfig, tiny_tokenizer
from stepkd.modules.dpo import DPOModule
from stepkd.modules.fidelity import FidelityConfig
from stepkd.modules.gkd import GKDModule
from stepkd.modules.gkd_settings import SourceConfig
from stepkd.modules.kdrl import KDRLModule
from stepkd.modules.kdrl_settings import PolicyLossConfig, RolloutConfig, SampledKL
from stepkd.modules.kto import StepKTOModule
from stepkd.modules.optim import OptimizerConfig
from stepkd.modules.prm import PRMModule
from stepkd.modules.rewards import RewardConfig
from stepkd.modules.sft import SFTModule
from stepkd.modules.validation import ValidationConfig
from stepkd.sampling.engine import SamplingConfig
from stepkd.teachers.config import Local

POLICY = PolicyConfig(path="tiny-0.1m")
TEACHER = Local("tiny-0.1m")
STEADY = OptimizerConfig(lr=1e-3, schedule="constant", warmup=0)
PROMPTS = [{"prompt": f"{i}+1=\n"} for i in range(4)]
PROBLEMS = [{**row, "answer": str(i + 1)} for i, row in enumerate(PROMPTS)]
SOLVED = [{**row, "solution": f"{i}+1={i + 1}\n"} for i, row in enumerate(PROMPTS)]


def gold(completions: list[str], solution: list[str]) -> list[float]:
    return [float(len(text) + len(each)) for text, each in zip(completions, solution, strict=True)]


def graded(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    return [0.0] * len(completions)


def longer(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(len(ids)) for ids in completion_ids]


def grpo(*rewards: Any, **settings: Any) -> KDRLModule:
    return KDRLModule(POLICY, rewards=list(rewards) or None, **settings)


def gkd(student: float, teacher: float = 0.0, **settings: Any) -> GKDModule:
    return GKDModule(POLICY, TEACHER, source=SourceConfig(lmbda=student, teacher=teacher), **settings)


def setup(module: Any, data: StepData, stage: str = "fit") -> StepData:
    data.trainer = SimpleNamespace(lightning_module=module, global_rank=0, world_size=1)  # type: ignore[assignment]
    data.setup(stage)
    return data


@pytest.mark.parametrize(
    ("make", "train"),
    [
        (lambda: SFTModule(POLICY), SOLVED),
        (lambda: gkd(0.5), SOLVED),
        (lambda: gkd(1.0), PROMPTS),
        (lambda: gkd(0.0, 1.0), PROMPTS),
        (grpo, PROBLEMS),
        (lambda: grpo(RewardConfig("format", options={"pattern": "="})), PROMPTS),
        (lambda: grpo(longer), PROMPTS),
        (lambda: grpo(graded), PROBLEMS),
        (lambda: grpo(gold), PROBLEMS),
        (lambda: grpo(gold), SOLVED),
        (lambda: grpo("trl.rewards.think_format_reward"), PROMPTS),
        (lambda: grpo("trl.rewards.accuracy_reward"), SOLVED),
        (lambda: grpo(policy_loss=PolicyLossConfig(weight=0), teacher=TEACHER), PROBLEMS),
    ],
)
def test_training_rows_need_what_the_method_reads(make: Callable[[], Any], train: list[dict[str, Any]]) -> None:
    data = setup(make(), StepData(train=train, template="task"))
    assert len(data.examples["train"]) == 4


@pytest.mark.parametrize(
    ("make", "train", "message"),
    [
        (lambda: SFTModule(POLICY), PROBLEMS, "'solution': SFTModule trains on solutions"),
        (lambda: gkd(0.5), PROBLEMS, r"'solution'.*source\.lmbda: 0\.5 leaves batches to the data's own solutions"),
        (grpo, SOLVED, "'answer'.*the reward 'accuracy' reads it.*columns: {answer: <that column>}"),
        (lambda: grpo(graded), SOLVED, "'answer': the reward 'graded' reads it"),
        (lambda: grpo(gold), PROMPTS, "'answer' or 'solution': the reward 'gold' reads it"),
        (lambda: grpo("trl.rewards.accuracy_reward"), PROMPTS, r"'answer' or 'solution': the reward 'trl\.rewards"),
        (
            lambda: grpo(longer, kd=SampledKL(mask="response"), teacher=TEACHER),
            PROMPTS,
            "'answer': kd.mask: response grades answers",
        ),
    ],
)
def test_a_column_that_is_read_and_missing_is_told_with_split_and_reason(
    make: Callable[[], Any], train: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(DataError, match=rf"data\.train: rows in memory, line 1, .*missing column .*{message}"):
        setup(make(), StepData(train=train, template="task"))


def test_validation_needs_answers_only_where_it_samples() -> None:
    held_out = [*SOLVED, PROMPTS[0]]
    data = setup(SFTModule(POLICY), StepData(train=SOLVED, validation=held_out, template="task"))
    assert [bool(len(example.token_ids)) for example in data.examples["validation"]] == [True] * 4 + [False]
    sampling = SFTModule(POLICY, validation=ValidationConfig(SamplingConfig(n=2)))
    setup(sampling, StepData(train=SOLVED, validation=PROBLEMS, template="task"))
    with pytest.raises(
        DataError, match=r"data\.validation: .*'answer': validation samples and grades .*sampling is not null"
    ):
        setup(sampling, StepData(train=SOLVED, validation=held_out, template="task"))
    with pytest.raises(DataError, match=r"data\.predict: .*'answer': predict samples and grades"):
        setup(SFTModule(POLICY), StepData(predict=SOLVED, template="task"), "predict")
    with pytest.raises(DataError, match=r"data\.test: nothing would be measured"):
        setup(SFTModule(POLICY), StepData(test=PROMPTS, template="task"), "test")
    with pytest.raises(DataError, match=r"'answer': fidelity\.answers grades"):
        setup(gkd(1.0, fidelity=FidelityConfig()), StepData(train=PROMPTS, validation=SOLVED, template="task"))
    setup(
        gkd(1.0, fidelity=FidelityConfig(answers=False)), StepData(train=PROMPTS, validation=PROMPTS, template="task")
    )


def fitted(module: Any, data: StepData) -> dict[str, float]:
    trainer = Trainer(
        accelerator="cpu",
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, datamodule=data)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def test_runs_on_prompts_alone() -> None:
    """Also the dummy batch, of which there is one in every step of every rank, has no solution to take."""
    rollout = RolloutConfig(SamplingConfig(n=2, max_new_tokens=8))
    data = StepData(train=PROMPTS, validation=SOLVED, template="task", global_batch_size=2, overlap_ngram=0)
    found = fitted(grpo(longer, rollout=rollout, optimizer=STEADY), data)
    assert found["train/reward"] == found["train/length"]
    assert "train/accuracy" not in found, "nobody knows"
    assert found["val/pg"] > 0
    source = SourceConfig(lmbda=1.0, sampling=SamplingConfig(max_new_tokens=8))
    data = StepData(train=PROMPTS, template="task", global_batch_size=2)
    assert "train/kd" in fitted(GKDModule(POLICY, TEACHER, source=source, optimizer=STEADY), data)


STEPWISE = [
    {"prompt": "1+1=\n", "completions": ["1+1=2\n", "#### 2"], "labels": labels, "outcome": labels[-1] == 1}
    for labels in ([1, 1], [1, 0])
]
PAIRS = [{"prompt": "1+1=\n", "chosen": "2", "rejected": "3"}]


def the_forms(rows: list[dict[str, Any]], folder: Path) -> list[Any]:
    import datasets

    file = folder / "mine.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    saved = datasets.Dataset.from_list(rows)
    saved.save_to_disk(str(folder / "saved"))
    return [
        rows,
        tuple(rows),
        saved,
        str(file),
        file,
        str(folder / "saved"),
        {"path": str(file)},
        DataConfig(path=str(file)),
    ]


@pytest.mark.parametrize(
    ("module", "rows"),
    [
        (lambda: SFTModule(POLICY), SOLVED),
        (lambda: PRMModule(POLICY, head=LabelTokens()), STEPWISE),
        (lambda: StepKTOModule(POLICY), STEPWISE),
        (lambda: DPOModule(POLICY), PAIRS),
    ],
    ids=["solutions", "step labels", "feedback", "pairs"],
)
def test_lists_datasets_and_paths_give_what_a_spec_gives(module: Any, rows: Any, tmp_path: Path) -> None:
    made = module()
    if isinstance(made, PRMModule):
        made.configure_model()
    found = [setup(made, StepData(form, template="task")).examples["train"] for form in the_forms(rows, tmp_path)]
    plain = [[(*(tuple(ids) for ids in (each.prompt_ids, each.token_ids)), each.spans) for each in es] for es in found]
    assert len(plain[0]) == len(rows)
    assert all(each == plain[0] for each in plain)


def test_a_setting_that_holds_no_rows_is_refused() -> None:
    import datasets

    with pytest.raises(ConfigError, match="'train' is no setting of data; of a dictionary of splits give one"):
        StepData(train=datasets.DatasetDict({"train": datasets.Dataset.from_list(SOLVED)}))
    with pytest.raises(ConfigError, match=r"rows are a list of dicts, a datasets\.Dataset or a path, not a int"):
        StepData(train=3)  # type: ignore[arg-type]


def test_chat_messages_are_rendered_by_the_chat_template_or_refused_with_the_remedy() -> None:
    module = SFTModule(POLICY)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}={% endfor %}"
    module._tokenizer = tokenizer
    chat = [
        {"messages": [{"role": role, "content": text} for role, text in turns]}
        for turns in ([("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4")],)
    ]
    [example] = setup(module, StepData(train=chat)).examples["train"]
    assert tokenizer.decode(list(example.prompt_ids)) == "1=2=3="
    assert tokenizer.decode(list(example.token_ids)).startswith("4")
    with pytest.raises(DataError, match="holds 3 chat messages, which plain style cannot write; use style 'chat'"):
        setup(module, StepData(train=chat, template="task"))
