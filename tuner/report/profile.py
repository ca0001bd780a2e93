"""A profile as people read it: each device's parts at a few kinds of tasks, then links and bytes."""

import math
from collections.abc import Iterable, Iterator, Sequence

from pipetune.bench.profile import DeviceProfile, Profile, TaskKind, TaskTime
from pipetune.tuner.planning.model_fit import ranges_text
from pipetune.tuner.report import document as doc
from pipetune.tuner.report.wording import MISSING, clean, number_text, short_list, small_text

_SHOWN = 3
"""Kinds of prefill and of decode that a table has room for."""
_MAX_RANGES = 14
_MAX_SPREAD = 0.2


def document_of(profile: Profile, *, kept: bool) -> doc.Document:
    """What `pipetune profile` prints of a profile, measured now or kept by an earlier command."""
    return doc.Document(parts=tuple(_parts(profile, kept=kept)))


def _parts(profile: Profile, *, kept: bool) -> Iterator[doc.Part]:
    model = profile.model
    when = f"kept since {profile.measured_at}" if kept else f"measured in {profile.took_s:.1f} s"
    weights = "packed" if profile.packed_weights else "unpacked"
    yield doc.Text(f"{model.name}, {model.dtype}, {weights} weights, on {profile.machine.hardware.cpu_model}; {when}")
    for device in profile.devices:
        room = profile.device_bytes.get(device.device, 0) / 2**30
        yield doc.GAP
        yield doc.Text(f"{device.device} ({room:.1f} GiB), ms a task:")
        yield _device(device)
        yield from _doubts(device)
    yield doc.GAP
    if links := _links(profile):
        rows = [(name, f"{latency_us:.0f}", f"{gb_per_s:.3g}") for name, latency_us, gb_per_s in links]
        columns = (doc.left("link"), doc.Column("latency µs"), doc.Column("GB/s"))
        yield doc.Table(columns=columns, rows=doc.rows_of(rows))
        yield doc.GAP
    lost = {"prefill": profile.contention.prefill, "decode": profile.contention.decode}
    if shares := [f"{name} {math.exp(value):.2f} ×" for name, value in lost.items() if value is not None]:
        yield doc.Text(f"All devices computing at once, tasks take longer than alone: {', '.join(shares)}")
    yield _bytes(profile)
    yield from (doc.Text(f"note: {note}") for note in profile.notes)


def costs_of(profile: Profile) -> doc.Section:
    """A page's section: times in ms at the least, the largest and a middle kind of prefill and of decode; links."""
    prefill, decode = _kinds(time for device in profile.devices for time in device.overhead)
    lines = []
    for device in profile.devices:
        parts = [(f"a layer of {ranges_text(group.layers)}", group.times) for group in device.layers]
        parts += [("embedding", device.embedding), ("head", device.head), ("once a task", device.overhead)]
        for index, (part, own) in enumerate(parts):
            milliseconds = {_kind(time): number_text(1e3 * time.seconds) for time in own}
            cells = (milliseconds.get(kind, MISSING) for kind in (*prefill, *decode))
            lines.append((device.device if index == 0 else "", part, *cells))
    notes = "".join(f"; {clean(note)}" for note in profile.notes)
    origin = f"Measured in {profile.took_s:.0f} s at {clean(profile.measured_at)}{notes}."
    links = tuple((name, f"{us:.0f} µs, {number_text(gb_per_s)} GB/s") for name, us, gb_per_s in _links(profile))
    return doc.Section(
        "What the model's parts take",
        (
            doc.Text(f"{origin} The search predicts from these times, and corrects them by what it measures."),
            doc.Table(
                columns=(doc.left("device"), doc.left("part"), *_titles(prefill, decode)),
                rows=doc.rows_of(lines),
                legend="milliseconds; rows × tokens in prefill, rows @ tokens cached in decode",
            ),
            *([doc.Facts(links)] if links else []),
        ),
    )


def _device(device: DeviceProfile) -> doc.Table:
    prefill, decode = _kinds(device.overhead)
    parts = [(f"layer of {short_list(ranges_text(group.layers), _MAX_RANGES)}", group.times) for group in device.layers]
    parts += [("embedding", device.embedding), ("head", device.head), ("overhead", device.overhead)]
    rows = []
    for name, times in parts:
        by_kind = {_kind(time): small_text(1e3 * time.seconds) for time in times}
        rows.append((name, *(by_kind[kind] for kind in (*prefill, *decode))))
    return doc.Table(
        columns=(doc.left("part"), *_titles(prefill, decode)),
        rows=doc.rows_of(rows),
        legend="rows × tokens in prefill; rows @ tokens cached in decode" if decode else "rows × tokens",
        gap=1,
    )


def _doubts(device: DeviceProfile) -> Iterator[doc.Text]:
    """Which times are doubtful, of the largest part: its quartiles are those of whole tasks."""
    if wild := [time for time in device.layers[0].times if time.spread_s > _MAX_SPREAD * time.seconds > 0]:
        yield doc.Text(
            f"{len(wild)} of {len(device.overhead)} kinds of tasks vary by more than {_MAX_SPREAD:.0%} between their "
            "quartiles: was the machine busy?"
        )


def _links(profile: Profile) -> list[tuple[str, float, float]]:
    """Names of the links, with µs and GB/s."""
    return [(f"{link.source} → {link.target}", 1e6 * link.latency_s, link.bytes_per_s / 1e9) for link in profile.links]


def _bytes(profile: Profile) -> doc.Facts:
    shape = profile.shape
    groups: dict[tuple[int, int], list[int]] = {}
    for index, layer in enumerate(shape.layers):
        groups.setdefault((layer.weight_bytes, layer.kv_bytes_per_token), []).append(index)
    facts = []
    for (weight_bytes, kv_bytes), layers in groups.items():
        text = f"{weight_bytes / 2**20:.3g} MiB of weights, {kv_bytes} B of KV a token"
        facts.append((f"layer of {short_list(ranges_text(layers), _MAX_RANGES)}", text))
    facts.append(("embedding", f"{shape.embedding_bytes / 2**20:.3g} MiB" + (", the head's as well" * shape.tied)))
    facts += [("head", f"{shape.head_bytes / 2**20:.3g} MiB")] if shape.head_bytes else []
    return doc.Facts((*facts, ("between stages", f"{shape.hidden_size * shape.kept_bytes} B a token")))


def _kinds(times: Iterable[TaskTime]) -> tuple[list[TaskKind], list[TaskKind]]:
    """A few kinds of prefill and of decode: the smallest, the largest, and what lies between them."""
    kinds = sorted(set(map(_kind, times)), key=lambda kind: (kind.rows * (kind.new_tokens + kind.past_tokens), kind))
    return _some([kind for kind in kinds if not kind.past_tokens]), _some([kind for kind in kinds if kind.is_decode])


def _some(kinds: Sequence[TaskKind]) -> list[TaskKind]:
    shown = min(_SHOWN, len(kinds))
    return [kinds[place * (len(kinds) - 1) // max(shown - 1, 1)] for place in range(shown)]


def _kind(time: TaskTime) -> TaskKind:
    return TaskKind(time.rows, time.new_tokens, time.past_tokens)


def _titles(prefill: Iterable[TaskKind], decode: Iterable[TaskKind]) -> Iterator[doc.Column]:
    yield from (doc.Column(f"{kind.rows} × {kind.new_tokens}") for kind in prefill)
    yield from (doc.Column(f"{kind.rows} @ {kind.past_tokens}") for kind in decode)
