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
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from functools import cached_property
from itertools import count
from typing import Any, TypeVar

from stepkd.errors import ConfigError, MachineError, ModelError
from stepkd.runs.process import STOP_REQUEST, group_rank

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
TOKENS = 8192
"""Length of an answer in tokens for which ``timeout_s`` is waited; a longer one is given more in proportion."""
_TOO_MANY = 429
_BUSY = _TOO_MANY, 502, 503, 504
_CONNECTS_S, _GREETS_S = 10.0, 30.0
"""Longest time in which a server that is there takes a connection, and says what it serves."""
_DIES_S = 10.0
"""Seconds for which a server whose engine died still fails at requests."""
_STOPPING_S = 10.0, 5.0
"""Time for which answers are waited for once this process was asked to stop, before servers are asked whether they are
there, and in which they have to say so; SLURM and Kubernetes leave half a minute before they kill."""
_LOOKS_S = 0.2, 30.0
"""Least and greatest time after which an address that is away is looked for again; doubled every time."""
NO_ANSWER = OSError, http.client.HTTPException, ValueError
"""What is raised where there is no answer, half of one, or no JSON value in it."""


class Refused(Exception):
    """A server's answer that it cannot or will not: 400 or more.

    Args:
        status: of the answer.
        path: that was asked for.
        text: what it says.
    """

    def __init__(self, status: int, path: str, text: str) -> None:
        self.status, self.path = status, path.partition("?")[0]
        with suppress(ValueError, AttributeError):
            found = json.loads(text)
            text = str(found.get("error", found).get("message", text))
        super().__init__(f"{status} at {self.path}: {text[:300]}")

    @property
    def is_busy(self) -> bool:
        """Whether it may say yes later."""
        return self.status in _BUSY


