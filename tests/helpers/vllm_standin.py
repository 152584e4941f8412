"""A stand-in for a vLLM server: its own endpoints, a tiny model behind them, and what goes wrong with servers.

``python vllm_standin.py FOLDER PORT FILE`` serves the model of a folder and notes prompts and seeds in a file.
"""

from __future__ import annotations

import copy
import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from stepkd.models.policy import Policy
from stepkd.models.spec import PolicyConfig
from stepkd.sampling.engine import SamplingConfig
from stepkd.sampling.transformers_engine import TransformersEngine


class Listener(ThreadingHTTPServer):
    """With room for as many connections at a time as vLLM's has."""

    request_queue_size = 2048


class StandIn:
    """Serves a policy under an address of its own.

    Args:
        policy: the model.
        name: what it says it serves.
        logprobs_mode: what it says of its log-probabilities.
        port: where; 0 takes a free one.
    """

    def __init__(self, policy: Policy, name: str, logprobs_mode: str = "processed_logprobs", port: int = 0) -> None:
        self.policy = policy
        self.name = name
        self.context = 1024
        self.device = "cpu"
        self.config: dict[str, Any] = {"model_config": {"logprobs_mode": logprobs_mode}, "lora_config": None}
        self.adapters: dict[str, Policy] = {}
        self.requests: list[dict[str, Any]] = []
        self.posts: list[tuple[str, Any]] = []
        """All that was posted, paths with their bodies."""
        self.gets: list[str] = []
        self.keys: list[str | None] = []
        self.faults: list[str] = []
        """Of the next completions: refuse (503), busy (429), fail (500), drop, half, words (no JSON), slow (2 s), hang
        (until it is closed)."""
        self.hangs = False
        """Whether nothing is answered any more, until it is closed."""
        self.gone = False
        """Whether every connection ends without an answer."""
        self.paused = False
        self.models: Any = None
        """What it says that it serves, in place of vLLM's answer."""
        self.closed = threading.Event()
        self.deaf = False
        """Whether it says yes to weights and keeps the old ones."""
        self.by_path: dict[str, Policy] | None = None
        """In place of None: what it keeps by the path it was read from, as an adapter read again from one is."""
        self.stale = False
        """Whether prompts that it has seen are answered from the weights of then until its cache is reset."""
        self.spoil: Any = lambda answer: answer
        self.heard: Any = lambda body: None
        """Called with what is asked of completions."""
        self._seen: dict[tuple[Any, ...], Policy] = {}
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.keys.append(self.headers.get("Authorization"))
                outer.gets.append(self.path)
                answers: dict[str, Any] = {
                    "/v1/models": outer.models
                    or {"data": [{"id": outer.name, "max_model_len": outer.context, "parent": None}]},
                    "/version": {"version": "0.0"},
                    "/health": "",
                    "/server_info": {"vllm_config": {**outer.config, "device_config": {"device": outer.device}}},
                    "/is_paused": {"is_paused": outer.paused},
                }
                if outer.hangs:
                    outer.closed.wait()
                if outer.gone:
                    self.close_connection = True
                else:
                    self.reply(answers[self.path.partition("?")[0]])

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
                with outer._lock:
                    outer.posts.append((self.path, body))
                    fault = outer.faults.pop(0) if outer.faults and self.path == "/v1/completions" else ""
                if fault == "slow":
                    time.sleep(2)
                if fault == "hang" or outer.hangs:
                    outer.closed.wait()
                if fault in STATUS:
                    self.reply({"error": {"message": "not now"}}, STATUS[fault])
                elif fault != "drop" and not outer.gone and not outer.closed.is_set():
                    with outer._lock:
                        status, answer = outer.answer(self.path, body)
                    self.reply(answer, status, half=fault == "half", spoilt=fault == "words")
                else:
                    self.close_connection = True

            def reply(self, answer: Any, status: int = 200, *, half: bool = False, spoilt: bool = False) -> None:
                data = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
                data = b"<html>" if spoilt else data
                self.send_response(status)
                self.send_header("Content-Type", "text/plain" if isinstance(answer, str) else "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[: len(data) // 2] if half else data)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = Listener(("127.0.0.1", port), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Status and answer to what is posted."""
        path = path.partition("?")[0]
        if path in ("/pause", "/resume"):
            self.paused = path == "/pause"
        elif path == "/v1/load_lora_adapter":
            if body["lora_name"] in self.adapters:
                return 400, {"error": {"message": f"The lora adapter '{body['lora_name']}' has already been loaded."}}
            if not self.deaf:
                self.adapters[body["lora_name"]] = self.read(body["lora_path"])
            else:
                self.adapters[body["lora_name"]] = self.policy
        elif path == "/v1/unload_lora_adapter":
            self.adapters.pop(body["lora_name"])
        elif path == "/collective_rpc" and not self.deaf:
            self.policy = self.read(body["kwargs"]["weights_path"])
        elif path == "/reset_prefix_cache":
            self._seen.clear()
        elif path == "/v1/completions":
            if body["model"] != self.name and body["model"] not in self.adapters:
                return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
            self.requests.append(body)
            self.heard(body)
            policy = self.adapters.get(body["model"], self.policy)
            if self.stale:
                policy = self._seen.setdefault((body["model"], *body["prompt"]), policy)
            kinds = {"prompt_logprobs": self.scored, "logprob_token_ids": self.chosen}
            (make,) = [kinds[name] for name in kinds if name in body] or [self.written]
            return 200, self.spoil(make(policy, body))
        elif path == "/pooling":
            return 200, self.spoil(self.pooled(body))
        return 200, "Success" if "lora" in path else {"success": True}

    def read(self, path: str) -> Policy:
        """Weights or an adapter from a folder."""
        with _READS:
            return self._read(path)

    def _read(self, path: str) -> Policy:
        if self.by_path is not None and path in self.by_path:
            return self.by_path[path]
        if not (Path(path) / "adapter_config.json").is_file():
            read = Policy(copy.deepcopy(self.policy.model), self.policy.tokenizer, verify_head=False)
            read.model = type(read.model).from_pretrained(path)
        else:
            read = Policy.load(PolicyConfig(path=path))
        if self.by_path is not None:
            self.by_path[path] = read
        return read

    def written(self, policy: Policy, body: dict[str, Any]) -> dict[str, Any]:
        """Completions, in the server's form."""
        spec = SamplingConfig(
            n=body["n"],
            temperature=body["temperature"],
            top_p=body["top_p"],
            top_k=body["top_k"],
            max_new_tokens=body["max_tokens"],
            stop=tuple(body.get("stop", ())),
            seed=body["seed"] or 0,
        )
        drawn = TransformersEngine(policy).generate([body["prompt"]], spec)[0]
        choices = [
            {
                "index": index,
                "prompt_token_ids": body["prompt"],
                "token_ids": each.token_ids.tolist(),
                "logprobs": {"token_logprobs": each.logprobs.tolist()},
            }
            for index, each in enumerate(drawn)
        ]
        return {"choices": choices[::-1]}

    @torch.no_grad()
    def scored(self, policy: Policy, body: dict[str, Any]) -> dict[str, Any]:
        """Log-probabilities of the prompt's tokens, likeliest first, its own among them."""
        ids = body["prompt"]
        input_ids = torch.tensor([ids])
        hidden = policy.hidden(input_ids, torch.ones_like(input_ids))[0]
        logps = torch.log_softmax(policy.head(hidden), -1)
        found: list[Any] = [None]
        for place, own in enumerate(ids[1:]):
            order = logps[place].argsort(descending=True).tolist()
            kept = {*order[: body["prompt_logprobs"]], own}
            found.append({str(i): {"logprob": float(logps[place][i]), "rank": order.index(i) + 1} for i in kept})
        return {"choices": [{"prompt_logprobs": found}]}

    @torch.no_grad()
    def chosen(self, policy: Policy, body: dict[str, Any]) -> dict[str, Any]:
        """Log-probabilities of some tokens for the next one, and of the sampled one, as vLLM 0.30 lays them out."""
        assert body["logprobs"] == 1
        assert len(body["prompt"]) < self.context
        input_ids = torch.tensor([body["prompt"]])
        logits = policy.head(policy.hidden(input_ids, torch.ones_like(input_ids))[0, -1])
        logps, sampled = torch.log_softmax(logits, -1), int(logits.argmax())
        top = {f"token_id:{token}": float(logps[token]) for token in (sampled, *body["logprob_token_ids"])}
        said = {"token_logprobs": [float(logps[sampled])], "tokens": [f"token_id:{sampled}"], "top_logprobs": [top]}
        return {"choices": [{"index": 0, "logprobs": said}]}

    @torch.no_grad()
    def pooled(self, body: dict[str, Any]) -> dict[str, Any]:
        """Probabilities of both classes at every step marker, as vLLM 0.30 lays out a Qwen2ForProcessRewardModel's."""
        input_ids = torch.tensor([body["input"]])
        head = self.policy.require_step_head()
        hidden_SH = self.policy.hidden(input_ids, torch.ones_like(input_ids))[input_ids == head.ids.marker]
        both = head.logps(hidden_SH, self.policy.head).exp().tolist()
        return {"object": "list", "data": [{"index": 0, "object": "pooling", "data": both}]}

    def close(self) -> None:
        """Stop serving."""
        self.closed.set()
        self.server.shutdown()
        self.server.server_close()


_READS = threading.Lock()
"""transformers loads one model at a time."""
STATUS = {"refuse": 503, "busy": 429, "fail": 500}
"""Of faults that say so."""


def serve(folder: str, port: str, file: str) -> None:
    """Until the process ends."""
    torch.set_num_threads(1)
    served = StandIn(Policy.load(PolicyConfig(path=folder)), folder, port=int(port))
    with open(file, "a", encoding="utf-8") as stream:
        served.heard = lambda body: print(json.dumps([body["prompt"], body["seed"]]), file=stream, flush=True)
        served.closed.wait()


if __name__ == "__main__":
    serve(*sys.argv[1:])
