"""The stage of rewards and a teacher: the student is rewarded for right answers and pulled towards its teacher."""

from __future__ import annotations

from typing import Any

from stepkd.quickstart.context import Context, compare_samples

KD: dict[str, Any] = {"beta": 0.05}
"""Coefficient of the reverse KL to the teacher."""


def train_kdrl(context: Context) -> dict[str, Any]:
    """KDRL from the student's weights: one objective of rewards and distillation, on the same samples."""
    from stepkd.claims.tiny_rl import train_tiny_rl

    teacher, student = (context.model_folder(name) for name in ("teacher", "student"))
    model = train_tiny_rl(
        context.out / "kdrl",
        start=student,
        teacher=teacher,
        task=context.task,
        demonstrations=20_000,
        steps=context.steps(30),
        lr=1e-4,
        seed=context.seed,
        kd=KD,
        progress=True,
    )
    sections = compare_samples(context, {"student": student, "kdrl": model})
    return {"model": str(model.relative_to(context.out)), "steps": context.steps(30), "evaluation": sections["kdrl"]}
