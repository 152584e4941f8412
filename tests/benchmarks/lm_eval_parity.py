"""Verdicts of lm-evaluation-harness on the completions of ``stepkd evaluate``, and its own run on the same prompts.

Run, where ``lm_eval`` 0.4.13 with math-verify is installed (and vLLM for ``--generate``; stepkd need not be):
``python tests/benchmarks/lm_eval_parity.py runs/parity-gsm8k --generate pretrained=MODEL,dtype=bfloat16``.

The folder's problems become a local task of lm-eval (nothing is downloaded): the exact prompts, the answers, and the
filters and metrics of its own gsm8k, or of its minerva_math500 and hendrycks_math500. It is run once with a model that
gives the completions of the folder, so that both harnesses judge the same texts, and with ``--generate`` once more with
its vLLM model, greedy, up to the same number of tokens. Prints the accuracies with Wilson's 95% interval and every
problem on which the verdicts differ; asserts nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import lm_eval
import yaml
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

JUDGES = {
    "gsm8k": {"gsm8k/gsm8k.yaml": {"strict-match": "exact_match", "flexible-extract": "exact_match"}},
    "math500": {
        "minerva_math/minerva_math500.yaml": {"none": "math_verify"},
        "hendrycks_math/hendrycks_math500.yaml": {"none": "exact_match"},
    },
}
"""Benchmark -> task of lm-eval that judges it -> its filter -> its metric."""


class Given(LM):
    """A model that gives completions at hand, by prompt."""

    def __init__(self, texts: dict[str, str]) -> None:
        super().__init__()
        self.texts = texts

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        return [self.texts[request.args[0]] for request in requests]

    def loglikelihood(self, requests: list[Any]) -> list[Any]:
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood


def write_task(folder: Path, judge: str, rows: list[dict[str, Any]], tokens: int) -> str:
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
        which: [(bool(s[metric]), s["filtered_resps"][0]) for s in samples if s["filter"] == which]
        for which, metric in metrics.items()
    }


def share(correct: list[bool]) -> str:
    """Share in percent with Wilson's 95% interval."""
    n, p, z = len(correct), sum(correct) / len(correct), 1.959964
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (100 * (centre + side * half) / (1 + z * z / n) for side in (-1, 1))
    return f"{sum(correct)} of {n}, {100 * p:.1f} ({low:.1f} to {high:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of stepkd evaluate, one sample a problem")
    parser.add_argument("--generate", help="model_args of lm-eval's vllm model, which then samples too")
    given = parser.parse_args()
    settings = json.loads((given.run / "settings.json").read_text("utf-8"))
    rows = [json.loads(line) for line in (given.run / "results.jsonl").read_text("utf-8").splitlines()]
    own = [row["samples"][0] for row in rows]
    ours = [sample["verdict"] == "correct" for sample in own]
    print(f"stepkd: {share(ours)}")
    tokens = settings["sampling"]["max_new_tokens"]
    with tempfile.TemporaryDirectory() as place:
        for judge, metrics in JUDGES[settings["benchmark"]["name"]].items():
            name = write_task(Path(place), judge, rows, tokens)
            texts = {row["prompt"]: sample["completion"] for row, sample in zip(rows, own, strict=True)}
            for which, theirs in verdicts(Given(texts), name, Path(place), metrics).items():
                print(f"lm-eval {name}, {which}, on stepkd's completions: {share([right for right, _ in theirs])}")
                for row, sample, right, (other, answer) in zip(rows, own, ours, theirs, strict=True):
                    if right != other:
                        print(
                            f"  {row['id']}: stepkd {sample['verdict']} ({sample['extracted']!r}), lm-eval "
                            f"{'correct' if other else 'incorrect'} ({answer[-200:]!r}), reference {row['answer']!r}, "
                            f"finish {sample['finish']}"
                        )
            if given.generate:
                sampled = verdicts("vllm", name, Path(place), metrics, model_args=given.generate, batch_size="auto")
                for which, theirs in sampled.items():
                    print(f"lm-eval {name}, {which}, its own run: {share([right for right, _ in theirs])}")


if __name__ == "__main__":
    main()
