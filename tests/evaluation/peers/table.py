"""The comparison as a Markdown table. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tests.evaluation.peers.compare import (
    BUBBLE_AIM,
    COMPARISONS,
    REPLAN_AIM_S,
    SIDES,
    STEADY_AIM,
    Comparison,
    bound,
    efficiency,
    pair_ratios,
    spread,
    throughput,
    verdict,
)
from tests.evaluation.peers.values import Cell

HEADER = (
    "| model, workload | ours | tok/s | against | tok/s | ratio (min–max) | bound | IQR | one stage | aim | |",
    "|---|---|--:|---|--:|--:|--:|--:|--:|--:|---|",
)


def render(cells: Sequence[Cell], quoted: Sequence[Mapping[str, Any]] = ()) -> str:
    """The ratios of all processors side by side, then all cells of each, with what it was measured on and with.

    Args:
        quoted: columns of processors whose raw measurements were not kept: `processor`, `date`, `command`, and
            `ratios` by model and workload and by `ours/peer`.
    """
    if not cells:
        return "Nothing was measured yet.\n"
    by_processor: dict[str, list[Cell]] = {}
    for cell in cells:
        by_processor.setdefault(_processor(cell), []).append(cell)
    parts = [_side_by_side(by_processor, quoted)] if len(by_processor) + len(quoted) > 1 else []
    return "\n".join((*parts, *map(_of_processor, by_processor.values())))


def _processor(cell: Cell) -> str:
    return f"{cell.machine.hardware.cpu_model}, {cell.machine.hardware.cpu_cores} cores"


def _side_by_side(by_processor: Mapping[str, Sequence[Cell]], quoted: Sequence[Mapping[str, Any]]) -> str:
    """A row for each comparison, a column for each processor."""
    columns: dict[str, dict[tuple[str, str], str]] = {}
    commands = []
    for name, cells in by_processor.items():
        date = max((one.started_at[:10] for cell in cells for one in cell.rounds), default="no rounds yet")
        own = columns.setdefault(f"{name} ({date})", {})
        commands.append(f"- {name}: `make bench-peers`")
        for cell in cells:
            for one in COMPARISONS:
                if ratios := spread(pair_ratios(cell, one.contest, one.ours, one.peer)):
                    most = bound(cell, one, ratios.median)
                    text = f"{ratios.median:.2f}" + ("" if most is None else f" (≤ {most:.2f})")
                    own[f"{short_name(cell.model.name)}, {cell.workload_name}", f"{one.ours}/{one.peer}"] = text
    for other in quoted:
        columns[f"{other['processor']} ({other['date']})"] = {
            (place, sides): f"{value:.2f}" for place, row in other["ratios"].items() for sides, value in row.items()
        }
        commands.append(f"- {other['processor']}: `{other['command']}`, whose raw measurements were not kept")
    lines = ["How many times faster, and in brackets the bound that the kernels' own times allow:", ""]
    lines += [f"| model, workload | ours | against | {' | '.join(columns)} |", "|---|---|---|" + "--:|" * len(columns)]
    for place, sides in dict.fromkeys(key for own in columns.values() for key in own):
        ours, peer = (SIDES[side] for side in sides.split("/"))
        values = (own.get((place, sides), "–") for own in columns.values())
        lines.append(f"| {place} | {ours} | {peer} | {' | '.join(values)} |")
    return "\n".join((*lines, "", *commands, ""))


def _of_processor(cells: Sequence[Cell]) -> str:
    lines = [*_about(cells), "", *HEADER]
    for cell in cells:
        place = f"{short_name(cell.model.name)}, {cell.workload_name}"
        for comparison in COMPARISONS:
            lines += _row(cell, place, comparison)
        lines += _own_rows(cell, place)
    lines += ["", *_settings(cells)]
    return "\n".join(lines) + "\n"


def short_name(model: str) -> str:
    """`examples/dummy-llama-24l` → `dummy-llama-24l`."""
    return model.rstrip("/").rpartition("/")[2]


def _about(cells: Sequence[Cell]) -> list[str]:
    machines = {cell.machine.hardware_id: cell.machine for cell in cells}
    lines = []
    for machine in machines.values():
        packages = machine.software.packages
        versions = ", ".join(f"{name} {packages[name]}" for name in ("torch", "transformers") if name in packages)
        lines.append(f"{machine.hardware.cpu_model}, {machine.hardware.cpu_cores} cores; {versions}.")
    times = sorted(one.started_at for cell in cells for one in cell.rounds)
    if times:
        lines.append(f"Rounds from {times[0][:16]} to {times[-1][:16]} UTC; ratios are medians over rounds.")
    return lines


def _row(cell: Cell, place: str, comparison: Comparison) -> list[str]:
    ratios = spread(pair_ratios(cell, comparison.contest, comparison.ours, comparison.peer))
    ours, peer = SIDES[comparison.ours], SIDES[comparison.peer]
    aim = "–" if comparison.aim is None else f"≥ {comparison.aim:g}"
    if ratios is None:
        missing = next((cell.absent[side] for side in (comparison.ours, comparison.peer) if side in cell.absent), None)
        if missing is None:
            return []
        return [f"| {place} | {ours} | – | {peer} | – | – | – | – | – | {aim} | not run: {_escaped(missing)} |"]
    single = None
    if comparison.single is not None:
        single = spread(pair_ratios(cell, comparison.contest, comparison.single, comparison.peer))
    digits = 3 if comparison.contest == "instrument" else 2
    notes = [verdict(ratios.median, comparison.aim)]
    for side in (comparison.ours, comparison.peer):
        frozen = cell.frozen.get(side)
        if frozen is not None and frozen.tokens_differ:
            notes.append(f"{SIDES[side]}: other tokens for {frozen.tokens_differ} prompts")
    most = bound(cell, comparison, ratios.median)
    allowed = "–" if most is None else f"{most:.2f}"
    beside = "–" if single is None else f"{single.median:.2f}"
    return [
        f"| {place} | {ours} | {_rate(cell, comparison, comparison.ours)} "
        f"| {peer} | {_rate(cell, comparison, comparison.peer)} "
        f"| **{ratios.median:.{digits}f}** ({ratios.low:.{digits}f}–{ratios.high:.{digits}f}, n={ratios.count}) "
        f"| {allowed} | {ratios.iqr:.{digits}f} | {beside} | {aim} | {'; '.join(notes)} |"
    ]


def _own_rows(cell: Cell, place: str) -> list[str]:
    lines = []
    found = efficiency(cell)
    if found is not None:
        for one, what, aim, at_least in (
            (found[0], "steady state: stages busy", STEADY_AIM, True),
            (found[1], "bubble ratio over the whole run", BUBBLE_AIM, False),
        ):
            lines.append(
                f"| {place} | {SIDES['pipeline']} | – | {what} | – "
                f"| **{one.median:.3f}** ({one.low:.3f}–{one.high:.3f}, n={one.count}) | – | {one.iqr:.3f} | – "
                f"| {'≥' if at_least else '≤'} {aim:g} | {verdict(one.median, aim, at_least=at_least)} |"
            )
    moves = spread([one.ready_s for one in cell.replans])
    if moves is not None:
        what = f"two layers moved, check included ({_moved_cuts(cell)})"
        lines.append(
            f"| {place} | {SIDES['pipeline']} | – | {what} | – "
            f"| **{moves.median:.2f} s** ({moves.low:.2f}–{moves.high:.2f}, n={moves.count}) | – | {moves.iqr:.2f} | – "
            f"| ≤ {REPLAN_AIM_S:g} s | {verdict(moves.median, REPLAN_AIM_S, at_least=False)} |"
        )
    return lines


def _moved_cuts(cell: Cell) -> str:
    first = cell.replans[0]
    return f"cut {first.from_cut} ⇄ {first.to_cut}"


def _rate(cell: Cell, comparison: Comparison, side: str) -> str:
    rate = throughput(cell, comparison.contest, side)
    return "–" if rate is None else f"{rate.median:.1f}"


def _settings(cells: Sequence[Cell]) -> list[str]:
    lines = ["Settings, each side's own best, found beforehand:", ""]
    for cell in cells:
        texts = [f"{SIDES[side]}: {frozen.setting.describe()}" for side, frozen in cell.frozen.items()]
        lines.append(f"- {short_name(cell.model.name)}, {cell.workload_name}: {'; '.join(texts) or 'none yet'}.")
        lines += [f"  - {SIDES.get(side, side)} did not run: {_escaped(why)}" for side, why in cell.absent.items()]
    return lines


def _escaped(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")[:200]
