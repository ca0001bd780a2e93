"""How plans, numbers and foreign text are written for people; every report writes them alike."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from bench.spec import ModelSpec, Plan, Workload
from tuner.standings import BaselineRow, FailureRow, Ratio, Row, Spread

MISSING = "–"


def clean(text: str) -> str:
    """Foreign text on one line: control characters, which could drive a terminal, become spaces."""
    return " ".join("".join(" " if unicodedata.category(char)[0] == "C" else char for char in text).split())


def sentence(text: str) -> str:
    """The text with a capital and a full stop."""
    return f"{text[0].upper()}{text[1:]}."


def layers_text(plan: Plan) -> str:
    """`17+13`."""
    return "+".join(str(count) for count in plan.layer_counts)


def row_text(row: Row) -> str:
    """One plan in one line: `17+13 · micro-batch 16 (prefill 8) · 2 in flight`."""
    return f"{row.plan.describe()} · {row.effective.in_flight} in flight"


def number_text(value: float | None, digits: int = 3) -> str:
    """Three significant digits, and never an exponent: `60.8`, `1234`, `0.104`."""
    if value is None:
        return MISSING
    if abs(value) >= 10 ** (digits - 1) or value == 0:
        return f"{value:.0f}"
    before = len(f"{int(abs(value))}") if abs(value) >= 1 else 0
    return f"{value:.{digits - before}f}"


def spread_text(spread: Spread | None) -> str:
    """`60.8 ±4.9`: the median and the interquartile range."""
    if spread is None:
        return MISSING
    return number_text(spread.median) + (f" ±{number_text(spread.iqr, 2)}" if spread.samples > 1 else "")


def ratio_text(ratio: Ratio | None) -> str:
    """`1.79×`; `~1.79×` when it was not measured in common rounds."""
    return MISSING if ratio is None else f"{'' if ratio.paired else '~'}{ratio.value:.2f}×"


def ratio_evidence(ratio: Ratio) -> str:
    """What stands behind a ratio, for brackets."""
    if not ratio.paired:
        return "unpaired: by their medians, not in common rounds"
    if ratio.rounds == 1:
        return "in one interleaved round"
    return f"{ratio.low:.2f}–{ratio.high:.2f} over {ratio.rounds} interleaved rounds"


def percent_text(share: float | None) -> str:
    return MISSING if share is None else f"{round(share * 100)} %"


def ms_text(milliseconds: float | None) -> str:
    """`845 ms`, `1.23 s`."""
    if milliseconds is None:
        return MISSING
    return f"{number_text(milliseconds)} ms" if milliseconds < 1000 else f"{number_text(milliseconds / 1e3)} s"


def bytes_text(count: float | None) -> str:
    """`712 MiB`, `11.3 GiB`."""
    if count is None:
        return MISSING
    return f"{count / 2**20:.0f} MiB" if count < 2**30 else f"{count / 2**30:.3g} GiB"


def metric_text(name: str, value: float | None) -> str:
    """A metric with its unit, by the ending of its name."""
    if value is None:
        return MISSING
    if name.endswith("_ms"):
        return ms_text(value)
    if name.endswith("_s"):
        return ms_text(value * 1e3)
    if name.endswith("_bytes"):
        return bytes_text(value)
    if name.startswith("bubble") or name.endswith(("_utilization", "_fraction")):
        return percent_text(value)
    units = {
        "output_throughput": " tok/s",
        "total_token_throughput": " tok/s",
        "request_throughput": " req/s",
        "energy_j": " J",
        "output_tokens_per_joule": " tok/J",
    }
    return number_text(value) + units.get(name, "")


def model_text(model: ModelSpec) -> str:
    dummy = " · random weights" if model.load_format == "dummy" else ""
    return f"{clean(model.name)} · {model.dtype}{dummy}"


def workload_text(workload: Workload, prompt_lens: Sequence[int] = ()) -> str:
    """`32 random prompts × 64 tokens → 16 new each, greedy`; `prompt_lens` as measured, where anything was."""
    shortest, longest = (min(prompt_lens), max(prompt_lens)) if prompt_lens else (workload.input_len,) * 2
    length = f"{longest}" if shortest == longest else f"{shortest}–{longest}"
    if workload.prompts_file:
        of = f"{workload.num_prompts} prompts of {clean(workload.prompts_file)}"
        given = f"{of} × {length} tokens" if prompt_lens else of
    else:
        given = f"{workload.num_prompts} random prompts × {length} tokens"
    return f"{given} → {workload.output_len} new each, greedy"


def baseline_text(row: BaselineRow, metric: str) -> str:
    return f"HF generate un-pipelined, batch {row.batch_size}: {metric_text(metric, row.value)}"


def column_title(metric: str) -> str:
    """A metric's name as a heading that can wrap; the cells bear the unit."""
    return metric.removesuffix("_ms").removesuffix("_s").removesuffix("_bytes").replace("_", " ")


def failure_where(failure: FailureRow) -> str:
    """`stage 1 on cpu:1, decode`; empty when nothing is known."""
    what = failure.failure
    place = f"stage {what.stage}" if what.stage is not None else ""
    if what.device:
        place = f"{place} on {what.device}" if place else what.device
    return ", ".join(part for part in (place, clean(what.phase or "")) if part)


def failure_plan(failure: FailureRow) -> str:
    """`17+13 · micro-batch 16`, or `device_map, batch 32` for the baseline."""
    if failure.plan:
        return failure.plan.describe()
    return "device_map" if failure.batch_size is None else f"device_map, batch {failure.batch_size}"


def warnings_of(row: Row) -> tuple[str, ...]:
    """What must be said beside the best plan where something gained nothing."""
    warnings = []
    gain = row.speedup_over_baseline
    if len(row.plan.stages) == 1:
        warnings.append("The best plan is a single stage: pipelining gains nothing for this workload on these devices.")
    if gain is not None and gain.value < 1:
        warnings.append("The un-pipelined model is faster here: this plan does not pay for this workload.")
    elif gain is not None and gain.low is not None and gain.low <= 1:
        warnings.append("Not every round gained: the plan is not told apart from the un-pipelined model.")
    return tuple(warnings)
