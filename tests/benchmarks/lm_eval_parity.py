"""Verdicts of stepkd's grader and of lm-evaluation-harness on the same completions, problem by problem.

Run, where stepkd, ``lm_eval`` 0.4.13 and math-verify are installed (and vLLM for ``--generate``):

``python tests/benchmarks/lm_eval_parity.py runs/gsm8k [--generate pretrained=MODEL,dtype=bfloat16]``: completions of
``stepkd evaluate``, finished or not, one a problem; with ``--generate`` lm-eval also samples itself, greedy, from the
same prompts, up to the same number of tokens, by its vLLM model.

``python tests/benchmarks/lm_eval_parity.py processbench/math.jsonl --benchmark math500 --problems math500/test.jsonl``:
ProcessBench's solutions, written by twelve models, of the problems that the second file has.

Completions become a local task of lm-eval (nothing is downloaded) with the filters and metrics of its own gsm8k or
minerva_math500 (its metric math_verify; the other one asks for another wording of the answer). Prints accuracies with
Wilson's 95% interval and every completion on which the verdicts differ; asserts nothing.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import lm_eval
import yaml
from decode_sides import name_vllm
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from stepkd.data.config import DataConfig
from stepkd.data.load import load_rows
from stepkd.data.sources import get_benchmark
from stepkd.grading.pool import Grader
from stepkd.runs.job import read_results, read_settings
from stepkd.statistics import wilson_interval

JUDGES = {
    "gsm8k": {"gsm8k/gsm8k.yaml": {"strict-match": "exact_match", "flexible-extract": "exact_match"}},
    "math500": {"minerva_math/minerva_math500.yaml": {"none": "math_verify"}},
}
"""Benchmark -> task of lm-eval that judges it -> its filter -> its metric."""
Row = dict[str, Any]


class Given(LM):
    """A model that gives completions at hand, by prompt."""

    def __init__(self, rows: list[Row]) -> None:
        super().__init__()
        self.texts = {row["prompt"]: row["completion"] for row in rows}

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        return [self.texts[request.args[0]] for request in requests]

    def loglikelihood(self, requests: list[Any]) -> list[Any]:
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood


def sampled(folder: Path) -> list[Row]:
    """The completions of an evaluation, with its verdicts."""
    rows = read_results(folder)
    return [{**row["samples"][0], **{name: row[name] for name in ("id", "prompt", "answer")}} for row in rows]


def published(solutions: Path, problems: Path, benchmark: str) -> list[Row]:
    """ProcessBench's solutions of problems whose answer is known, with the verdicts of stepkd's grader."""
    known = {
        plain(row["prompt"]): row for row in load_rows(DataConfig(source=benchmark, path=str(problems), split="test"))
    }
    rows = []
    for line in solutions.read_text("utf-8").splitlines():
        found = json.loads(line)
        if row := known.get(plain(found["problem"])):
            text = "\n\n".join(found["steps"])
            rows.append({"id": found["id"], "answer": row["answer"], "completion": text, "finish": "stop"})
            rows[-1]["prompt"] = f"{found['id']}: {found['problem']}"
    with Grader(extractors=get_benchmark(benchmark).extractors) as grader:
        grades = grader.grade([row["completion"] for row in rows], [row["answer"] for row in rows])
    return [
        row | {"verdict": str(grade.verdict), "extracted": grade.extracted}
        for row, grade in zip(rows, grades, strict=True)
    ]


def plain(text: str) -> str:
    return "".join(text.split())


def write_task(folder: Path, judge: str, rows: list[Row], tokens: int) -> str:
    """Write lm-eval's task with these problems in place of its own; its name is returned."""
    docs = [
        {"prompt": row["prompt"], "answer": f"#### {row['answer']}", "problem": row["prompt"], "number": number}
        | {"solution": f"$\\boxed{{{row['answer']}}}$"}
        for number, row in enumerate(rows)
    ]
    (folder / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs), encoding="utf-8")
    name = f"local_{Path(judge).stem}"
    task = {
        "include": str(Path(lm_eval.__file__).parent / "tasks" / judge),
        "task": name,
        "tag": None,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"test": str(folder / "docs.jsonl")}},
        "training_split": None,
        "fewshot_split": None,
        "test_split": "test",
        "doc_to_text": "{{prompt}}",
        "num_fewshot": 0,
        "fewshot_config": None,
        "generation_kwargs": {"until": [], "do_sample": False, "temperature": 0.0, "max_gen_toks": tokens},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    return name


def verdicts(model: Any, name: str, folder: Path, metrics: dict[str, str], **settings: Any) -> dict[str, list[Any]]:
    """lm-eval's verdict and answer for every problem, in order, by filter."""
    found = lm_eval.simple_evaluate(
        model, tasks=[name], task_manager=TaskManager(include_path=str(folder)), bootstrap_iters=0, **settings
    )
    samples = sorted(found["samples"][name], key=lambda sample: sample["doc"]["number"])
    return {
        which: [(bool(s[metric]), str(s["filtered_resps"][0])) for s in samples if s["filter"] == which]
        for which, metric in metrics.items()
    }


def share(correct: list[bool]) -> str:
    return f"{sum(correct)} of {len(correct)} correct, {wilson_interval(sum(correct), len(correct))}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("completions", type=Path, help="folder of stepkd evaluate, or a file of ProcessBench")
    parser.add_argument("--benchmark", help="of a file: gsm8k or math500")
    parser.add_argument("--problems", type=Path, help="of a file: the benchmark's, with answers")
    parser.add_argument("--generate", help="model_args of lm-eval's vllm model, which then samples too")
    given = parser.parse_args()
    if given.completions.is_dir():
        settings = read_settings(given.completions)
        rows, benchmark = sampled(given.completions), settings["benchmark"]["name"]
        tokens = settings["sampling"]["max_new_tokens"]
    else:
        rows, benchmark, tokens = published(given.completions, given.problems, given.benchmark), given.benchmark, 0
    ours = [row["verdict"] == "correct" for row in rows]
    print(f"stepkd: {share(ours)}")
    with tempfile.TemporaryDirectory() as place:
        for judge, metrics in JUDGES[benchmark].items():
            name = write_task(Path(place), judge, rows, tokens)
            for which, theirs in verdicts(Given(rows), name, Path(place), metrics).items():
                apart = [each for each in zip(rows, ours, theirs, strict=True) if each[1] != each[2][0]]
                correct = share([is_correct for is_correct, _ in theirs])
                print(f"lm-eval {name}, {which}, same completions: {correct}, {len(apart)} verdicts differ")
                for row, _, (is_correct, answer) in apart:
                    print(
                        f"  {row['id']}: stepkd {row['verdict']} {row['extracted']!r}, lm-eval "
                        f"{'correct' if is_correct else 'incorrect'} {answer[-120:]!r}, reference {row['answer']!r}, "
                        f"finish {row['finish']}"
                    )
            if given.generate:
                name_vllm()
                own = verdicts("vllm", name, Path(place), metrics, model_args=given.generate, batch_size="auto")
                for which, theirs in own.items():
                    correct = share([is_correct for is_correct, _ in theirs])
                    print(f"lm-eval {name}, {which}, its own completions: {correct}")


if __name__ == "__main__":
    main()
