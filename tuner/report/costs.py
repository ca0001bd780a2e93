"""What a profile says of the model's parts, as text: times by device and kind of task, and the links."""

from __future__ import annotations

from collections.abc import Sequence

from pipetune.bench.profile import Profile, TaskTime
from pipetune.tuner.planning.model_fit import ranges_text
from pipetune.tuner.report.document import Column, Facts, Section, Table, Text, left, rows_of
from pipetune.tuner.report.wording import MISSING, clean, number_text

_SHOWN = 3
"""Kinds of prefill, and of decode."""

_Kind = tuple[int, int, int]


def costs_of(profile: Profile) -> Section:
    """The profile's times in ms at the least, the largest and a middle kind of prefill and of decode; its links."""
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
    titles = [f"{rows} × {new}" for rows, new, _ in prefill] + [f"{rows} @ {past}" for rows, _, past in decode]
    notes = "".join(f"; {clean(note)}" for note in profile.notes)
    origin = f"Measured in {profile.took_s:.0f} s at {clean(profile.measured_at)}{notes}."
    links = tuple(
        (
            f"{link.source} → {link.target}",
            f"{1e6 * link.latency_s:.0f} µs, {number_text(link.bytes_per_s / 1e9)} GB/s",
        )
        for link in profile.links
    )
    return Section(
        "What the model's parts take",
        (
            Text(f"{origin} The search predicts from these times, and corrects them by what it measures."),
            Table(
                columns=(left("device"), left("part"), *map(Column, titles)),
                rows=rows_of(lines),
                legend="milliseconds; rows × tokens in prefill, rows @ tokens cached in decode",
            ),
            *([Facts(links)] if links else []),
        ),
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
