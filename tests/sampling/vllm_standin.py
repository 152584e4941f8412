"""A stand-in for a vLLM server: the same requests and answers, a tiny model behind them."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from stepkd.models.policy import Policy
from stepkd.sampling.engine import SamplingConfig
from stepkd.sampling.transformers_engine import TransformersEngine


class StandIn:
    """Serves a policy under an address of its own.

    Args:
        policy: the model.
        name: what it says it serves.
        logprobs_mode: what it says of its log-probabilities.
    """

    def __init__(self, policy: Policy, name: str, logprobs_mode: str = "processed_logprobs") -> None:
        self.policy = policy
        self.name = name
        self.mode = logprobs_mode
        self.context = 1024
        self.requests: list[dict[str, Any]] = []
        self.spoil: Any = lambda answer: answer
        lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                answers: dict[str, Any] = {
                    "/health": {},
                    "/v1/models": {"data": [{"id": outer.name, "max_model_len": outer.context}]},
                    "/server_info": {
                        "vllm_config": {"model_config": {"logprobs_mode": outer.mode}, "weight_transfer_config": None}
                    },
                }
                self.reply(answers[self.path.partition("?")[0]])

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
                if self.path != "/v1/completions":
                    self.reply({})
                    return
                with lock:
                    outer.requests.append(body)
                    answer = outer.scored(body) if "prompt_logprobs" in body else outer.written(body)
                self.reply(outer.spoil(answer))

            def reply(self, answer: Any) -> None:
                data = json.dumps(answer).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def written(self, body: dict[str, Any]) -> dict[str, Any]:
        """Completions, in the server's form."""
        spec = SamplingConfig(
            n=body["n"],
            temperature=body["temperature"],
            top_p=body["top_p"],
            top_k=body["top_k"],
            max_new_tokens=body["max_tokens"],
            stop=tuple(body.get("stop", ())),
            seed=body["seed"],
        )
        choices = []
        for prompt, drawn in zip(
            body["prompt"], TransformersEngine(self.policy).generate(body["prompt"], spec), strict=True
        ):
            for each in drawn:
                names = [f"token_id:{i}" for i in each.token_ids.tolist()]
                logprobs = {
                    "tokens": names,
                    "token_logprobs": each.logprobs.tolist(),
                    "top_logprobs": [{name: value} for name, value in zip(names, each.logprobs.tolist(), strict=True)],
                }
                choices.append({"prompt_token_ids": prompt, "token_ids": each.token_ids.tolist(), "logprobs": logprobs})
        return {"choices": choices}

    @torch.no_grad()
    def scored(self, body: dict[str, Any]) -> dict[str, Any]:
        """Log-probabilities of the prompt's tokens, likeliest first, its own among them."""
        choices = []
        for ids in body["prompt"]:
            input_ids = torch.tensor([ids])
            hidden = self.policy.hidden(input_ids, torch.ones_like(input_ids))[0]
            logps = torch.log_softmax(self.policy.head(hidden) / body["temperature"], -1)
            found: list[Any] = [None]
            for place, own in enumerate(ids[1:]):
                order = logps[place].argsort(descending=True).tolist()
                kept = {*order[: body["prompt_logprobs"]], own}
                found.append({str(i): {"logprob": float(logps[place][i]), "rank": order.index(i) + 1} for i in kept})
            choices.append({"prompt_logprobs": found})
        return {"choices": choices}

    def close(self) -> None:
        """Stop serving."""
        self.server.shutdown()
        self.server.server_close()
