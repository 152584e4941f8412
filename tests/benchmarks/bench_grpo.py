"""A whole GRPO step (sampling, reward, loss, backward, optimiser) against TRL's GRPOTrainer; and one with a teacher.

Run: ``python tests/benchmarks/bench_grpo.py [--rounds 3] [--threads 2] [--dtype bfloat16] [--small]``. Policy and
teacher are random models of the shapes of SmolLM2-135M and SmolLM2-360M (``--small``: much smaller ones), 4 prompts of
48 tokens, groups of 4, 64 new tokens, all weights trained, no KL to a reference, one optimiser step a rollout batch.
Random models hardly ever end a completion, so that both sides draw and learn from the same number of tokens; it is
printed. On a CPU without bfloat16 units take ``--dtype float32``.

Rounds alternate between the methods in one process; a round is three steps of a fresh trainer, the first of which only
warms up. TRL's gradient checkpointing, which trades time for memory, is off.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from stepkd.teachers.config import Local

SHAPES = {
    "policy": {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "intermediate_size": 1536},
    "teacher": {"hidden_size": 960, "num_hidden_layers": 32, "num_attention_heads": 15, "intermediate_size": 2560},
}
PROMPTS, GROUP, PROMPT, NEW, VOCABULARY = 4, 4, 48, 64, 49_152
STEPS = 3


def build(folder: Path, kind: str, *, small: bool, dtype: str) -> Path:
    """A random model of a SmolLM2 shape with a tokenizer of as many words, as a folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w1"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    shape = dict(SHAPES[kind]) | ({"num_hidden_layers": 2} if small else {})
    torch.manual_seed(len(kind))
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        num_key_value_heads=shape["num_attention_heads"] // 3,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        **shape,
    )
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder / kind)
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0", pad_token="w0", unk_token="w1").save_pretrained(
        folder / kind
    )
    return folder / kind


def rows() -> list[dict[str, str]]:
    """As many problems as all steps of a round take."""
    draw = torch.Generator().manual_seed(0)
    return [
        {"id": str(i), "prompt": " ".join(f"w{j}" for j in torch.randint(2, VOCABULARY, (PROMPT,), generator=draw))}
        for i in range(PROMPTS * STEPS)
    ]


def even(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward that tells completions apart and costs nothing, in TRL's signature."""
    return [sum(i % 2 == 0 for i in ids) / max(len(ids), 1) for ids in completion_ids]


def stepkd_round(policy: Path, teacher: Path | None, folder: Path, dtype: str) -> tuple[list[float], float]:
    """Seconds of every step but the first, and completion tokens of a step."""
    from lightning.pytorch import Callback, Trainer

    from stepkd.data.batching import BatchPlan, StepLoader
    from stepkd.data.encode import Encoder
    from stepkd.data.templates import PromptTemplate
    from stepkd.models.spec import PolicyConfig
    from stepkd.modules.kdrl import KDRLModule
    from stepkd.modules.kdrl_settings import PolicyLossConfig, RolloutConfig, SampledKL
    from stepkd.modules.optim import OptimizerConfig
    from stepkd.modules.rewards import RewardConfig
    from stepkd.sampling.engine import SamplingConfig
    from stepkd.steps.segment import get_segmenter

    seconds: list[float] = []
    tokens: list[float] = []

    class Clock(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            self.start = time.perf_counter()

        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            seconds.append(time.perf_counter() - self.start)
            tokens.append(float(trainer.callback_metrics["train/length"]) * PROMPTS * GROUP)

    module = KDRLModule(
        PolicyConfig(path=str(policy), dtype=dtype),
        rewards=[RewardConfig(f"{Path(__file__).stem}:even")],
        teacher=None if teacher is None else Local(str(teacher), dtype=dtype),
        rollout=RolloutConfig(SamplingConfig(n=GROUP, max_new_tokens=NEW), segmenter="whole"),
        policy_loss=PolicyLossConfig(normalisation="dapo"),
        kd=SampledKL(beta=0.1),
        optimizer=OptimizerConfig(lr=1e-6, schedule="constant", warmup=0),
    )
    module.configure_model()
    encoder = Encoder(module.tokenizer, PromptTemplate(style="plain"), get_segmenter("whole"))
    examples = encoder.examples([{**row, "answer": "w2", "solution": "w2"} for row in rows()])
    plan = BatchPlan([example.length for example in examples], size=PROMPTS, shuffle=False, seed=0)
    loader = StepLoader(examples, plan, rank=0, world_size=1, position=lambda: module.position)
    Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        logger=False,
        callbacks=[Clock()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(folder),
    ).fit(module, train_dataloaders=loader)
    return seconds[1:], statistics.mean(tokens[1:])


def trl_round(policy: Path, folder: Path, dtype: str) -> tuple[list[float], float]:
    """The same by TRL."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.perf_counter() - self.start)

    config = GRPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=PROMPTS * GROUP,
        num_generations=GROUP,
        steps_per_generation=1,
        max_completion_length=NEW,
        max_steps=STEPS,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        beta=0.0,
        loss_type="dapo",
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to=[],
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(policy, dtype=getattr(torch, dtype)),
        processing_class=AutoTokenizer.from_pretrained(policy),
        reward_funcs=even,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in rows()]),
        callbacks=[Clock()],
    )
    trainer.train()
    return seconds[1:], trainer.state.log_history[-1]["completions/mean_length"] * PROMPTS * GROUP


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--small", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        policy, teacher = (build(folder, kind, small=given.small, dtype=given.dtype) for kind in SHAPES)
        methods: dict[str, Callable[[], tuple[list[float], float]]] = {
            "stepkd GRPO": lambda: stepkd_round(policy, None, folder, given.dtype),
            "stepkd KDRL": lambda: stepkd_round(policy, teacher, folder, given.dtype),
            "TRL GRPO": lambda: trl_round(policy, folder, given.dtype),
        }
        seconds: dict[str, list[float]] = {name: [] for name in methods}
        tokens: dict[str, float] = {}
        for _ in range(given.rounds):
            for name, method in methods.items():
                found, tokens[name] = method()
                seconds[name] += found
    theirs = statistics.median(seconds["TRL GRPO"])
    for name, values in seconds.items():
        median = statistics.median(values)
        print(
            f"{name}: {median:.2f} s a step (median of {len(values)}, fastest {min(values):.2f}), "
            f"{tokens[name]:.0f} new tokens; TRL takes {theirs / median:.2f} times as long"
        )


if __name__ == "__main__":
    main()