class Client:
    """Servers of one model. Once this process is asked to stop, one that is away is not waited for.

    Args:
        urls: addresses, ``http://host:port``; requests go to them in turn.
        requests: most requests under way at the same time, over all addresses.
        timeout_s: seconds that are waited for an answer, and for a server that is away to come back.

    Raises:
        ConfigError: nothing answers at an address, it refuses the key, or two of them serve different models.
        ModelError: something else than vLLM answers there.
    """

    def __init__(self, urls: Sequence[str], requests: int = 64, timeout_s: float = 600.0) -> None:
        self.urls = tuple(url.rstrip("/").removesuffix("/v1") for url in urls)
        self.requests, self.timeout_s = requests, timeout_s
        self.restore: Callable[[str], None] | None = None
        """Called with an address that was away, before anything else is asked of it."""
        self.model, self.root, self.max_length, self.version = "", "", 0, ""
        self._turn, self._lock = count(), threading.Lock()
        self.last = threading.local()
        """Its ``url`` is the address that gave this thread the last answer."""
        self.away: dict[str, tuple[float, float]] = {}
        """Addresses that are to be looked for and restored before anything is asked of them, with the time from which
        that is due, and after which it is due again."""
        self._lines: dict[socket.socket, str] = {}
        """Connections on which an answer is waited for, with their addresses."""
        self._ended = threading.Event()
        for url in self.urls:
            try:
                self._patiently(self._greet, url)
            except MachineError as error:
                if STOP_REQUEST:
                    raise
                raise ConfigError(f"{error} Start one with {START}") from error
            with suppress(Refused, KeyError, TypeError, *NO_ANSWER):  # a gateway may answer anything
                # Not where another rank pauses it, to send weights.
                if group_rank() == 0 and self.once(url, "/is_paused", timeout_s=_GREETS_S)["is_paused"]:
                    logger.warning("%s was left paused, by a run that was killed: resumed it", url)
                    self.once(url, "/resume", {})
        self.away.clear()
        self.name = self.model
        """Under which completions are asked for: the model's, or that of an adapter on it."""

    @cached_property
    def info(self) -> dict[str, Any]:
        """Settings that a server runs with, as it names them; empty where it does not say (``VLLM_SERVER_DEV_MODE`` is
        not set there)."""
        try:
            return dict(self.ask("/server_info?config_format=json", read=lambda answer: dict(answer["vllm_config"])))
        except (ConfigError, ModelError):
            return {}

    def map(
        self,
        function: Callable[[T], Any],
        items: Sequence[T],
        *,
        most: int = 0,
        until: Callable[[], bool] | None = None,
    ) -> Iterator[Any]:
        """``function`` of every item, in order; the first error ends it, and what others ask of servers.

        Args:
            function: asks servers.
            items: what it is called with.
            most: calls at the same time; 0: ``requests``.
            until: asked while answers are waited for; once it says yes, nobody waits for a server any more; nor once
                this process was asked to stop, where one of them hangs.
        """
        try:
            with ThreadPoolExecutor(max_workers=most or self.requests) as pool:
                due = math.inf
                try:
                    for found in [pool.submit(function, item) for item in items]:
                        while not wait([found], 0.2).done:
                            now = time.monotonic()
                            due = min(due, now + _STOPPING_S[0]) if STOP_REQUEST else math.inf
                            is_lost = now >= due and not self._are_there()
                            if is_lost or (until is not None and until()):
                                self._hang_up()
                            due = math.inf if now >= due else due
                        yield found.result()
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    self._hang_up()
                    raise
        finally:
            self._ended.clear()

    def _are_there(self) -> bool:
        """Whether all servers that owe an answer say that they work."""
        try:
            for url in set(self._lines.values()):
                self.once(url, "/health", timeout_s=_STOPPING_S[1])
        except (Refused, *NO_ANSWER):
            return False
        return True

    def _hang_up(self) -> None:
        self._ended.set()
        for line in list(self._lines):
            with suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)

    def ask(self, path: str, body: Any = None, *, read: Callable[[Any], Any], tokens: int = 0) -> Any:
        """Post a JSON value (or get, without one) and read the answer.

        What meets no server, half an answer or a busy server is asked again at the next address, until ``timeout_s`` is
        over.

        Args:
            path: with its leading slash.
            body: what is posted; None: a GET.
            read: takes what is wanted from the answer; where that is not there, it is no vLLM's.
            tokens: most that the answer holds; see :data:`TOKENS`.

        Raises:
            ConfigError: the request is refused.
            ModelError: the server fails at it, or is none of vLLM's.
            MachineError: no answer in time.
        """
        timeout_s = self.timeout_s * max(1.0, tokens / TOKENS)
        return self._patiently(lambda url: _read(url, path, self.once(url, path, body, timeout_s), read))

    def once(self, url: str, path: str, body: Any = None, timeout_s: float | None = None) -> Any:
        """:meth:`ask` one address, one time.

        Raises:
            OSError, HTTPException, ValueError: no answer, half of one, or no JSON value.
            Refused: it says no.
        """
        headers = {"Content-Type": "application/json", "Connection": "close"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        place, waits = urllib.parse.urlsplit(url), timeout_s or self.timeout_s
        kind = http.client.HTTPSConnection if place.scheme == "https" else http.client.HTTPConnection
        connection = kind(place.netloc, timeout=min(_CONNECTS_S, waits))
        connection.connect()
        line = connection.sock
        self._lines[line] = url
        try:
            line.settimeout(waits)
            line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 6)):
                if hasattr(socket, option):  # a machine that is gone without a word is found in a minute and a half
                    line.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
            if self._ended.is_set():
                raise ConnectionAbortedError("nobody waits for it")
            data = None if body is None else json.dumps(body)
            connection.request("GET" if body is None else "POST", place.path + path, data, headers)
            answer = connection.getresponse()
            text = answer.read()
        finally:
            self._lines.pop(line, None)
            connection.close()
        if answer.status >= 400:
            raise Refused(answer.status, path, text.decode(errors="replace"))
        self.last.url = url
        is_json = answer.headers.get_content_type() == "application/json"
        return json.loads(text) if is_json else text.decode()  # weights are answered with a word, or nothing

    def renew(self) -> None:
        """:attr:`restore` every address before anything else is asked of it, all at the same time. One that gives no
        answer is restored when it comes back, as long as there are others.

        Raises:
            ConfigError: one refuses, or serves another model now.
            MachineError: no address answered in time.
        """
        due, were_away = [u for u in self.urls if self.away.get(u, (0.0,))[0] <= time.monotonic()], {*self.away}
        self.leave(self.urls)

        def look(url: str) -> None:
            try:
                self._come_back(url)
            except (Refused, *NO_ANSWER) as error:
                if url not in were_away:
                    logger.warning("%s: %s; nothing is asked of it until it is back", url, error)

        list(self.map(look, due, most=len(self.urls), until=STOP_REQUEST.__bool__))
        self._patiently(lambda _: None)

    def leave(self, urls: Sequence[str]) -> None:
        """Take addresses for away."""
        for url in urls:
            self.away.setdefault(url, (time.monotonic() + _LOOKS_S[0], 2 * _LOOKS_S[0]))

    def _next(self) -> tuple[str | None, bool]:
        """The next address in turn, and whether it is to be looked for, which one request does; None: all are away."""
        with self._lock:
            turn = next(self._turn)
            for url in (self.urls[(turn + i) % len(self.urls)] for i in range(len(self.urls))):
                then, waits = self.away.get(url, (None, 0.0))
                if then is None or time.monotonic() >= then:
                    if then is not None:
                        self.away[url] = math.inf, waits
                    return url, then is not None
        return None, False

    def _patiently(self, attempt: Callable[[str], Any], at: str | None = None) -> Any:
        tried, failures, gone = set(), 0, 0
        problem, since = "no answer a moment ago", math.inf
        while True:
            asked = time.monotonic()
            url, is_away = (at, False) if at is not None else self._next()
            error: Exception | None = None
            if url is not None:
                tried.add(url)
                try:
                    if is_away:
                        self._come_back(url)
                    return attempt(url)
                except Refused as refusal:
                    error, problem = refusal, str(refusal)
                    # A server that was restarted between two requests has not got the adapter.
                    gone += refusal.status == 404 and refusal.path == "/v1/completions"
                    is_gone = refusal.status == 404 and 0 < gone <= len(self.urls)
                    if refusal.status < 500 and not refusal.is_busy and not is_gone:
                        raise ConfigError(f"the vLLM server at {url} refuses a request ({problem})") from error
                    failures += refusal.status >= 500 and not refusal.is_busy
                except NO_ANSWER as nothing:
                    error, problem = nothing, str(nothing) or type(nothing).__name__
            since = min(since, asked if isinstance(error, TimeoutError) else time.monotonic())
            waited = time.monotonic() - since
            place = at or ", ".join(self.urls)
            others = at is None and any(each != url and each not in self.away for each in self.urls)
            if self._ended.is_set() or (STOP_REQUEST and not others):
                raise MachineError(
                    f"the vLLM server at {place} is away ({problem}), and nobody waits for it"
                ) from error
            if failures > len(self.urls) and waited > min(_DIES_S, self.timeout_s):
                raise ModelError(
                    f"the vLLM server at {place} fails ({problem}): its log says why. It is to be started with {START}"
                ) from error
            if waited > self.timeout_s and (at is not None or not {*self.urls} - tried - {*self.away}):
                raise MachineError(
                    f"no answer from the vLLM server at {place} within {waited:.0f} s ({problem}): look at its log; "
                    "where it is only slow, raise an engine's timeout_s or lower its requests."
                ) from error
            if url is not None and not (isinstance(error, Refused) and error.status == _TOO_MANY):
                if url not in self.away:
                    logger.warning("%s: %s; waiting up to %g s for an answer", url, problem, self.timeout_s)
                    self.leave([url])
                if at is None and len(self.away) < len(self.urls):
                    continue
            self._ended.wait(min(0.1 + waited / 4, 1.0, max(self.timeout_s - waited, 0.05)))

    def _greet(self, url: str) -> None:
        """Ask an address what it serves, which must be what was served at first."""

        def asked(path: str, read: Callable[[Any], Any]) -> Any:
            return _read(url, path, self.once(url, path, None, min(_GREETS_S, self.timeout_s)), read)

        served = asked("/v1/models", lambda answer: min(answer["data"], key=lambda each: bool(each.get("parent"))))
        name, length = str(served.get("id")), int(served.get("max_model_len") or 0)
        if not self.model:
            self.version = asked("/version", lambda answer: str(answer["version"]))
            self.model, self.max_length, self.root = name, length, str(served.get("root") or name)
        if (name, length) != (self.model, self.max_length):
            raise ConfigError(
                f"the vLLM server at {url} serves {name!r} with a context of {length} tokens, and the first one to "
                f"answer, at {self.urls[0]}, served {self.model!r} with {self.max_length}: start the same model there"
            )

    def _come_back(self, url: str) -> None:
        """An address that was away may be another server now: it must serve the same, and is given what it had."""
        try:
            self._greet(url)
            if self.restore is not None:
                self.restore(url)
        except BaseException:
            waits = self.away[url][1]
            self.away[url] = time.monotonic() + waits, min(2 * waits, _LOOKS_S[1])
            raise
        self.away.pop(url, None)


def _read(url: str, path: str, answer: Any, read: Callable[[Any], Any]) -> Any:
    """What is wanted of an answer.

    Raises:
        ModelError: it is not there.
    """
    try:
        return read(answer)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        lacks = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ModelError(
            f"the server at {url} does not answer {path.partition('?')[0]} as vLLM does ({lacks}); it says "
            f"{json.dumps(answer)[:200]}: is another server or a proxy there? One of vLLM is started with {START}"
        ) from error
