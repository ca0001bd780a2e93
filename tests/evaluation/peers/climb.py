"""The search for a side's own best setting in few runs: one knob after the other, further while it helps. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tests.evaluation.peers.values import Setting, Tried

Step = Callable[[Setting], Setting | None]
"""From the best setting so far to the next one to try; None where the knob is at its end."""
MIN_GAIN = 0.01
"""A setting must be faster by this share to take the lead: passes of the same work differ by as much."""


def climb(
    start: Setting, knobs: Sequence[Step], run: Callable[[Setting], Tried], *, max_runs: int
) -> tuple[Tried, ...]:
    """Tries settings until no knob helps or the runs are used up.

    Args:
        start: tried first.
        knobs: each is turned from the best setting so far, again while that helps.
        run: measures a setting.
        max_runs: at most, the start included.

    Returns:
        All that was tried, in order; `best_of` names the winner.
    """
    log: list[Tried] = []

    def measured(setting: Setting) -> Tried | None:
        known = next((one for one in log if one.setting == setting), None)
        if known is None and len(log) < max_runs:
            known = run(setting)
            log.append(known)
        return known

    best = measured(start)
    for knob in knobs:
        while best is not None:
            setting = knob(best.setting)
            candidate = None if setting is None or setting == best.setting else measured(setting)
            if candidate is None or not _is_faster(candidate, best):
                break
            best = candidate
    return tuple(log)


def best_of(tried: Sequence[Tried]) -> Tried | None:
    """The fastest that ran; None if none did."""
    ran = [one for one in tried if one.duration_s is not None]
    return min(ran, key=lambda one: one.duration_s or 0.0) if ran else None


def _is_faster(one: Tried, other: Tried) -> bool:
    if one.duration_s is None:
        return False
    return other.duration_s is None or one.duration_s < other.duration_s * (1.0 - MIN_GAIN)


def scaled(field: str, factor: float, *, low: int = 1, high: int) -> Step:
    """A knob that multiplies one field; rows never fall below what is prefilled together."""

    def step(setting: Setting) -> Setting | None:
        value = getattr(setting, field)
        if value is None:
            return None
        value = round(value * factor)
        if not low <= value <= high:
            return None
        changes = {field: value}
        if field == "rows" and setting.prefill_rows is not None:
            changes["prefill_rows"] = min(setting.prefill_rows, value)
        if field == "prefill_rows" and value > setting.rows:
            return None
        return setting.model_copy(update=changes)

    return step


def moved(by: int, *, num_layers: int) -> Step:
    """A knob that moves the cut."""

    def step(setting: Setting) -> Setting | None:
        if setting.cut is None or not 1 <= setting.cut + by < num_layers:
            return None
        return setting.model_copy(update={"cut": setting.cut + by})

    return step


def sleeping(setting: Setting) -> Setting | None:
    """A knob that lets threads sleep while they wait for each other."""
    return None if setting.sleeps else setting.model_copy(update={"sleeps": True})


def chunked(tokens: int) -> Step:
    """A knob that reads prompts in chunks: first of `tokens`, then of half as many, down to 32."""

    def step(setting: Setting) -> Setting | None:
        value = tokens if setting.prefill_tokens is None else setting.prefill_tokens // 2
        return None if value < 32 else setting.model_copy(update={"prefill_tokens": value})

    return step
