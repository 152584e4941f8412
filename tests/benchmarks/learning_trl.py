"""What students learn with stepkd and with TRL's trainers: DPO, KTO, GKD, GRPO on the same student, rows and settings.

Run: ``python tests/benchmarks/learning_trl.py --out FOLDER [--methods dpo kto gkd grpo] [--seeds 0 1 2] [--quick]``.

Every seed has the quick start's teacher and noisy student (tiny-0.5m, float32). DPO and KTO learn from the student's
own graded solutions, GKD from its own new samples and the teacher, GRPO from its own new samples and a reward for the
answer. Both sides begin with the same weights and read one file of rows in its order, in equal batches, with the same
AdamW, learning rates, clipping, beta, temperature and number of steps; dropout is off. Both models then solve the same
250 held-out problems, four samples each, by ``stepkd evaluate``. The samples that GKD and GRPO learn from are drawn by
each side's own generator, and TRL's GKDTrainer divides its loss by the tokens of the rows' solutions in place of those
that were sampled.

A run that was interrupted is continued by the same command. ``FOLDER/table.md`` has the accuracies, each with the
interval of a bootstrap over seeds and problems, and the paired differences, with Student's t over seeds beside it;
*weights apart* is the distance of the two trained models over what stepkd's training moved them, mean over seeds.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental.gkd import GKDConfig, GKDTrainer

from stepkd.claims.jobs import Measured, References, run_job
from stepkd.claims.runner import value_array
from stepkd.data.io import read_rows
from stepkd.labels.convert import Preference, Unpaired
from stepkd.models.checkpoint import export_model
from stepkd.quickstart import FILE, JOBS
from stepkd.randomness import generator
from stepkd.runs.files import write_jsonl
from stepkd.statistics import estimate_difference, estimate_mean, percent
from stepkd.tasks.rows import Noise, make_rows

TASK = FILE["settings"]["task"]
SIDES, WARMUP, GROUP, NEW_TOKENS = ("stepkd", "TRL"), 0.1, 8, 64
METHODS: dict[str, dict[str, Any]] = {
    "dpo": {"steps": 50, "batch": 64, "lr": 1e-4, "own": {"beta": 0.5}},
    "kto": {  # with TRL's class weights, and its way to mismatched completions
        **{"steps": 50, "batch": 64, "lr": 1e-4},
        "own": {"beta": 0.5, "class_weights": [1.0, 1.0], "reference_point": {"rotation": "device"}},
    },
    "gkd": {
        **{"steps": 30, "batch": 64, "lr": 3e-4},
        "own": {
            "teacher": {"init_args": {"path": "$teacher"}},
            "divergence": {"class_path": "JSD", "init_args": {"beta": 0.5, "scaled": False}},
            "source": {"lmbda": 1.0},
        },
    },
    "grpo": {
        **{"steps": 20, "batch": 32, "lr": 1e-4},
        "own": {
            "rewards": [{"name": f"{Path(__file__).stem}:reward"}],
            "rollout": {"sampling": {"n": GROUP, "max_new_tokens": NEW_TOKENS}},
            "policy_loss": {"normalisation": "dapo"},
        },
    },
}
"""Steps, examples of a step, learning rate, and stepkd's settings on top of ``recipes/tiny``."""
COLUMNS = {"dpo": ("id", "prompt", "chosen", "rejected"), "kto": ("id", "prompt", "completion", "label")}
COLUMNS |= dict.fromkeys(("gkd", "grpo"), ("id", "prompt", "answer", "solution"))


