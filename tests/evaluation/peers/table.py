"""The comparison as a Markdown table. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from tests.evaluation.peers.compare import (
    BUBBLE_AIM,
    COMPARISONS,
    REPLAN_AIM_S,
    SIDES,
    STEADY_AIM,
    Comparison,
    efficiency,
    pair_ratios,
    spread,
    throughput,
    verdict,
)
from tests.evaluation.peers.values import Cell

HEADER = (
    "| model, workload | ours | tok/s | against | tok/s | ratio (min–max) | IQR | one stage | aim | |",
    "|---|---|--:|---|--:|--:|--:|--:|--:|---|",
)


def render(cells: Sequence[Cell]) -> str:
    """All cells in one table, with what it was measured on and with."""
    if not cells:
        return "Nothing was measured yet.\n"
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
        return [f"| {place} | {ours} | – | {peer} | – | – | – | – | {aim} | not run: {_escaped(missing)} |"]
    single = None
    if comparison.single is not None:
        single = spread(pair_ratios(cell, comparison.contest, comparison.single, comparison.peer))
    digits = 3 if comparison.contest == "instrument" else 2
    notes = [verdict(ratios.median, comparison.aim)]
    for side in (comparison.ours, comparison.peer):
        frozen = cell.frozen.get(side)
        if frozen is not None and frozen.tokens_differ:
            notes.append(f"{SIDES[side]}: other tokens for {frozen.tokens_differ} prompts")
    beside = "–" if single is None else f"{single.median:.2f}"
    return [
        f"| {place} | {ours} | {_rate(cell, comparison, comparison.ours)} "
        f"| {peer} | {_rate(cell, comparison, comparison.peer)} "
        f"| **{ratios.median:.{digits}f}** ({ratios.low:.{digits}f}–{ratios.high:.{digits}f}, n={ratios.count}) "
        f"| {ratios.iqr:.{digits}f} | {beside} | {aim} | {'; '.join(notes)} |"
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
                f"| **{one.median:.3f}** ({one.low:.3f}–{one.high:.3f}, n={one.count}) | {one.iqr:.3f} | – "
                f"| {'≥' if at_least else '≤'} {aim:g} | {verdict(one.median, aim, at_least=at_least)} |"
            )
    moves = spread([one.ready_s for one in cell.replans])
    if moves is not None:
        what = f"two layers moved, check included ({_moved_cuts(cell)})"
        lines.append(
            f"| {place} | {SIDES['pipeline']} | – | {what} | – "
            f"| **{moves.median:.2f} s** ({moves.low:.2f}–{moves.high:.2f}, n={moves.count}) | {moves.iqr:.2f} | – "
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
