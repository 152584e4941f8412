"""Write a teacher's likeliest tokens for the completions of a distillation recipe, so that training needs no teacher.

stepkd cache-teacher --config recipes/gkd_cached_teacher.yaml --config recipes/base/smollm2-135m-lora.yaml \\
    --set 'model.init_args.teacher={path: HuggingFaceTB/SmolLM2-1.7B-Instruct}' --top-k 64 --out runs/teacher-cache

The recipe's teacher.path is the teacher, its data are the completions: a cache cannot score what a student samples.
The teacher computes in the recipe's trainer.precision, as it would beside the student; another one is refused by fit.
Training then has teacher.cache in place of teacher.path. A killed job is resumed by the same command,
with any number of processes (torchrun, accelerate, srun).
"""

from __future__ import annotations

import argparse
from types import SimpleNamespace

from stepkd.cli.options import add_job_arguments, say_share_is_done, start_job
from stepkd.cli.recipes import add_recipe_arguments, recipe_words
from stepkd.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``stepkd cache-teacher``."""
    parser.add_argument("--out", required=True, help="folder of the cache; begun, or resumed")
    parser.add_argument("--top-k", type=int, default=64, metavar="K", help="tokens kept per position (default 64)")
    parser.add_argument("--no-validation", action="store_true", help="leave out the validation data")
    parser.add_argument("--overwrite", action="store_true", help="delete an earlier cache in --out and start again")
    add_job_arguments(parser)
    add_recipe_arguments(parser, required=True)


def run(arguments: argparse.Namespace) -> int:
    """Run ``stepkd cache-teacher``."""
    from stepkd.modules.gkd import GKDModule
    from stepkd.scorers.load import pick_device
    from stepkd.teachers.cache import COMPLETIONS, write_cache
    from stepkd.teachers.local import LocalTeacher
    from stepkd.training.fit import check_fit

    console, launch, options = start_job(arguments, {COMPLETIONS: "scoring completions"})
    module, data, trainer = check_fit(words=recipe_words(arguments))
    if not isinstance(module, GKDModule) or not isinstance(module.teacher, LocalTeacher):
        raise ConfigError("stepkd cache-teacher needs a distillation recipe (GKDModule) with teacher.path")
    data.trainer = SimpleNamespace(lightning_module=module, global_rank=0, world_size=1)
    data.setup("fit")
    names = ("train",) if arguments.no_validation else ("train", "validation")
    examples = [example for name in names for example in data.examples.get(name, [])]
    teacher = module.teacher
    teacher.bind(module.tokenizer)
    teacher.place(pick_device(arguments.device))
    settings = write_cache(
        arguments.out,
        teacher,
        examples,
        top_k=arguments.top_k,
        temperature=module.divergence.logits_temperature,
        max_tokens=module.micro_batch_tokens,
        chunk_size=module.chunk_size,
        precision="bf16-mixed" if "bf16" in str(trainer.get("precision")) else "32-true",
        options=options,
    )
    if not settings:
        return say_share_is_done(console, launch, "last part")
    print(
        f"{settings['completions']} completions, {settings['top_k']} tokens per position: {arguments.out}\n"
        f"  train: stepkd fit ... --model.init_args.teacher '{{path: null, cache: {arguments.out}}}'"
    )
    return 0
