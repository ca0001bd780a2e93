"""What the evaluation of load keeps, as JSON: parts, each with rows of a table."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from pipetune.bench.record import Machine
from pipetune.bench.spec import Value


class Row(Value):
    """A number with its aim."""

    name: str
    value: float
    low: float | None = None
    """Ends of its interval of 95 %; None where too little was measured for one."""
    high: float | None = None
    n: int = Field(ge=1)
    """What the interval is over: rounds, steps, repetitions or plans."""
    of: str
    """What `n` counts."""
    aim: float | None = None
    at_least: bool = True
    unit: str = ""
    note: str = ""


class Part(Value):
    """One of the numbered parts, as it was measured last."""

    number: int
    title: str
    machine: Machine
    started_at: str
    took_s: float
    load_before: float
    """The machine's load over a minute."""
    load_after: float
    quick: bool
    settings: str = ""
    """What was run, in words."""
    rows: tuple[Row, ...]
    raw: dict[str, Any] = Field(default_factory=dict)
