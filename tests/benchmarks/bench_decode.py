"""Tokens per second of sampling alone, every engine in one run: one Markdown table, and the figures as JSON.

Run: ``python tests/benchmarks/bench_decode.py --model FOLDER --out RESULT [--problems gsm8k/test.jsonl]
[--against CHECKOUT] [--vllm-python PYTHON] [--lm-eval-python PYTHON]``. Sides are ``old`` (the decoder of another
checkout, as old as commit deb7e86), ``ours`` (in process), ``generate`` and ``generate-static`` (transformers, with a
growing and a static cache), ``vllm`` (in process), ``server-16``, ``-64``, ``-128`` (one vLLM server with so many
requests at a time, started here or at ``--server``; ``server-64-unseeded`` without seeds), ``lm-eval-hf`` and
``lm-eval-vllm`` (lm-evaluation-harness).

Every side is a process of its own, started when its turn comes first, with one batch behind it; they take turns, round
by round. Completions have a fixed length (no token ends one), all sides compute in one dtype on the same prompts, and
only sampling is timed: starts and grading are not. A figure is written to RESULT/figures.json as soon as it is there;
the same command again measures what is missing. A side that fails is named with the end of its log. Asserts nothing.

``--sides ours old vllm@256`` takes these, the last at 256 prompts only. CPU seconds are those of the side's process:
what to compare on a machine that others use, with ``OMP_NUM_THREADS=1``. A server's are not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from decode_sides import CONTINUATIONS, SIDES

HERE = Path(__file__).parents[2]
NEW_IN_BRANCHES = 32


def main() -> None:
    """Let the sides take turns and print the table."""
    given = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # a server that was started here goes, too
    sides = [(side, int(size) if size else None) for side, _, size in (each.partition("@") for each in given.sides)]
    jobs: list[tuple[str, int, int]] = [("completions", number, given.new_tokens) for number in given.prompts]
    jobs += [("branches", given.monte_carlo, NEW_IN_BRANCHES)] if given.monte_carlo else []
    out = Path(given.out)
    out.mkdir(parents=True, exist_ok=True)
    settings = {name: getattr(given, name) for name in ("model", "problems", "dtype", "rows", "new_tokens")}
    settings["threads"] = given.threads
    path = out / "figures.json"
    known = json.loads(path.read_text()) if path.is_file() else {"settings": settings, "figures": []}
    if known["settings"] != settings:
        raise SystemExit(f"{path} is of {known['settings']}, and this is {settings}: give another --out")
    figures = known["figures"]
    left = [
        (side, what, number, new, turn)
        for turn in range(given.rounds)
        for what, number, new in jobs
        for side, size in sides
        if size in (None, number) and (what == "completions" or not side.startswith(("generate", "lm-eval")))
        if not any([side, what, number, turn] == each["of"] for each in figures)
    ]
    with ExitStack() as stack:
        running, failed = {}, set()
        for place, (side, what, number, new, turn) in enumerate(left):
            try:
                if side in failed:
                    continue
                if side.startswith("server") and not given.server:
                    given.server = stack.enter_context(served(given, out))
                if side not in running:
                    running[side] = started(side, given, out)
                running[side].stdin.write(json.dumps({"what": what, "number": number, "new": new}) + "\n")
                running[side].stdin.flush()
                tokens, wall, cpu = json.loads(running[side].stdout.readline())
            except (OSError, ValueError, RuntimeError) as error:
                failed.add(side)
                log = out / f"{side}.log"
                print(f"{side} failed ({error}): {log.read_text()[-1500:] if log.is_file() else ''}", file=sys.stderr)
                continue
            finally:
                if side in running and side not in {each[0] for each in left[place + 1 :]}:
                    end(running.pop(side))
            cpu = None if side.startswith("server") else cpu
            figures.append({"of": [side, what, number, turn], "tokens": tokens, "wall_s": wall, "cpu_s": cpu})
            path.write_text(json.dumps(known, indent=1))
            print(f"{side}: {number} {what}: {tokens} tokens in {wall:.1f} s", file=sys.stderr, flush=True)
        for process in running.values():
            end(process)
    text = table(known, jobs)
    (out / "table.md").write_text(text)
    print(text)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="what policy.path takes; vLLM needs a folder")
    parser.add_argument("--out", required=True, help="folder of figures, table and logs")
    parser.add_argument("--problems", help="JSON Lines with question and answer (GSM8K); default: made here")
    parser.add_argument("--dtype", help="of all sides; default: bfloat16 where the CPU has it, else float32")
    parser.add_argument("--prompts", type=int, nargs="*", default=[64, 256])
    parser.add_argument("--new-tokens", type=int, default=128, help="tokens of every completion")
    parser.add_argument("--rows", type=int, default=64, help="decoded at once by old, ours, generate and lm-eval-hf")
    parser.add_argument("--monte-carlo", type=int, default=0, metavar="SOLUTIONS", help="continue their prefixes, too")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--sides", nargs="+", help=f"of {', '.join(SIDES)}; default: all that can run")
    parser.add_argument("--against", help="another checkout of this project: old")
    parser.add_argument("--vllm-python", help="Python that has vLLM and what this project needs: vllm, server")
    parser.add_argument("--server", help="address of a vLLM server of the model; default: one is started")
    parser.add_argument("--lm-eval-python", help="Python that has lm_eval (and vLLM, for lm-eval-vllm)")
    parser.add_argument("--warm", type=int, nargs=2, default=[64, 16], help="prompts and new tokens before the first")
    given = parser.parse_args()
    needs = {"old": given.against, "vllm": given.vllm_python, "server": given.server or given.vllm_python}
    needs |= {"lm": given.lm_eval_python}
    if given.sides is None:
        given.sides = [side for side in SIDES if needs.get(side.split("-")[0], True)]
    for side in given.sides:
        name = side.partition("@")[0]
        if name not in SIDES or not needs.get(name.split("-")[0], True):
            parser.error(f"side {side!r}: not one of {', '.join(SIDES)}, or the option that it needs is missing")
    import torch

    from stepkd.models.machine import fast_bfloat16

    given.dtype = given.dtype or ("bfloat16" if fast_bfloat16() else "float32")
    given.threads = torch.get_num_threads()
    return given


def variables(given: argparse.Namespace) -> dict[str, str]:
    """Environment of every side: no network, and vLLM on as many cores as torch."""
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "3"),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0))[: given.threads])),
    }


def preloaded(python: str) -> dict[str, str]:
    """What vLLM's guide for CPUs loads first, as far as it is here: Intel's OpenMP of its environment, tcmalloc."""
    found = [Path(python).parent.parent / "lib/libiomp5.so", *Path("/usr/lib").glob("*/libtcmalloc_minimal.so.4")]
    return {"LD_PRELOAD": ":".join(str(each.absolute()) for each in found if each.is_file())}


def started(side: str, given: argparse.Namespace, out: Path) -> Any:
    """A side's process, ready."""
    python = {"vllm": given.vllm_python, "lm": given.lm_eval_python}.get(side.split("-")[0]) or sys.executable
    checkout = given.against if side == "old" else str(HERE)
    own = {"PYTHONPATH": checkout, **(preloaded(python) if side.endswith("vllm") else {})}
    command = [python, str(Path(__file__).with_name("decode_sides.py")), side, json.dumps(vars(given))]
    with (out / f"{side}.log").open("w") as log:
        process = subprocess.Popen(
            command, env={**variables(given), **own}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=log, text=True,
        )  # fmt: skip
    if process.stdout is None or process.stdout.readline() != "ready\n":
        raise RuntimeError("it does not start")
    return process


