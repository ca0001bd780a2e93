"""What is compared: our plans, and transformers' continuous batching in one process or two. All serve the same traces.

A side runs alone; the others wait without computing. All latencies count from the moments at which requests were to
arrive, by the same rules: ours as the first stage knew tokens, the peer's as its manager stamps them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pipetune.bench.load.arrivals import unit_trace
from pipetune.bench.load.online import OnlineRequest, OnlineRun
from pipetune.bench.spec import Lane, Plan
from tests.evaluation.load.estimates import Served
from tests.evaluation.peers.rig import DEVICES, Rig

LEAD_S = 0.5
"""Until a peer's process has read what it is to serve."""
TIMEOUT_S = 600.0
_WARM_UP = 32
"""Requests, all at once, before the first ones of a setting are timed."""


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Requests with gaps of their own, at one request a second."""

    prompts: Sequence[Sequence[int]]
    output_lens: Sequence[int]
    unit_s: Sequence[float]
    max_len: int
    """Tokens that a request of any trace of the model has at most, its prompt's among them."""

    @classmethod
    def drawn(cls, prompts: Sequence[Sequence[int]], output_lens: Sequence[int], *, max_len: int, seed: int) -> Trace:
        """With Poisson gaps."""
        unit_s = unit_trace(len(prompts), 1.0, seed)
        return cls(prompts=prompts, output_lens=output_lens, unit_s=unit_s, max_len=max_len)

    def at(self, rate: float | None) -> tuple[OnlineRequest, ...]:
        """The requests at a rate, or all at once."""
        return tuple(
            OnlineRequest(
                number=number, prompt=tuple(prompt), output_len=length, at_s=round(at_s / rate, 6) if rate else 0.0
            )
            for number, (prompt, length, at_s) in enumerate(
                zip(self.prompts, self.output_lens, self.unit_s, strict=True)
            )
        )


class Setting(Protocol):
    """How a side runs."""

    @property
    def name(self) -> str:
        """In words."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class OurSetting:
    """A plan: layers of each stage, and the slots that requests decode in, of each replica."""

    counts: tuple[int, ...]
    rows: int
    slots: int
    chunk: int | None = None
    lanes: tuple[Lane, ...] = ()
    replicas: int = 1

    @property
    def name(self) -> str:
        """As `17+13, 2 slots of 8`, `2 × 30, 1 slot of 8`."""
        copies = f"{self.replicas} × " * (self.replicas > 1)
        text = f"{copies}{'+'.join(map(str, self.counts))}, {self.slots} slot{'s' * (self.slots > 1)} of {self.rows}"
        return ", ".join((text, *([f"chunk {self.chunk}"] if self.chunk else []), *self.plan.lane_words))

    @property
    def devices(self) -> tuple[str, ...]:
        """A single stage has a worker with all cores."""
        return DEVICES[: len(self.counts) * self.replicas]

    @property
    def plan(self) -> Plan:
        """The plan."""
        plan = Plan.from_layer_counts(self.counts, self.devices, self.rows, replicas=self.replicas)
        return plan.model_copy(update={"prefill_chunk_size": self.chunk, "lanes": self.lanes})


@dataclass(frozen=True, kw_only=True, slots=True)
class PeerSetting:
    """How continuous batching runs."""

    attention: str = "sdpa"
    max_requests: int
    max_batch_tokens: int = 256

    @property
    def name(self) -> str:
        """As `sdpa, 16 requests, 256 tokens`."""
        return f"{self.attention}, {self.max_requests} requests, {self.max_batch_tokens} tokens"


class Side(Protocol):
    """One of what is compared."""

    @property
    def name(self) -> str:
        """In words."""
        ...

    def settings(self) -> Sequence[Setting]:
        """What it may be run with."""
        ...

    def serve(self, setting: Setting, trace: Trace, requests: Sequence[OnlineRequest]) -> list[Served]:
        """Serves some requests of a trace, in the order of their numbers."""
        ...


def serve(side: Side, setting: Setting, trace: Trace, rate: float | None, *, used: dict[str, Setting]) -> list[Served]:
    """Serves a trace at a rate; first some requests at once, where the side last ran otherwise.

    Args:
        used: each side's last setting, kept here.
    """
    if used.get(side.name) != setting:
        side.serve(setting, trace, trace.at(None)[:_WARM_UP])
        used[side.name] = setting
    return side.serve(setting, trace, trace.at(rate))


def serve_alone(side: Side, setting: Setting, trace: Trace, count: int, *, used: dict[str, Setting]) -> list[Served]:
    """The first requests, each when the one before is done."""
    requests = trace.at(None)[:count]
    if used.get(side.name) != setting:
        side.serve(setting, trace, requests)
        used[side.name] = setting
    return [served for one in requests for served in side.serve(setting, trace, [one])]


@dataclass(kw_only=True)
class Ours:
    """This runtime."""

    rig: Rig
    grid: Sequence[OurSetting]
    name: str = "ours"
    last_run: OnlineRun | None = field(default=None, init=False)

    def settings(self) -> Sequence[Setting]:
        """Single stages on all cores, two of them with a core each, and two stages."""
        return self.grid

    def serve(self, setting: Setting, trace: Trace, requests: Sequence[OnlineRequest]) -> list[Served]:
        """On a fleet of as many workers as it takes."""
        assert isinstance(setting, OurSetting)
        fleet = self.rig.experiment(f"{len(setting.devices)}-stages", setting.devices).fleet
        self.last_run = fleet.run_trace(setting.plan, requests, in_flight=setting.slots, timeout_s=TIMEOUT_S)
        return [
            Served(at_s=one.arrived_s, times_s=one.token_times_s, tokens=one.token_ids)
            for one in self.last_run.requests
        ]


@dataclass(kw_only=True)
class Continuous:
    """transformers' continuous batching, in one process on all cores, or in more, to which requests are dealt."""

    rig: Rig
    grid: Sequence[PeerSetting]
    size: int
    late_s: float = field(default=0.0, init=False)
    """How late a request was handed over at most."""

    @property
    def name(self) -> str:
        """In words."""
        return "continuous batching" if self.size == 1 else f"continuous batching, {self.size} processes"

    def settings(self) -> Sequence[Setting]:
        """Of each process."""
        return self.grid

    def serve(self, setting: Setting, trace: Trace, requests: Sequence[OnlineRequest]) -> list[Served]:
        """Each process hands over its own requests at their times."""
        assert isinstance(setting, PeerSetting)
        group = self.rig.group("cb", size=self.size, all_cores=self.size == 1)
        answers = group.request(
            "serve",
            {
                "settings": {
                    "attention": setting.attention,
                    "max_requests": setting.max_requests,
                    "max_batch_tokens": setting.max_batch_tokens,
                },
                "requests": [one.model_dump(include={"number", "prompt", "output_len", "at_s"}) for one in requests],
                "begin_s": time.monotonic() + LEAD_S,
                "max_len": trace.max_len,
            },
            timeout_s=TIMEOUT_S,
        )
        self.late_s = max(self.late_s, *(one["late_s"] for one in answers))
        served = {number: one for answer in answers for number, one in answer["served"].items()}
        return [
            Served(
                at_s=one.at_s or 0.0,
                times_s=tuple(served[str(one.number)]["times_s"]),
                tokens=tuple(served[str(one.number)]["tokens"]),
            )
            for one in requests
        ]
