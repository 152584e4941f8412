"""One side of ``bench_decode.py``: a process that has its model loaded and samples when told to, by the clock.

Run by ``bench_decode.py``: ``python decode_sides.py SIDE SETTINGS``, with SETTINGS as JSON. Every line read asks for
one measurement (``{"what": "completions" or "branches", "number": 64, "new": 128}``) and is answered with one of
tokens, wall and CPU seconds. It may run in a checkout as old as commit deb7e86, and in a Python that has
lm-evaluation-harness only.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
import types
from collections.abc import Callable
from importlib import import_module, util
from pathlib import Path
from typing import Any

CONTINUATIONS = 4
"""Drawn of every prefix of a solution."""
Run = Callable[[str, int, int], int]
"""What, how many of them, and new tokens of each: the number of tokens sampled."""


def imported(*places: tuple[str, str]) -> Any:
    """The first of some names, of this version and older ones, that is there."""
    for module, name in places:
        known = util.find_spec(module.rpartition(".")[0]) and util.find_spec(module)
        if known and hasattr(import_module(module), name):
            return getattr(import_module(module), name)
    raise ImportError(f"none of {places}")


def rows(given: dict[str, Any], number: int) -> list[tuple[str, list[str]]]:
    """Prompts, with the steps of a solution each."""
    if given["problems"]:
        found = [json.loads(line) for line in Path(given["problems"]).read_text("utf-8").splitlines()[:number]]
        problems = [(row["question"], row["answer"].splitlines(keepends=True)) for row in found]
    else:
        things = ("pens", "oranges", "tickets", "light bulbs")
        problems = [
            (
                f"A shop sells {i + 2} boxes with {i % 7 + 3} {things[i % 4]} each"
                + f", and another {i % 9 + 2} of them one by one" * (1 + i % 3)
                + f". One costs {i % 5 + 1} dollars. How much does the shop take for the {things[i % 4]}?",
                [f"In boxes: {i + 2} * {i % 7 + 3}.\n", f"One by one: {i % 9 + 2} more.\n", "All of them.\n"],
            )
            for i in range(number)
        ]
    assert len(problems) == number, f"{given['problems']} has {len(problems)} problems, and {number} are asked for"
    return [(f"Question: {question}\nAnswer:", steps) for question, steps in problems]


def encoded(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text, nothing added."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def through(engine: Any, tokenizer: Any, given: dict[str, Any]) -> Run:
    """Sampling with an engine of ours, or of an older checkout."""
    sampling = imported(("stepkd.sampling.engine", "SamplingConfig"), ("stepkd.rollout.sampler", "SamplingSpec"))
    branch = imported(("stepkd.sampling.engine", "Branch"), ("stepkd.rollout.sampler", "Branch"))
    complete = getattr(engine, "generate", None) or engine.sample
    proceed = getattr(engine, "continue_branches", None) or engine.sample_branches

    def run(what: str, number: int, new: int) -> int:
        if what == "completions":
            prompts = [encoded(tokenizer, text) for text, _ in rows(given, number)]
            drawn = complete(sorted(prompts, key=len)[::-1], sampling(max_new_tokens=new))
            return sum(len(each.token_ids) for own in drawn for each in own)
        branches = []
        for index, (text, steps) in enumerate(rows(given, number)):
            ids, cuts = encoded(tokenizer, text), []
            for step in steps:
                ids += encoded(tokenizer, step)
                cuts.append(len(ids))
            branches.append(branch(ids, cuts, index))
        found = proceed(branches, sampling(n=CONTINUATIONS, max_new_tokens=new))
        drawn = [cut for each in found for cut in getattr(each, "continuations", None) or each.rollouts]
        return sum(len(each.token_ids) for own in drawn for each in own)

    return run


def in_process(given: dict[str, Any]) -> Run:
    """This checkout's decoder, whatever its age."""
    policy = _policy(given)
    engine = imported(
        ("stepkd.sampling.transformers_engine", "TransformersEngine"),
        ("stepkd.rollout.transformers_sampler", "TransformersSampler"),
    )(policy, max_rows=given["rows"])
    return through(engine, policy.tokenizer, given)


def generate(given: dict[str, Any], cache: str | None) -> Run:
    """``transformers.generate`` in batches of similar length."""
    import torch

    policy = _policy(given)
    model = policy.causal_lm.eval()

    @torch.no_grad()
    def run(what: str, number: int, new: int) -> int:
        prompts = sorted((encoded(policy.tokenizer, text) for text, _ in rows(given, number)), key=len)[::-1]
        count = 0
        for first in range(0, number, given["rows"]):
            part = prompts[first : first + given["rows"]]
            width = max(map(len, part))
            gaps = [width - len(prompt) for prompt in part]
            found = model.generate(
                input_ids=torch.tensor([[0] * gap + prompt for gap, prompt in zip(gaps, part, strict=True)]),
                attention_mask=torch.tensor([[0] * gap + [1] * (width - gap) for gap in gaps]),
                do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0, max_new_tokens=new,
                min_new_tokens=new, cache_implementation=cache,
            )  # fmt: skip
            count += int(found[:, width:].numel())
        return count

    return run


