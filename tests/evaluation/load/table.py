"""The parts as Markdown. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from tests.evaluation.load.values import Part, Row
from tests.evaluation.peers.compare import verdict

HEADER = ("| | what | value | 95 % | n | aim | |", "|--:|---|--:|--:|--:|--:|---|")


def render(parts: Sequence[Part]) -> str:
    """A table for each processor, then what was run for it."""
    if not parts:
        return "Nothing was measured yet.\n"
    blocks = []
    for name in dict.fromkeys(map(_processor, parts)):
        own = sorted((part for part in parts if _processor(part) == name), key=lambda part: part.number)
        lines = [f"{name}.", "", *HEADER, *(_line(part, row) for part in own for row in part.rows), ""]
        lines += [f"{part.number}. {_about(part)}" for part in own]
        blocks.append("\n".join(lines) + "\n")
    return "\n".join(blocks)


def _processor(part: Part) -> str:
    machine = part.machine
    packages = machine.software.packages
    versions = ", ".join(f"{name} {packages[name]}" for name in ("torch", "transformers") if name in packages)
    return f"{machine.hardware.cpu_model}, {machine.hardware.cpu_cores} cores; {versions}"


def _line(part: Part, row: Row) -> str:
    ends = "–" if row.low is None or row.high is None else f"{_number(row.low)}–{_number(row.high)}"
    aim = "" if row.aim is None else f"{'≥' if row.at_least else '≤'} {_number(row.aim)}"
    what = f"{row.name} ({row.note})" if row.note else row.name
    value = f"{_number(row.value)}{f' {row.unit}' if row.unit else ''}"
    judged = verdict(row.value, row.aim, at_least=row.at_least)
    return f"| {part.number} | {what} | {value} | {ends} | {row.n} {row.of} | {aim} | {judged} |"


def _number(value: float) -> str:
    if abs(value) < 1e-4:
        return "0"
    return f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}"


def _about(part: Part) -> str:
    quick = "; a quick run, which says little" if part.quick else ""
    load = f"load {part.load_before:.1f} before, {part.load_after:.1f} after"
    settings = f" {part.settings}" if part.settings else ""
    return f"{part.title}: {part.started_at[:16]}, {part.took_s / 60:.0f} min, {load}{quick}.{settings}"
