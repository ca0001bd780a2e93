"""Requests given to a pipeline over time, and what came of them: values that cross between driver and workers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipetune.bench.record import Count, Seconds, StageTrace
from pipetune.bench.spec import Value


class OnlineRequest(Value):
    """One request, as it is given."""

    number: Count
    """No other of a run has it; draws depend on it."""
    prompt: tuple[int, ...] = Field(min_length=1)
    """Token ids."""
    output_len: int = Field(ge=1)
    """Tokens to generate, at most."""
    at_s: Seconds | None = None
    """When it arrives, seconds from the start; None: when it is given."""
    eos_token_ids: tuple[Count, ...] = ()
    """Tokens that end it."""


class ServedRequest(Value):
    """What came of one request. Times are seconds from the start, on the first stage's clock."""

    number: Count
    arrived_s: Seconds
    """As it was scheduled; latencies count from here."""
    noticed_s: Seconds
    """When the first stage took it in."""
    began_s: Seconds | None = None
    """When its prefill was ordered; None if it never was."""
    token_times_s: tuple[Seconds, ...] = ()
    """When the first stage knew each token."""
    token_ids: tuple[Count, ...] = ()
    is_cancelled: bool = False


class OnlineTask(Value):
    """One task, the same on every stage."""

    kind: Literal["prefill", "decode"]
    slot: Count
    """Where its rows decode, or will."""
    rows: Count
    tokens: Count
    """Positions of each row that it worked on."""
    past: Count
    """Positions before them, padding among them."""


class OnlineRun(Value):
    """What a run over a trace of requests gave."""

    requests: tuple[ServedRequest, ...]
    """In the order given."""
    duration_s: Seconds
    """From the start to the last token."""
    tasks: tuple[OnlineTask, ...]
    stages: tuple[StageTrace, ...]
    """Stage by stage; arrays run along `tasks`, and are empty without instrumentation."""
    idle_s: tuple[tuple[Seconds, Seconds], ...]
    """From when until when no request was in the system."""
    transport: str