def _policy(given: dict[str, Any]) -> Any:
    settings = imported(("stepkd.models.spec", "PolicyConfig"), ("stepkd.models.spec", "PolicySpec"))
    policy = import_module("stepkd.models.policy").Policy.load(settings(path=given["model"], dtype=given["dtype"]))
    return _endless(policy)


def _outline(given: dict[str, Any]) -> Any:
    """Settings and tokenizer of a model that another engine holds."""
    load = import_module("stepkd.models.checkpoint").load_trained
    return _endless(load(given["model"], dtype=given["dtype"], weights=False))


def _endless(policy: Any) -> Any:
    """No token ends what is sampled of it."""
    type(policy).eos_ids = property(lambda _: frozenset())
    return policy


def vllm(given: dict[str, Any]) -> Run:
    """vLLM in this process, through our engine."""
    outline = _outline(given)
    settings = import_module("stepkd.sampling.config")
    engine = settings.VLLM().build(outline)
    parameters = functools.partial(engine._vllm.SamplingParams, ignore_eos=True)
    engine._vllm = types.SimpleNamespace(SamplingParams=parameters)
    run = through(engine, outline.tokenizer, given)

    def anew(what: str, number: int, new: int) -> int:
        engine.llm.reset_prefix_cache()
        return run(what, number, new)

    return anew


def server(given: dict[str, Any], requests: int, seeded: bool = True) -> Run:
    """A vLLM server, so many requests at a time, through our engine."""
    outline = _outline(given)
    settings = import_module("stepkd.sampling.config")
    engine = settings.VLLMServer(urls=given["server"], requests=requests, seeded=seeded).build(outline)
    client, ask = engine.client, engine.client.ask

    def to_the_limit(path: str, body: Any = None, **more: Any) -> Any:
        return ask(path, body and {**body, "ignore_eos": True}, **more)

    client.ask = to_the_limit
    run = through(engine, outline.tokenizer, given)

    def anew(what: str, number: int, new: int) -> int:
        if client.info:  # it was started with VLLM_SERVER_DEV_MODE
            client.once(client.urls[0], "/reset_prefix_cache", {})
        return run(what, number, new)

    return anew


def name_vllm() -> None:
    """Let lm-evaluation-harness find vLLM, whose version it asks for by a name that one built for CPUs lacks."""
    metadata, version = import_module("importlib.metadata"), import_module("vllm").__version__
    ask = metadata.version
    metadata.version = lambda name: version if name == "vllm" else ask(name)  # type: ignore[attr-defined]


def harness(given: dict[str, Any], backend: str) -> Run:
    """A backend of lm-evaluation-harness."""
    if backend == "vllm":
        name_vllm()
    instance, registry = import_module("lm_eval.api.instance"), import_module("lm_eval.api.registry")
    import_module("lm_eval.models")
    settings: dict[str, Any] = {"pretrained": given["model"], "dtype": given["dtype"], "batch_size": given["rows"]}
    on_cpu = {"enforce_eager": True, "enable_chunked_prefill": False, "max_model_len": 1024, "batch_size": "auto"}
    model = registry.get_model(backend)(**settings | ({"device": "cpu"} if backend == "hf" else on_cpu))
    # The end token's chance is 0 up to the last token.
    least = "min_new_tokens" if backend == "hf" else "min_tokens"

    def run(what: str, number: int, new: int) -> int:
        how = {"until": [], "do_sample": True, "temperature": 1.0, "top_p": 1.0, "max_gen_toks": new, least: new}
        how |= {"top_k": 0} if backend == "hf" else {}
        texts = [text for text, _ in rows(given, number)]
        requests = [instance.Instance("generate_until", {}, (text, dict(how)), i) for i, text in enumerate(texts)]
        getattr(model.model, "reset_prefix_cache", int)()  # vLLM's
        return len(model.generate_until(requests, disable_tqdm=True)) * new

    return run


SIDES: dict[str, Callable[[dict[str, Any]], Run]] = {
    "old": in_process,
    "ours": in_process,
    "generate": functools.partial(generate, cache=None),
    "generate-static": functools.partial(generate, cache="static"),
    "vllm": vllm,
    "server-16": functools.partial(server, requests=16),
    "server-64": functools.partial(server, requests=64),
    "server-128": functools.partial(server, requests=128),
    "server-64-unseeded": functools.partial(server, requests=64, seeded=False),
    "lm-eval-hf": functools.partial(harness, backend="hf"),
    "lm-eval-vllm": functools.partial(harness, backend="vllm"),
}


def main() -> None:
    """Load, warm up with one batch, and answer."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    given: dict[str, Any] = json.loads(sys.argv[2])
    run = SIDES[sys.argv[1]](given)
    run("completions", given["warm"][0], given["warm"][1])
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        wall, cpu = time.perf_counter(), time.process_time()
        tokens = run(asked["what"], asked["number"], asked["new"])
        # An id that no token has ends a completion of vLLM's.
        enough = asked["what"] != "completions" or tokens >= 0.95 * asked["number"] * asked["new"]
        assert enough, f"{tokens} tokens: something ends completions"
        found = [tokens, time.perf_counter() - wall, time.process_time() - cpu]
        print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main()
