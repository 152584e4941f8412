"""Verdicts per second of the grader, on the path without a worker and through math-verify workers.

Run: ``python tests/benchmarks/bench_grading.py [items]``. Prints one line per path; asserts nothing.
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from pathlib import Path

from stepkd.grading.pool import Grader, GradingConfig


def _worker_cpu_s(grader: Grader) -> float:
    """CPU seconds of the live workers so far (Linux)."""
    total = 0.0
    for worker in grader._pool:
        fields = Path(f"/proc/{worker.process.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def main(items: int = 4000) -> None:
    """Time both paths on distinct easy items; half of the numeric ones are incorrect.

    CPU time per verdict is printed beside the rate, because the rate falls when other jobs share the cores.
    """
    plain = [(f"She pays {i} * 3 = ${3 * i:,}.00 in all.\n#### {3 * i:,}", str(3 * i + i % 2)) for i in range(items)]
    fractions = [(f"So it is $\\boxed{{\\frac{{{i}}}{{8}}}}$.", f"{(i + i % 2) / 8}") for i in range(1, items + 1)]
    algebra = [(f"\\boxed{{(x+{i})(x-{i % 2})}}", f"x^2+{i - i % 2}x-{i * (i % 2)}") for i in range(items // 4)]
    with Grader(GradingConfig(workers=2)) as grader:
        start = time.perf_counter()
        grader.grade(["\\boxed{\\frac{1}{2}}", "\\boxed{\\frac{1}{4}}"], ["0.5", "0.25"])
        print(f"start of 2 workers: {time.perf_counter() - start:.2f} s")
        for name, pairs in (
            ("fast path (plain numbers, no worker)", plain),
            ("2 math-verify workers (fraction against decimal)", fractions),
            ("2 math-verify workers (products of polynomials)", algebra),
        ):
            start, cpu = time.perf_counter(), _worker_cpu_s(grader)
            grades = grader.grade([text for text, _ in pairs], [gold for _, gold in pairs])
            elapsed = time.perf_counter() - start
            cpu_ms = 1000 * (_worker_cpu_s(grader) - cpu) / len(pairs)
            print(f"{name}: {len(pairs) / elapsed:,.0f} verdicts/s, {cpu_ms:.2f} ms of worker CPU each")
            print(f"    {Counter(str(grade.verdict) for grade in grades)}")


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:2]))