def reward(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """Whether the last word is the answer, in TRL's signature."""
    return [float(text.split()[-1:] == [gold]) for text, gold in zip(completions, answer, strict=True)]


class Seed:
    """Student, rows and models of one seed, below a folder; ``quick``: two steps of everything."""

    def __init__(self, out: Path, seed: int, *, quick: bool) -> None:
        self.out, self.seed, self.quick = out / f"seed-{seed}", seed, quick
        steps = dict.fromkeys(FILE["steps"], 2) if quick else FILE["steps"]
        problems = FILE["problems"] | {"problems": 8 if quick else 250}
        self.named = FILE["settings"] | steps | problems | {"seed": seed, "next_seed": seed + 1, "small": quick}

    def run(self, name: str, folder: str = "", **named: Any) -> tuple[str, Measured]:
        """Run, or resume, a job and those that it refers to: its folder (of a fit that of its model), its numbers."""
        found: dict[str, Measured] = {}

        def do(job: str, kind: str, settings: Mapping[str, Any]) -> str:
            out = self.out / (folder if folder and job == name else job)
            if kind == "fit" and (out / "model").is_dir():
                return str(out / "model")
            found[job] = run_job(kind, settings, out)
            return str(export_model(out, out / "model", overwrite=True) if kind == "fit" else out)

        fits = {f"{method}-stepkd": {"fit": self.fit(method)} for method in METHODS}
        return References(self.named | named, {**JOBS, **fits}, do).of(name), found.get(name, Measured())

    def of(self, method: str) -> dict[str, Any]:
        """The settings of a method."""
        return METHODS[method] | ({"steps": 2, "batch": 8} if self.quick else {})

    def fit(self, method: str) -> dict[str, Any]:
        """What stepkd trains with."""
        of = self.of(method)
        own = {"policy": {"path": "$student"}, "optimizer": {"lr": of["lr"], "schedule": "cosine", "warmup": WARMUP}}
        rows = {"source": "rows", "path": str(self.out / "rows" / f"{method}.jsonl"), "options": {}}
        return {
            "recipes": [f"tiny/{method}"],
            "seed_everything": self.seed,
            "trainer": {"max_steps": of["steps"]},
            "model": {"init_args": own | of["own"]},
            "data": {"init_args": {"train": rows, "shuffle": False, "global_batch_size": of["batch"]}},
        }

    def rows(self, method: str) -> list[dict[str, Any]]:
        """The rows in the order in which they are trained on, written once."""
        path, count = self.out / "rows" / f"{method}.jsonl", self.of(method)["steps"] * self.of(method)["batch"]
        if not path.is_file():
            if method in ("gkd", "grpo"):
                rows = make_rows(TASK, count, seed=self.seed)
            else:
                graded = [row for row in self.solutions() if row["finish"] == "stop"]
                rows = (Preference(max_pairs=4) if method == "dpo" else Unpaired()).convert(graded).rows
                order = generator(self.seed, "learning parity", method).permutation(len(rows))[:count]
                rows = [rows[i] for i in order]
            assert len(rows) == count, f"{count} rows are needed for {method}, and there are {len(rows)}"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_jsonl(path, [{name: row[name] for name in COLUMNS[method]} for row in rows])
        return [row for row, _ in read_rows(path)]

    def solutions(self) -> list[Mapping[str, Any]]:
        """The student's graded solutions; a student of two steps has none, and noisy demonstrations stand in."""
        if not self.quick:
            return [row for row, _ in read_rows(Path(self.run("labels")[0]) / "labels.jsonl")]
        drawn = [row | {"k": k} for k in range(4) for row in make_rows(TASK, 32, seed=0, noise=Noise(0.2, seed=k))]
        return [
            {"id": f"{row['id']}-{row['k']}", "problem_id": row["id"], "finish": "stop", "completion": row["solution"]}
            | {"prompt": row["prompt"], "correct": row["outcome"]}
            for row in drawn
        ]

    def model(self, method: str, side: str) -> str:
        """The folder of a side's model, which is trained once."""
        rows = self.rows(method)
        if side == "stepkd":
            return self.run(f"{method}-stepkd")[0]
        folder = self.out / f"{method}-TRL" / "model"
        if not folder.is_dir():
            shutil.rmtree(partial := folder.with_name("partial"), ignore_errors=True)
            shutil.copytree(student := self.run("student")[0], partial)  # for its tokenizer and prompt template
            trainer = trl_trainer(method, rows, student, self.run("teacher")[0], self.seed, self.of(method), partial)
            trainer.train()
            trainer.model.save_pretrained(partial)
            partial.rename(folder)
        return str(folder)

    def accuracy(self, name: str) -> list[float]:
        """Share of correct samples of every held-out problem, of ``student`` or ``METHOD-SIDE``."""
        model = self.run(name)[0] if name == "student" else self.model(*name.split("-"))
        return list(self.run("sampled", f"evaluations/{name}", evaluated=model)[1].columns["pass@1"])

    def apart(self, method: str) -> float:
        """How far the two trained models are from each other, over how far stepkd's is from the student."""
        folders = (self.run("student")[0], *(self.model(method, side) for side in SIDES))
        before, ours, theirs = (torch.cat([p.detach().flatten() for p in load(each).parameters()]) for each in folders)
        return float((ours - theirs).norm() / (ours - before).norm())


def load(path: str) -> Any:
    """A model in float32."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def trl_trainer(
    method: str, rows: list[dict[str, Any]], student: str, teacher: str, seed: int, of: dict[str, Any], folder: Path
) -> Any:
    """TRL's trainer, with stepkd's settings in place of its own defaults."""
    tokenizer, steps = AutoTokenizer.from_pretrained(student), of["steps"]
    common: dict[str, Any] = {"output_dir": str(folder), "seed": seed, "max_steps": steps, "learning_rate": of["lr"]}
    common |= {"per_device_train_batch_size": of["batch"], "train_sampling_strategy": "sequential"}
    common |= {"lr_scheduler_type": "cosine", "warmup_steps": round(WARMUP * steps), "optim": "adamw_torch"}
    common |= {"adam_beta2": 0.95, "max_grad_norm": 1.0, "gradient_checkpointing": False, "bf16": False}
    common |= {"use_cpu": True, "report_to": [], "logging_strategy": "no", "save_strategy": "no", "disable_tqdm": True}
    given: dict[str, Any] = {"model": load(student), "processing_class": tokenizer}
    if method == "gkd":
        read = [(tokenizer(row["prompt"]).input_ids, tokenizer(row["solution"]).input_ids) for row in rows]
        rows = [  # nothing is learnt from these solutions, but TRL divides the loss by their number of tokens
            {"prompt": row["prompt"], "input_ids": [*prompt, *solution, tokenizer.eos_token_id]}
            | {"completion_mask": [0] * len(prompt) + [1] * (len(solution) + 1)}
            for row, (prompt, solution) in zip(rows, read, strict=True)
        ]
        common |= {"lmbda": 1.0, "beta": 0.5, "temperature": 1.0, "max_new_tokens": NEW_TOKENS, "max_length": 128}
        return GKDTrainer(
            **given, teacher_model=load(teacher), args=GKDConfig(**common), train_dataset=Dataset.from_list(rows)
        )
    given["train_dataset"] = Dataset.from_list([{k: v for k, v in row.items() if k != "id"} for row in rows])
    if method == "grpo":
        common |= {"per_device_train_batch_size": of["batch"] * GROUP, "num_generations": GROUP, "loss_type": "dapo"}
        common |= {"max_completion_length": NEW_TOKENS, "steps_per_generation": 1, "shuffle_dataset": False}
        return trl.GRPOTrainer(**given, args=trl.GRPOConfig(**common, beta=0.0), reward_funcs=reward)
    made, config = (trl.DPOTrainer, trl.DPOConfig) if method == "dpo" else (trl.KTOTrainer, trl.KTOConfig)
    return made(**given, ref_model=load(student), args=config(**common, beta=of["own"]["beta"], max_length=128))


def table(seeds: list[Seed], methods: list[str]) -> str:
    """Train and evaluate what is not there yet; the result as Markdown."""
    found: dict[str, list[Any]] = {}
    for seed in seeds:
        for name in ("student", *(f"{method}-{side}" for method in methods for side in SIDES)):
            values = seed.accuracy(name)
            found.setdefault(name, []).append(value_array(values))
            print(f"seed {seed.seed} {name}: {sum(values) / len(values):.1%}", flush=True)
    head = ["method", "side", "accuracy by seed, %", "mean, %", "stepkd - TRL, points", "t over seeds", "weights apart"]
    lines = [head, ["---"] * len(head)]
    for name, arrays in found.items():
        (method, _, side), mean = name.partition("-"), estimate_mean(arrays)
        by_seed = ", ".join(f"{100 * each:.1f}" for each in mean.per_seed)
        lines.append([method, side, by_seed, percent(mean.problems.to_dict()), "", "", ""])
        if side == "TRL":
            gap = estimate_difference(found[f"{method}-stepkd"], arrays)
            apart = sum(seed.apart(method) for seed in seeds) / len(seeds)
            lines[-1][4:] = [percent(gap.problems.to_dict()), percent(gap.seeds.to_dict()), f"{apart:.1g}"]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="two steps of everything, to see that it runs")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(given.threads)
    text = table([Seed(given.out.resolve(), seed, quick=given.quick) for seed in given.seeds], given.methods)
    (given.out / "table.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
