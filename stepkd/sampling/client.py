"""Plain HTTP to vLLM servers of one model: several addresses in turn, retries, bounded concurrency.

The standard library is all it needs: neither vLLM nor CUDA. Prompts go as token ids and tokens come back as ids
(``return_token_ids``), so that nothing is tokenised twice. A key is read from the variable :data:`KEY` alone, which the
server reads too.
"""

from __future__ import annotations

import http.client
import json
import logging
import math
import os
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import count
from typing import Any, TypeVar

from stepkd.errors import ConfigError, MachineError, ModelError

logger = logging.getLogger(__name__)

T = TypeVar("T")
KEY = "VLLM_API_KEY"
"""Environment variable of the key that servers ask for, where they ask for one."""
START = (
    "`VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs --max-logprobs 64` (on a CPU also "
    "--no-enable-chunked-prefill; to train an adapter also VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 --enable-lora "
    "--max-lora-rank 64)"
)
"""How a server is started that samples, scores and takes weights."""
_TOO_MANY, _LOADING = 429, (502, 503, 504)
_LOOKS_EVERY_S = 5.0
"""Seconds for which an address that gave no answer is passed over, where there are others."""


class Client:
    """Servers of one model.

    Args:
        urls: addresses, ``http://host:port``; requests go to them in turn.
        requests: most requests under way at the same time, over all addresses.
        timeout_s: seconds that are waited for an answer, and for a server that is away to come back.
        gives_up: asked while a server is away; once it says yes, nothing is waited for.

    Raises:
        ConfigError: nothing answers at an address, it refuses the key, or two of them serve different models.
    """

    def __init__(
        self,
        urls: Sequence[str],
        requests: int = 64,
        timeout_s: float = 600.0,
        gives_up: Callable[[], bool] | None = None,
    ) -> None:
        self.urls = tuple(url.rstrip("/").removesuffix("/v1") for url in urls)
        self.requests, self.timeout_s, self.gives_up = requests, timeout_s, gives_up
        self.restore: Callable[[str], None] | None = None
        """Called with an address that was away, before anything else is asked of it."""
        self.model, self.root, self.max_length, self.version = "", "", 0, ""
        self._turn, self._lock = count(), threading.Lock()
        self.last = threading.local()
        """Its ``url`` is the address that gave this thread the last answer."""
        self._away: dict[str, float] = {}
        """Addresses that gave no answer, with the time at which they were last looked for."""
        self._ended = False
        for url in self.urls:
            try:
                self._patiently(self._greet, url)
            except MachineError as error:
                raise ConfigError(f"{error} Start one with {START}") from error
        self.name = self.model
        """Under which completions are asked for: the model's, or that of an adapter on it."""

    @cached_property
    def info(self) -> dict[str, Any]:
        """Settings that the first server runs with, as it names them; empty where it does not say
        (``VLLM_SERVER_DEV_MODE`` is not set there)."""
        try:
            return dict(self.ask("/server_info?config_format=json", at=self.urls[0])["vllm_config"])
        except ConfigError:
            return {}

    def map(self, function: Callable[[T], Any], items: Sequence[T]) -> Iterator[Any]:
        """``function`` of every item, in order, at most ``requests`` at the same time; the first error ends it."""
        self._ended = False
        with ThreadPoolExecutor(max_workers=self.requests) as pool:
            try:
                yield from pool.map(function, items)
            except BaseException:
                self._ended = True  # nobody waits for the others
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def ask(self, path: str, body: Any = None, *, at: str | None = None) -> Any:
        """Post a JSON value (or get, without one) and read the answer.

        What meets no server, half an answer or a busy server is asked again, at the next address where any may answer,
        until ``timeout_s`` is over.

        Args:
            path: with its leading slash.
            body: what is posted; None: a GET.
            at: the one address that is asked; None: the next in turn.

        Raises:
            ConfigError: the request is refused.
            ModelError: the server fails at it.
            MachineError: no answer in time.
        """

        def attempt(url: str) -> Any:
            if at is None:
                self._come_back(url)
            return self.once(url, path, body)

        return self._patiently(attempt, at)

    def once(self, url: str, path: str, body: Any = None, timeout_s: float | None = None) -> Any:
        """:meth:`ask` one address, one time.

        Raises:
            OSError, HTTPException, ValueError: no answer, half of one, or no JSON value.
        """
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(url + path, None if body is None else json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=timeout_s or self.timeout_s) as answer:
            text, is_json = answer.read(), answer.headers.get_content_type() == "application/json"
        self.last.url = url
        return json.loads(text) if is_json else text.decode()  # weights are answered with a word, or nothing

    def _patiently(self, attempt: Callable[[str], Any], at: str | None) -> Any:
        began, tries, failures = time.monotonic(), 0, 0
        while True:
            url = at or self.urls[next(self._turn) % len(self.urls)]
            tries += 1
            try:
                return attempt(url)
            except urllib.error.HTTPError as error:
                path = urllib.parse.urlsplit(error.url).path
                problem = f"{error.code} at {path}: {_message(error)}"
                # A server that was restarted between two requests has not got the adapter.
                is_gone = error.code == 404 and path == "/v1/completions" and failures < len(self.urls)
                if error.code != _TOO_MANY and error.code < 500 and not is_gone:
                    raise ConfigError(f"the vLLM server at {url} refuses a request ({problem})") from error
                failures += error.code not in (_TOO_MANY, *_LOADING)
                if failures > len(self.urls):
                    raise ModelError(
                        f"the vLLM server at {url} fails ({problem}): its log says why. It is to be started with "
                        f"{START}"
                    ) from error
                away = error.code != _TOO_MANY
            except (OSError, http.client.HTTPException, ValueError) as error:
                problem, away = str(getattr(error, "reason", error)) or type(error).__name__, True
            if away and url not in self._away:
                logger.warning("%s: %s; waiting up to %g s for an answer", url, problem, self.timeout_s)
                self._away[url] = -math.inf
            waited = time.monotonic() - began
            is_over = waited > self.timeout_s and (at is not None or tries >= len(self.urls))
            if is_over or self._ended or (self.gives_up is not None and self.gives_up()):
                raise MachineError(
                    f"no answer from the vLLM server at {at or ', '.join(self.urls)} within {waited:.0f} s "
                    f"({problem}): look at its log; where it is only slow, raise timeout_s or lower requests."
                )
            time.sleep(min(0.1 * 2 ** min(tries, 6), 5.0, max(self.timeout_s - waited, 0.05)))

    def _greet(self, url: str) -> None:
        """Ask an address what it serves, which must be what was served at first."""
        patience = min(30.0, self.timeout_s)
        models = self.once(url, "/v1/models", None, patience)["data"]
        served: dict[str, Any] = next((each for each in models if not each.get("parent")), {})
        name, length = str(served.get("id")), int(served.get("max_model_len") or 0)
        if not self.model:
            self.model, self.max_length, self.root = name, length, str(served.get("root") or name)
            self.version = str(self.once(url, "/version", None, patience).get("version"))
        if (name, length) != (self.model, self.max_length):
            raise ConfigError(
                f"the vLLM server at {url} serves {name!r} with a context of {length} tokens, and the first one to "
                f"answer, at {self.urls[0]}, served {self.model!r} with {self.max_length}: start the same model there"
            )

    def _come_back(self, url: str) -> None:
        """An address that was away may be another server now: it must serve the same, and is given what it had."""
        if url not in self._away:
            return
        with self._lock:
            if url in self._away:
                if time.monotonic() - self._away[url] < _LOOKS_EVERY_S and len(self.urls) > 1:
                    raise ConnectionError("no answer a moment ago")
                try:
                    self._greet(url)
                except Exception:
                    self._away[url] = time.monotonic()
                    raise
                if self.restore is not None:
                    self.restore(url)
                del self._away[url]


def _message(error: urllib.error.HTTPError) -> str:
    """What a server says of its refusal, in at most 300 characters."""
    text = error.read().decode(errors="replace")
    try:
        found = json.loads(text)
        return str(found.get("error", found).get("message", text))[:300]
    except (ValueError, AttributeError):
        return text[:300]
