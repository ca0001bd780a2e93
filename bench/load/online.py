"""Requests given to a pipeline over time, and what came of them: values that cross between driver and workers."""

from pydantic import Field

from pipetune.bench.record import Count, Iteration, RequestTimes, Seconds
from pipetune.bench.spec import Value


class OnlineRequest(Value):
    """One request, as it is given."""

    number: Count
    """No other request of the run has it; draws depend on it."""
    prompt: tuple[int, ...] = Field(min_length=1)
    """Token ids."""
    output_len: int = Field(ge=1)
    """Tokens to generate, at most."""
    at_s: Seconds | None = None
    """When it arrives, seconds from the start; None: when it is given."""
    eos_token_ids: tuple[Count, ...] = ()
    """Tokens that end it."""


class ServedRequest(RequestTimes):
    """What came of one request."""

    number: Count
    token_ids: tuple[Count, ...] = ()
    is_cancelled: bool = False


class OnlineRun(Iteration):
    """What a run over a trace of requests gave; a record keeps what any iteration has of it."""

    token_times_s: tuple[()] = ()
    requests: tuple[ServedRequest, ...]
    """In the order given."""
    transport: str
