"""The stage of distillation: the student writes, the teacher says at every token what it would have written."""

from __future__ import annotations

from typing import Any

from stepkd.quickstart.context import Context, compare_samples

DIVERGENCE: dict[str, Any] = {"kind": "jsd", "beta": 0.5, "scaled": True}


def train_gkd(context: Context) -> dict[str, Any]:
    """On-policy GKD from the student's weights, and how like its teacher the student was and has become."""
    from stepkd.claims.tiny_distillation import distil_tiny, tiny_fidelity

    teacher, student = (context.model_folder(name) for name in ("teacher", "student"))
    model = distil_tiny(
        context.out / "gkd",
        start=student,
        teacher=teacher,
        task=context.task,
        demonstrations=20_000,
        steps=context.steps(50),
        lr=3e-4,
        seed=context.seed,
        divergence=DIVERGENCE,
        student=1.0,
        progress=True,
    )
    models = {"student": student, "gkd": model}
    sections = compare_samples(context, models)
    problems = context.problems(64)
    alike = {
        name: tiny_fidelity(folder, teacher, task=context.task, problems=problems, seed=context.seed)
        for name, folder in models.items()
    }
    context.console.print(
        f"reverse KL to the teacher on own samples of {problems} problems, nats a token: "
        f"{alike['student']['reverse_kl']:.3f} before, {alike['gkd']['reverse_kl']:.3f} after"
    )
    return {
        "model": str(model.relative_to(context.out)),
        "steps": context.steps(50),
        "evaluation": sections["gkd"],
        "fidelity": alike,
    }
