"""A profile as people read it: each device's parts at a few kinds of tasks, then links and bytes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from pipetune.bench.profile import DeviceProfile, Profile, TaskTime
from pipetune.tuner.planning.model_fit import ranges_text
from pipetune.tuner.report.document import GAP, Column, Document, Facts, Part, Table, Text, left, rows_of

_SHOWN = 3
"""Kinds of prefill and of decode that a table has room for."""
_MAX_RANGES = 14
_MAX_SPREAD = 0.2


def document_of(profile: Profile, *, kept: bool) -> Document:
    """The document of a profile.

    Args:
        kept: whether it was measured by an earlier command.
    """
    return Document(parts=tuple(_parts(profile, kept=kept)))


def _parts(profile: Profile, *, kept: bool) -> Iterator[Part]:
    model = profile.model
    when = f"kept since {profile.measured_at}" if kept else f"measured in {profile.took_s:.1f} s"
    weights = "packed" if profile.packed_weights else "unpacked"
    yield Text(f"{model.name}, {model.dtype}, {weights} weights, on {profile.machine.hardware.cpu_model}; {when}")
    for device in profile.devices:
        room = profile.device_bytes.get(device.device, 0) / 2**30
        yield GAP
        yield Text(f"{device.device} ({room:.1f} GiB), ms a task:")
        yield _device(device)
        yield from _doubts(device)
    yield GAP
    if profile.links:
        yield _links(profile)
        yield GAP
    lost = {"prefill": profile.contention.prefill, "decode": profile.contention.decode}
    shares = [f"{name} {math.exp(value):.2f} ×" for name, value in lost.items() if value is not None]
    if shares:
        yield Text(f"All devices computing at once, tasks take longer than alone: {', '.join(shares)}")
    yield _bytes(profile)
    yield from (Text(f"note: {note}") for note in profile.notes)


def _device(device: DeviceProfile) -> Table:
    whole = device.overhead
    prefill = _some([time for time in whole if time.past_tokens == 0])
    decode = _some([time for time in whole if time.past_tokens > 0 and time.new_tokens == 1])
    titles = [f"{time.rows} × {time.new_tokens}" for time in prefill]
    titles += [f"{time.rows} @ {time.past_tokens}" for time in decode]
    parts = [(f"layer of {_ranges(group.layers)}", group.times) for group in device.layers]
    parts += [("embedding", device.embedding), ("head", device.head), ("overhead", device.overhead)]
    rows = []
    for name, times in parts:
        by_kind = {_kind(time): time.seconds for time in times}
        rows.append((name, *(_ms(by_kind[_kind(time)]) for time in (*prefill, *decode))))
    return Table(
        columns=(left("part"), *map(Column, titles)),
        rows=rows_of(rows),
        legend="rows × tokens in prefill; rows @ tokens cached in decode" if decode else "rows × tokens",
        gap=1,
    )


def _doubts(device: DeviceProfile) -> Iterator[Text]:
    """Which times are doubtful, of the largest part: its quartiles are those of whole tasks."""
    wild = [time for time in device.layers[0].times if time.spread_s > _MAX_SPREAD * time.seconds > 0]
    if wild:
        yield Text(
            f"{len(wild)} of {len(device.overhead)} kinds of tasks vary by more than {_MAX_SPREAD:.0%} between their "
            "quartiles: was the machine busy?"
        )


def _links(profile: Profile) -> Table:
    rows = [
        (f"{link.source} → {link.target}", f"{1e6 * link.latency_s:.0f}", f"{link.bytes_per_s / 1e9:.3g}")
        for link in profile.links
    ]
    return Table(columns=(left("link"), Column("latency µs"), Column("GB/s")), rows=rows_of(rows))


def _bytes(profile: Profile) -> Facts:
    shape = profile.shape
    groups: dict[tuple[int, int], list[int]] = {}
    for index, layer in enumerate(shape.layers):
        groups.setdefault((layer.weight_bytes, layer.kv_bytes_per_token), []).append(index)
    facts = [
        (f"layer of {_ranges(layers)}", f"{weight_bytes / 2**20:.3g} MiB of weights, {kv_bytes} B of KV a token")
        for (weight_bytes, kv_bytes), layers in groups.items()
    ]
    facts.append(("embedding", f"{shape.embedding_bytes / 2**20:.3g} MiB" + (", the head's as well" * shape.tied)))
    facts += [("head", f"{shape.head_bytes / 2**20:.3g} MiB")] if shape.head_bytes else []
    return Facts((*facts, ("between stages", f"{shape.hidden_size * shape.kept_bytes} B a token")))


def _some(times: Sequence[TaskTime]) -> list[TaskTime]:
    """The smallest, the largest, and what lies between them."""
    ranked = sorted(times, key=lambda time: (time.rows * (time.new_tokens + time.past_tokens), time.rows))
    if len(ranked) <= _SHOWN:
        return ranked
    return [ranked[place * (len(ranked) - 1) // (_SHOWN - 1)] for place in range(_SHOWN)]


def _kind(time: TaskTime) -> tuple[int, int, int]:
    return time.rows, time.new_tokens, time.past_tokens


def _ranges(layers: Sequence[int]) -> str:
    text = ranges_text(layers)
    return text if len(text) <= _MAX_RANGES else f"{text[: _MAX_RANGES - 2].rpartition(',')[0]}, …"


def _ms(seconds: float) -> str:
    value = 1e3 * seconds
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value >= 0.01 else "<0.01" if value > 0 else "0"
