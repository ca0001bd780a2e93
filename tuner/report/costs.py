"""What a profile says of the model's parts, as text: times by device and kind of task, and the links."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipetune.bench.profile import Profile, TaskTime
from pipetune.tuner.planning.model_fit import ranges_text
from pipetune.tuner.report.wording import MISSING, clean, number_text

_SHOWN = 3
"""Kinds of prefill, and of decode."""

_Kind = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class CostTable:
    """Times of the parts on each device, in milliseconds, and of the links."""

    columns: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    links: tuple[tuple[str, str, str], ...]
    """From and to, latency, bandwidth."""
    origin: str
    legend: str


def costs_of(profile: Profile) -> CostTable:
    """The profile's times at the least, the largest and a middle kind of prefill and of decode."""
    times = [time for device in profile.devices for time in device.overhead]
    prefill = _some([time for time in times if time.past_tokens == 0])
    decode = _some([time for time in times if time.past_tokens > 0 and time.new_tokens == 1])
    lines = []
    for device in profile.devices:
        parts = [(f"a layer of {ranges_text(group.layers)}", group.times) for group in device.layers]
        parts += [("embedding", device.embedding), ("head", device.head), ("once a task", device.overhead)]
        for index, (part, own) in enumerate(parts):
            seconds = {_kind(time): time.seconds for time in own}
            cells = [_ms_cell(seconds.get(kind)) for kind in (*prefill, *decode)]
            lines.append((device.device if index == 0 else "", part, *cells))
    return CostTable(
        columns=(
            "device",
            "part",
            *(f"{rows} × {new}" for rows, new, _ in prefill),
            *(f"{rows} @ {past}" for rows, _, past in decode),
        ),
        lines=tuple(lines),
        links=tuple(
            (
                f"{link.source} → {link.target}",
                f"{1e6 * link.latency_s:.0f} µs",
                f"{number_text(link.bytes_per_s / 1e9)} GB/s",
            )
            for link in profile.links
        ),
        origin=f"Measured in {profile.took_s:.0f} s at {clean(profile.measured_at)}"
        + "".join(f"; {clean(note)}" for note in profile.notes),
        legend="milliseconds; rows × tokens in prefill, rows @ tokens cached in decode",
    )


def _some(times: Sequence[TaskTime]) -> list[_Kind]:
    kinds = sorted({_kind(time) for time in times}, key=lambda kind: (kind[0] * (kind[1] + kind[2]), kind))
    if len(kinds) <= _SHOWN:
        return kinds
    return [kinds[place * (len(kinds) - 1) // (_SHOWN - 1)] for place in range(_SHOWN)]


def _kind(time: TaskTime) -> _Kind:
    return time.rows, time.new_tokens, time.past_tokens


def _ms_cell(seconds: float | None) -> str:
    return MISSING if seconds is None else number_text(1e3 * seconds)