def end(process: Any) -> None:
    """Let a side go."""
    process.stdin.close()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()


@contextmanager
def served(given: argparse.Namespace, out: Path) -> Iterator[str]:
    """Address of a vLLM server of the model, while it runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["--model", given.model, "--port", str(port), "--host", "127.0.0.1", "--dtype", given.dtype]
    words += ["--logprobs-mode", "processed_logprobs", "--max-model-len", "1024", "--enforce-eager"]
    words += ["--no-enable-chunked-prefill"]  # its CPU engine dies of a seed where it splits a prompt
    environment = {key: value for key, value in variables(given).items() if key != "PYTHONPATH"}
    environment |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", **preloaded(given.vllm_python)}
    command = [given.vllm_python, "-m", "vllm.entrypoints.openai.api_server", *words]
    with (out / "server.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=out, start_new_session=True)
    url, until = f"http://127.0.0.1:{port}", time.monotonic() + 400
    try:
        while True:
            try:
                with urllib.request.urlopen(f"{url}/health", timeout=5):
                    break
            except OSError as error:
                if process.poll() is not None or time.monotonic() > until:
                    raise RuntimeError(f"vLLM's server does not start, see {out / 'server.log'}") from error
                time.sleep(0.5)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def table(known: dict[str, Any], jobs: list[tuple[str, int, int]]) -> str:
    """Medians over the rounds, and their ratio to the old decoder's (ours where that was not measured)."""
    settings, lines = known["settings"], []
    head = "| side | tokens/s | of a CPU second | ratio | by CPU | rounds |\n| --- | --- | --- | --- | --- | --- |"
    for what, number, new in jobs:
        found: dict[str, list[dict[str, Any]]] = {}
        for each in known["figures"]:
            if each["of"][1:3] == [what, number]:
                found.setdefault(each["of"][0], []).append(each)
        base = "old" if "old" in found else "ours"
        rates = {
            side: (_rate(own, "wall_s"), _rate(own, "cpu_s"))
            for side, own in sorted(found.items(), key=lambda pair: list(SIDES).index(pair[0]))
        }
        label = f"{number} prompts" if what == "completions" else f"{number} solutions, {CONTINUATIONS} a prefix,"
        lines += [f"\n**{label} x {new} tokens** (ratios to {base})\n\n{head}"]
        for side, both in rates.items():
            ratios = [
                mine / its if mine and its else None for mine, its in zip(both, rates.get(base, both), strict=True)
            ]
            cells = [f"{x:.1f}" if x else "" for x in both] + [f"{x:.2f}" if x else "" for x in ratios]
            lines.append(f"| {side} | {' | '.join(cells)} | {len(found[side])} |")
    facts = f"{settings['model']}, {settings['dtype']}, {settings['threads']} threads, {settings['rows']} rows at once"
    return f"{facts}, sampling alone, tokens per second\n" + "\n".join(lines) + "\n"


def _rate(own: list[dict[str, Any]], seconds: str) -> float | None:
    found = [each["tokens"] / each[seconds] for each in own if each[seconds]]
    return statistics.median(found) if found else None


if __name__ == "__main__":
    main()
