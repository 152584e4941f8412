"""Write a teacher's most likely tokens for the completions of a distillation recipe, so that training needs no teacher.

stepkd cache-teacher --recipe gkd_cached_teacher base/smollm2-135m-lora \\
    --set model.teacher.path=HuggingFaceTB/SmolLM2-1.7B-Instruct --top-k 64 --out runs/teacher-cache

The recipe's teacher (Local) is the teacher, its data are the completions: a cache cannot score what a student samples.
The teacher computes in the recipe's trainer.precision, as it would beside the student; another one is refused by fit.
Training then has the teacher Cached. A killed job is resumed by the same command, with any number of processes
(torchrun, accelerate, srun).
"""

from __future__ import annotations

from dataclasses import dataclass

from stepkd.cli.recipes import RecipeChoice
from stepkd.runs.job import JobConfig


@dataclass(frozen=True, kw_only=True)
class CacheTeacherConfig(RecipeChoice, JobConfig):
    """Settings of ``stepkd cache-teacher``."""

    recipe: tuple[str, ...]
    """Distillation recipe with the teacher Local, then its overlays: files, or names of ``stepkd recipes list``."""
    top_k: int = 64
    """Tokens kept per position, at least 1 and fewer than the vocabulary has; 64 hold nearly all of the mass."""
    validation: bool = True
    """Write the completions of the validation data, too; without them a validation cannot read the cache."""


def run(config: CacheTeacherConfig) -> int:
    """Run ``stepkd cache-teacher``."""
    from stepkd.modules.gkd import cache_teacher
    from stepkd.scorers.load import pick_device
    from stepkd.teachers.cache import COMPLETIONS
    from stepkd.training.fit import check_fit

    config, job = config.start({COMPLETIONS: "scoring completions"})
    module, data, trainer = check_fit(words=config.recipe_words())
    settings = cache_teacher(
        module,
        data,
        config.out,
        top_k=config.top_k,
        validation=config.validation,
        device=pick_device(config.device),
        precision="bf16-mixed" if "bf16" in str(trainer.get("precision")) else "32-true",
        options=job,
    )
    if not settings:
        return job.share_is_done("last part")
    print(
        f"{settings['completions']} completions, {settings['top_k']} tokens per position: {config.out}\n"
        f"  train: stepkd fit ... --model.teacher Cached --model.teacher.folder {config.out}"
    )
    return 0
