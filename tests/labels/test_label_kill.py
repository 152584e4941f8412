"""A labelling job killed with SIGKILL, then resumed in another process with other ranks."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from stepkd.labels import LabelSpec

WORKER = """
import os, signal, sys
from stepkd.labels import LabelSpec, job_parts, run_label_job
from stepkd.models import Policy, PolicySpec
from stepkd.rollout import TransformersSampler

spec, record, kill_at = eval(sys.argv[1]), sys.argv[2], int(sys.argv[3])
policy = Policy.load(PolicySpec(path="tiny-0.1m", dtype="float64"))

class Killed(TransformersSampler):
    calls = 0

    def drawn(self, kind, indices, results):
        with open(record, "a") as file:
            file.writelines(f"{kind} {index}\\n" for index in indices)
        Killed.calls += 1
        if Killed.calls == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)  # drawn, and not yet stored
        return results

    def sample(self, prompts, spec, **options):
        return self.drawn("problem", options["indices"], super().sample(prompts, spec, **options))

    def sample_branches(self, branches, spec, **options):
        results = super().sample_branches(branches, spec, **options)
        return self.drawn("solution", [branch.index for branch in branches], results)

run_label_job(spec, parts=job_parts(spec, policy=policy, sampler=Killed(policy, max_rows=4)))
"""


def test_killed_and_resumed(spec: LabelSpec, run: Any, run_ranks: Any, recording: Any, tmp_path: Path) -> None:
    whole = recording()
    run(spec, sampler=whole)
    expected = [(Path(spec.out) / name).read_bytes() for name in ("labels.jsonl", "summary.json")]
    torn = LabelSpec(**{**vars(spec), "out": str(tmp_path / "torn")})
    record = tmp_path / "drawn.txt"
    done = subprocess.run(
        [sys.executable, "-c", WORKER, repr(torn), str(record), "5"],  # the second of the calls for labels, after 3
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (Path(torn.out) / "labels.jsonl").exists()
    # A write may be cut off in the middle as well; the job is then resumed by two ranks.
    (Path(torn.out) / "parts" / "labels" / ".000003.jsonl.0.tmp").write_bytes(b'{"id": "tor')
    last = recording()
    run_ranks(torn, 2, sampler=last)
    assert [(Path(torn.out) / name).read_bytes() for name in ("labels.jsonl", "summary.json")] == expected

    drawn: dict[str, Counter[int]] = {"problem": Counter(last.sampled), "solution": Counter(last.continued)}
    for line in record.read_text().splitlines():
        kind, index = line.split()
        drawn[kind][int(index)] += 1
    repeated = {kind: sorted(index for index, count in counts.items() if count > 1) for kind, counts in drawn.items()}
    assert sorted(drawn["problem"]) == list(range(5))
    assert sorted(drawn["solution"]) == sorted(whole.continued)
    assert last.sampled == [], "the first phase was complete"
    assert repeated == {"problem": [], "solution": [2, 3]}, "only the group in flight is drawn again"
    assert max(drawn["solution"].values()) == 2
