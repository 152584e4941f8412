"""The stand-in as a process of its own, started as vLLM's server is; SIGTERM ends it with what it was asked."""

from __future__ import annotations

import json
import signal
import sys
import time
from typing import Any

from vllm_standin import StandIn

from stepkd.models.policy import Policy
from stepkd.models.spec import PolicyConfig

model, words = sys.argv[1], sys.argv[2:]
server = StandIn(Policy.load(PolicyConfig(path=model)), model, port=int(words[words.index("--port") + 1]))


def end(*_: Any) -> None:
    print(
        json.dumps({"requests": len(server.requests), "keys": sorted({key or "" for key in server.keys})}), flush=True
    )
    server.close()
    sys.exit(0)


signal.signal(signal.SIGTERM, end)
while True:  # not signal.pause: another thread may be given the signal
    time.sleep(0.1)
