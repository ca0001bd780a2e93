"""Recorded traffic: Mooncake's JSONL, the CSV of Azure's and BurstGPT's traces, and prompts with a `timestamp`.

| form | time | lengths |
|---|---|---|
| Mooncake | `timestamp`, ms | `input_length`, `output_length` |
| Azure | `TIMESTAMP`, a date | `ContextTokens`, `GeneratedTokens` |
| BurstGPT | `Timestamp`, s | `Request tokens`, `Response tokens` |

BurstGPT writes a response of 0 tokens for a request that failed: it is left out.
"""

import csv
import datetime as dt
import io
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from pipetune.bench.errors import ConfigError
from pipetune.bench.prompts.file import read_text
from pipetune.bench.prompts.forms import Prompt, requests_of

_CSV: dict[tuple[str, str, str], Callable[[str], float]] = {
    ("TIMESTAMP", "ContextTokens", "GeneratedTokens"): lambda text: _date_s(text),
    ("Timestamp", "Request tokens", "Response tokens"): float,
}
_FORMS = (
    'JSONL of {"timestamp": 0, "input_length": 64, "output_length": 16} or of {"timestamp": 0, "prompt": "text"}, or '
    "a CSV with the columns of Azure's or BurstGPT's traces"
)


class Arrival(NamedTuple):
    """One request of a trace."""

    place: str
    at_s: float
    """Seconds from the first one."""
    input_len: int | None
    """Tokens; None where the prompt is given."""
    output_len: int | None
    prompt: Prompt | None


class Trace(NamedTuple):
    """Requests in the order in which they came."""

    arrivals: tuple[Arrival, ...]
    failed: int
    """Requests that had failed when the trace was recorded, which are left out."""


def read_trace(path: str | Path, *, time_scale: float = 1.0, limit: int | None = None) -> Trace:
    """The first `limit` requests of a trace file, or all, with times multiplied by `time_scale`: 0.5 doubles the rate.

    ConfigError where the file cannot be read, is of no known form, has no request, times that run backwards, or lengths
    that are none.
    """
    if not 0.0 < time_scale < math.inf:
        raise ConfigError(f"time_scale={time_scale}: must be a number above 0")
    text = read_text(path)
    arrivals: list[Arrival] = []
    failed, first = 0, 0.0
    for place, at_s, lens, prompt in _rows(text, str(path)):
        if lens[1] == 0:
            failed += 1
            continue
        if limit is not None and len(arrivals) == limit:
            break
        first = first if arrivals else at_s
        at_s = (at_s - first) * time_scale
        if arrivals and at_s < arrivals[-1].at_s:
            back = (arrivals[-1].at_s - at_s) / time_scale
            raise ConfigError(f"{place}: its time lies {back:g} s before that of the one above; sort the file by time")
        arrivals.append(Arrival(place, at_s, *lens, prompt))
    if not arrivals:
        raise ConfigError(f"{path}: holds no request; write {_FORMS}")
    return Trace(tuple(arrivals), failed)


_Row = tuple[str, float, tuple[int | None, int | None], Prompt | None]


def _rows(text: str, path: str) -> Iterator[_Row]:
    header = next(csv.reader(io.StringIO(text)), [])
    for columns, parse in _CSV.items():
        if set(columns) <= set(header):
            for row in (reader := csv.DictReader(io.StringIO(text))):
                place = f"{path}:{reader.line_num}"
                at, inputs, outputs = (row[column] or "" for column in columns)
                yield place, _time(parse, columns[0], at, place), (
                    _length(columns[1], inputs, place, least=1), _length(columns[2], outputs, place, least=0)
                ), None  # fmt: skip
            return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _json_row(line, f"{path}:{number}")


def _json_row(line: str, place: str) -> _Row:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{place}: neither JSON nor a known CSV ({error}); write {_FORMS}") from None
    if not isinstance(value, dict) or "timestamp" not in value:
        raise ConfigError(f"{place}: has no timestamp; write {_FORMS}")
    at_s = _time(lambda text: float(text) / 1e3, "timestamp", value.pop("timestamp"), place)
    if "input_length" in value:
        lens = (
            _length("input_length", value["input_length"], place, least=1),
            _length("output_length", value.get("output_length"), place, least=1),
        )
        return place, at_s, lens, None
    # Messages of one conversation are one request.
    found = requests_of(value, place)
    if len(found) != 1:
        raise ConfigError(f"{place}: {len(found)} prompts; a request has one")
    return place, at_s, (None, found[0].output_len), found[0].prompt


def _time(parse: Callable[[str], float], name: str, given: object, place: str) -> float:
    try:
        found = math.nan if isinstance(given, bool) else parse(str(given))
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise ConfigError(f"{place}: {name}={given!r} is no time")
    return found


def _length(name: str, given: object, place: str, *, least: int) -> int:
    text = str(given)
    if isinstance(given, bool) or not text.isdecimal() or int(text) < least:
        raise ConfigError(f"{place}: {name}={given!r}: must be a whole number of tokens, at least {least}")
    return int(text)


def _date_s(text: str) -> float:
    # Azure writes seven digits of a second; Python reads six.
    whole, _, fraction = text.partition(".")
    at = dt.datetime.fromisoformat(whole).replace(tzinfo=dt.UTC)
    return at.timestamp() + float(f"0.{fraction or 0}")
