"""How a profile is shown: for each device its parts at a few kinds of tasks, then links and bytes; in 80 columns."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from pipetune.bench.profile import DeviceProfile, Profile, TaskTime
from pipetune.tuner.planning.model_fit import ranges_text

_SHOWN = 3
"""Kinds of prefill and of decode that a table has room for."""
_MAX_RANGES = 14
_MAX_SPREAD = 0.2


def show(profile: Profile, console: Console, *, kept: bool) -> None:
    """Prints a profile.

    Args:
        kept: whether it was measured by an earlier command.
    """
    hardware = profile.machine.hardware
    model = profile.model
    when = f"kept since {profile.measured_at}" if kept else f"measured in {profile.took_s:.1f} s"
    weights = "packed" if profile.packed_weights else "unpacked"
    console.print(
        f"{model.name}, {model.dtype}, {weights} weights, on {hardware.cpu_model}; {when}", markup=False, soft_wrap=True
    )
    for device in profile.devices:
        console.print()
        room = profile.device_bytes.get(device.device, 0) / 2**30
        console.print(f"{device.device} ({room:.1f} GiB), ms a task:", markup=False)
        console.print(_device(device))
        _say_spread(device, console)
    console.print()
    if profile.links:
        console.print(_links(profile))
        console.print()
    lost = {"prefill": profile.contention.prefill, "decode": profile.contention.decode}
    if any(value is not None for value in lost.values()):
        shares = [f"{name} {math.exp(value):.2f} ×" for name, value in lost.items() if value is not None]
        console.print(f"All devices computing at once, tasks take longer than alone: {', '.join(shares)}", markup=False)
    console.print(_bytes(profile))
    for note in profile.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)


def _device(device: DeviceProfile) -> Table:
    whole = device.overhead
    prefill = _some([time for time in whole if time.past_tokens == 0])
    decode = _some([time for time in whole if time.past_tokens > 0 and time.new_tokens == 1])
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("part", no_wrap=True)
    for time in prefill:
        table.add_column(f"{time.rows} × {time.new_tokens}", justify="right", no_wrap=True)
    for time in decode:
        table.add_column(f"{time.rows} @ {time.past_tokens}", justify="right", no_wrap=True)
    parts = [(f"layer of {_ranges(group.layers)}", group.times) for group in device.layers]
    parts += [("embedding", device.embedding), ("head", device.head), ("overhead", device.overhead)]
    for name, times in parts:
        by_kind = {_kind(time): time.seconds for time in times}
        table.add_row(name, *(_ms(by_kind[_kind(time)]) for time in (*prefill, *decode)))
    table.caption = "rows × tokens in prefill; rows @ tokens cached in decode" if decode else "rows × tokens"
    table.caption_justify = "left"
    return table


def _say_spread(device: DeviceProfile, console: Console) -> None:
    """Says which times are doubtful, of the largest part: its quartiles are those of whole tasks."""
    wild = [time for time in device.layers[0].times if time.spread_s > _MAX_SPREAD * time.seconds > 0]
    if wild:
        console.print(
            f"{len(wild)} of {len(device.overhead)} kinds of tasks vary by more than {_MAX_SPREAD:.0%} between their "
            "quartiles: was the machine busy?",
            markup=False,
        )


def _links(profile: Profile) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("link", no_wrap=True)
    for name in ("latency µs", "GB/s"):
        table.add_column(name, justify="right", no_wrap=True)
    for link in profile.links:
        bandwidth = f"{link.bytes_per_s / 1e9:.3g}"
        table.add_row(f"{link.source} → {link.target}", f"{1e6 * link.latency_s:.0f}", bandwidth)
    return table


def _bytes(profile: Profile) -> Table:
    shape = profile.shape
    groups: dict[tuple[int, int], list[int]] = {}
    for index, layer in enumerate(shape.layers):
        groups.setdefault((layer.weight_bytes, layer.kv_bytes_per_token), []).append(index)
    grid = Table.grid(padding=(0, 2))
    for (weight_bytes, kv_bytes), layers in groups.items():
        grid.add_row(
            f"layer of {_ranges(layers)}",
            f"{weight_bytes / 2**20:.3g} MiB of weights, {kv_bytes} B of KV a token",
        )
    grid.add_row("embedding", f"{shape.embedding_bytes / 2**20:.3g} MiB" + (", the head's as well" * shape.tied))
    if shape.head_bytes:
        grid.add_row("head", f"{shape.head_bytes / 2**20:.3g} MiB")
    grid.add_row("between stages", f"{shape.hidden_size * shape.kept_bytes} B a token")
    return grid


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
