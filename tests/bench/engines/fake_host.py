"""Speaks the protocol of a host, without an engine; `FAKE_HOST` says in JSON what it is and what goes wrong."""

from __future__ import annotations

import json
import math
import os
import select
import signal
import sys
import time
from pathlib import Path
from typing import Any

VOCAB = 8
RISE = 5.0
"""Logit of the right token; all others are 0."""
BASELINE_BYTES, KV_BYTES = 300 * 2**20, 64 * 2**20
STEP_S = 0.02

OPTIONS: dict[str, Any] = json.loads(os.environ.get("FAKE_HOST", "{}"))


def right(prompt: list[int], place: int) -> int:
    """The token that the model says after so many others."""
    return (prompt[0] + place) % VOCAB


class FakeHost:
    """Says what workers would."""

    def __init__(self) -> None:
        self.layers: list[int] = []
        self.width, self.budget, self.in_place = 1, 0, False

    def start(self, layers: list[int], **settings: Any) -> dict[str, Any]:
        self.layers = layers
        self.width = settings["tp_size"] if "tp_size" in settings else settings["tensor_parallel_size"]
        self.budget = settings.get("max_num_batched_tokens", 8192)
        return {
            "workers": self.workers(),
            "max_num_batched_tokens": self.budget,
            "max_num_seqs": settings.get("max_num_seqs", 256),
            "settings": settings,
        }

    def workers(self) -> list[dict[str, int]]:
        rows, first = [], 0
        held = self.layers if not OPTIONS.get("ignores_layers") else self.layers[::-1]
        for stage, count in enumerate(held):
            for shard in range(self.width):
                sizes = {"kv_bytes": KV_BYTES, "baseline_bytes": BASELINE_BYTES}
                rows.append({"stage": stage, "shard": shard, "first_layer": first, "end_layer": first + count, **sizes})
            first += count
        return rows

    def repartition(self, layers: list[int]) -> dict[str, Any]:
        self.layers, self.in_place = layers, True
        return {"workers": self.workers()}

    def limits(self, max_num_batched_tokens: int, max_num_seqs: int) -> dict[str, Any]:
        self.budget = max_num_batched_tokens
        return {}

    def run(
        self,
        prompts: list[list[int]],
        output_lens: list[int],
        sampling: dict[str, Any],
        start_at: float,
        at_s: list[float],
    ) -> dict[str, Any]:
        off = OPTIONS.get("wrong_tokens", 0)
        step_s = STEP_S * (2 if self.layers[0] > OPTIONS.get("fast_layers", self.layers[0]) else 1)
        requests = [
            {
                "scheduled_s": came_s + 0.001,
                "token_ids": [right(prompt, place) + off for place in range(length)],
                "token_times_s": [came_s + step_s * (place + 1) for place in range(length)],
            }
            for prompt, length, came_s in zip(prompts, output_lens, at_s, strict=True)
        ]
        steps = max(output_lens, default=0)
        workers = []
        for stage in range(len(self.layers)):
            spans: list[list[Any]] = []
            for step in range(steps):
                begin = start_at + step_s * step + 0.001 * stage
                if stage:
                    spans.append(["receive", begin - 0.001, begin, 0, 0])
                spans.append(["compute", begin, begin + 0.01, len(prompts), min(self.budget, 64)])
                spans.append(["sample", begin + 0.01, begin + 0.012, 0, 0])
            peak = OPTIONS.get("peak_bytes", BASELINE_BYTES + 2**29)
            workers += [{"spans": spans, "peak_bytes": peak + shard} for shard in range(self.width)]
        return {
            "duration_s": max(at_s) + step_s * steps,
            "requests": requests,
            "workers": workers,
            "peak_was_reset": True,
        }

    def logprobs(self, prompts: list[list[int]], continuations: list[list[int]]) -> dict[str, Any]:
        off = OPTIONS.get("wrong_logprobs", 0.0)
        if OPTIONS.get("wrong_in_place") and self.in_place:
            off = 1.0
        best = RISE - math.log(math.exp(RISE) + VOCAB - 1)
        return {"rows": [[[best - off, token] for token in tokens] for tokens in continuations]}


def misbehave(command: dict[str, Any]) -> dict[str, Any] | None:
    """Does what `OPTIONS` tell at this command: an answer in place of the right one, or none at all."""
    what, _, rest = OPTIONS.get(command["do"], "").partition(":")
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "exit":
        print(rest or "RuntimeError: the end", file=sys.stderr, flush=True)
        os._exit(3)
    if what == "hang":
        wait()
    if what == "slow":
        for _ in range(60):
            say({"beat": 0, "died": None})
            time.sleep(0.05)
    if what == "garbage":
        print("Traceback (most recent call last):", flush=True)
        wait()
    if what == "stranger":
        return {"id": 99, "answer": {}}
    if what == "died":
        say({"beat": 0, "died": {"rank": 1, "exit_code": int(rest)}})
        wait()
    if what == "error":
        error, _, log = rest.partition("|")
        print(log, file=sys.stderr, flush=True)
        return {"id": command["id"], "error": error, "died": None}
    return None


def wait() -> None:
    """Until the driver lets go."""
    select.select([int(sys.argv[1])], [], [], 60)
    os._exit(0)


def say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


def main() -> None:
    host = FakeHost()
    say({"hello": os.getpid(), "python": "3", "versions": OPTIONS.get("versions", {"vllm": "0.32.0", "torch": "2"})})
    for line in sys.stdin:
        command = json.loads(line)
        with Path(OPTIONS["told"]).open("a") as told:
            print(line, end="", file=told)
        if (answer := misbehave(command)) is None:
            answer = {"id": command["id"], "answer": getattr(host, command["do"])(**command["args"])}
        say(answer)


if __name__ == "__main__":
    main()
