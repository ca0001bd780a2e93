"""How plans, numbers and foreign text are written for people; every report writes them alike."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import yaml

from pipetune.bench.errors import harmless
from pipetune.bench.record import Hardware, Measurement, OutputCheck
from pipetune.bench.spec import ENGINE_TITLES, Arrivals, EffectivePlan, ModelSpec, Plan, Sampling, Workload
from pipetune.tuner.ranking.values import BaselineRow, FailureRow, Ranking, Row, Spread
from pipetune.tuner.stats.ratios import Ratio

MISSING = "–"
_UNITS = {
    "output_throughput": " tok/s",
    "total_token_throughput": " tok/s",
    "request_throughput": " req/s",
    "request_goodput": " req/s",
    "max_request_rate": " req/s",
    "energy_j": " J",
    "output_tokens_per_joule": " tok/J",
}


def clean(text: str) -> str:
    """Foreign text on one line, without control characters."""
    return " ".join(harmless(text).split())


def sentence(text: str | None) -> str:
    """The text with a capital and a full stop; empty for none."""
    return f"{text[0].upper()}{text[1:]}." if text else ""


def definitions(part: str) -> dict[str, str]:
    """What words of a page mean: of the `bubble`, of `all` pages, or of `fronts`."""
    return dict(yaml.safe_load(Path(__file__).with_name("definitions.yaml").read_text(encoding="utf-8"))[part])


def layers_text(plan: Plan) -> str:
    """`17+13`, `2×17+13` for two replicas, `17+13 on cpu:1,cpu:0`, `17+13 compiled`: all but the sizes."""
    counts = "+".join(str(count) for count in plan.layer_counts) + plan.order_text
    switches = [*plan.switches, *([f"TP {plan.width}"] if plan.width > 1 else [])]
    if plan.engine is not None:
        switches += ["eager"] * plan.engine.enforce_eager + ["served"] * plan.engine.served
    return " ".join([f"{plan.replicas}×{counts}" if plan.replicas > 1 else counts, *switches, *plan.lane_words])


def sizes_text(effective: EffectivePlan) -> tuple[str, str, str]:
    """Micro-batch, rows prefilled together, with the tokens of a chunk where prompts are cut (`8`, `8·64`), and how
    many are in flight; of an engine budget, sequences, KV cache."""
    plan, engine = effective.plan, effective.plan.engine
    if engine is None:
        chunk = f"·{plan.prefill_chunk_size}" if plan.prefill_chunk_size is not None else ""
        return str(plan.micro_batch_size), f"{plan.prefill_size}{chunk}", str(effective.in_flight)
    budget, seqs = (str(limit or MISSING) for limit in (engine.max_num_batched_tokens, engine.max_num_seqs))
    return budget, seqs, bytes_text(engine.kv_cache_memory_bytes)


def stage_name(plan: Plan, place: int) -> str:
    """The stage at a place of `plan.devices`: `stage 1`, or `replica 0 stage 1` where there are several."""
    replica, stage = divmod(place, len(plan.stages))
    return f"replica {replica} stage {stage}" if plan.replicas > 1 else f"stage {stage}"


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


def small_text(value: float) -> str:
    """Three significant digits of a number that may be tiny, never below 0: `134`, `0.104`, `<0.01`, `0`."""
    return "<0.01" if 0 < value < 0.01 else f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def count_text(count: int, noun: str) -> str:
    """`1 run`, `3 runs`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def list_text(names: Sequence[str]) -> str:
    """`16+14`, `16+14 and 18+12`, and of many the first two: `16+14, 18+12 and 3 more`."""
    if len(names) > 3:
        return f"{', '.join(names[:2])} and {len(names) - 2} more"
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def short_list(text: str, limit: int) -> str:
    """`0-2, 4-5, …`: a list in so many characters."""
    return text if len(text) <= limit else f"{text[: limit - 2].rpartition(',')[0]}, …"


def spread_text(spread: Spread) -> str:
    """`60.8 ±4.9`: the median and the interquartile range."""
    return number_text(spread.median) + (f" ±{number_text(spread.iqr, 2)}" if spread.samples > 1 else "")


def ratio_text(ratio: Ratio | None) -> str:
    """`1.79×`; `~1.79×` when it was not measured in common rounds."""
    return MISSING if ratio is None else f"{'' if ratio.paired else '~'}{ratio.value:.2f}×"


def ratio_evidence(ratio: Ratio) -> str:
    """What stands behind a ratio, for brackets."""
    if not ratio.paired:
        return "unpaired: by their medians, not in common rounds"
    rounds = "in one interleaved round" if ratio.rounds == 1 else f"over {ratio.rounds} interleaved rounds"
    return rounds if ratio.low is None else f"{ratio.low:.2f}–{ratio.high:.2f} {rounds}"


def percent_text(share: float | None, digits: int | None = None) -> str:
    """`18 %` for 0.18; `18.27 %` with four digits."""
    if share is None:
        return MISSING
    return f"{round(share * 100) if digits is None else number_text(share * 100, digits)} %"


def ms_text(milliseconds: float | None, digits: int = 3) -> str:
    """`845 ms`, `1.23 s`."""
    if milliseconds is None:
        return MISSING
    value, unit = (milliseconds, "ms") if milliseconds < 1000 else (milliseconds / 1e3, "s")
    return f"{number_text(value, digits)} {unit}"


def bytes_text(count: float | None) -> str:
    """`712 MiB`, `11.3 GiB`."""
    if count is None:
        return MISSING
    return f"{count / 2**20:.0f} MiB" if count < 2**30 else f"{count / 2**30:.3g} GiB"


def with_unit(name: str) -> str:
    """`output_throughput, tok/s`; the name alone where it ends in its unit."""
    return ",".join([name, *filter(None, (_UNITS.get(name),))])


def metric_text(name: str, value: float | None, digits: int | None = None) -> str:
    """A metric with its unit, by the ending of its name; with so many digits, or as many as people need."""
    if value is None:
        return MISSING
    if name.endswith(("_ms", "_s")):
        return ms_text(value if name.endswith("_ms") else value * 1e3, digits or 3)
    if name.endswith("_bytes"):
        return bytes_text(value)
    if name.startswith("bubble") or name.endswith(("_utilization", "_fraction", "_attainment")):
        return percent_text(value, digits)
    return number_text(value, digits or 3) + _UNITS.get(name, "")


def hardware_text(hardware: Hardware) -> str:
    """`2 × NVIDIA A10 · AMD EPYC 7413, 16 cores`."""
    counts = Counter(clean(gpu.name) for gpu in hardware.gpus)
    gpus = (f"{count} × {name}" for name, count in counts.items())
    return " · ".join((*gpus, f"{clean(hardware.cpu_model)}, {hardware.cpu_cores} cores"))


def model_text(model: ModelSpec) -> str:
    """`smollm2-135m · float32`, with how its weights are kept where that differs."""
    kept = f" over {model.kept_dtype} weights" if model.kept_dtype != model.dtype else ""
    dummy = " · random weights" if model.load_format == "dummy" else ""
    return f"{clean(model.name)} · {model.dtype}{kept}{dummy}"


def workload_text(workload: Workload, prompt_lens: Sequence[int] = ()) -> str:
    """`32 random prompts × 64 tokens → 16 new each, greedy`, or `… scored`; `prompt_lens` as measured."""
    shortest, longest = (min(prompt_lens), max(prompt_lens)) if prompt_lens else (workload.input_len,) * 2
    length = f"{longest}" if shortest == longest else f"{shortest}–{longest}"
    given = f"{workload.num_prompts} random prompts"
    if workload.prompts_file:
        given = f"{workload.num_prompts} prompts of {clean(workload.prompts_file)}"
    given += f" × {length} tokens" if prompt_lens or not workload.prompts_file else ""
    if workload.kind == "score":
        return f"{given}, scored"
    least, most = min(workload.generated_lens), workload.generated_len
    new = f"{most}" if least == most else f"{least}–{most}"
    return f"{given} → {new} new each, {sampling_text(workload.sampling)}{_arrivals_text(workload.arrivals)}"


def _arrivals_text(arrivals: Arrivals | None) -> str:
    """`, 3 requests/s`, `, 3 requests/s of burstiness 0.5`."""
    if arrivals is None:
        return ""
    if arrivals.trace is not None:
        scale = f" at {1 / arrivals.time_scale:.3g} times its rate" if arrivals.time_scale != 1 else ""
        return f", as in {clean(arrivals.trace)}{scale}"
    ramp = (arrivals.ramp_up_start_rps, arrivals.ramp_up_end_rps)
    rate = " to ".join(f"{rate:.3g}" for rate in ((arrivals.request_rate,) if arrivals.request_rate else ramp))
    return f", {rate} requests/s" + f" of burstiness {arrivals.burstiness:g}" * (arrivals.burstiness != 1)


def sampling_text(sampling: Sampling | None) -> str:
    """`greedy`, `temperature 0.8, top-k 40, seed 0`."""
    if sampling is None:
        return "greedy"
    parts = [f"temperature {sampling.temperature:g}"]
    parts += [f"top-k {sampling.top_k}"] if sampling.top_k else []
    parts += [f"top-p {sampling.top_p:g}"] if sampling.top_p < 1 else []
    return ", ".join([*parts, f"seed {sampling.seed}"])


def peer_name(workload: Workload) -> str:
    """What of Hugging Face the un-pipelined model runs under: `generate`, or its `forward` where texts are scored."""
    return "forward" if workload.kind == "score" else "generate"


def baseline_text(row: BaselineRow, workload: Workload, engine: str | None) -> str:
    """`HF generate un-pipelined, batch 8`, `vLLM un-pipelined, 8 sequences at once`."""
    if engine is not None:
        return f"{engine} un-pipelined, {row.batch_size} sequences at once"
    return f"HF {peer_name(workload)} un-pipelined, batch {row.batch_size}"


def column_title(metric: str) -> str:
    """A metric's name as a heading that can wrap; the cells bear the unit."""
    if short := {"request_goodput": "goodput", "max_request_rate": "max rate"}.get(metric):
        return short
    return metric.removesuffix("_ms").removesuffix("_s").removesuffix("_bytes").replace("_", " ")


def failure_where(failure: FailureRow) -> str:
    """`stage 1 on cpu:1, decode`; empty when nothing is known."""
    what = failure.failure
    places = [f"stage {what.stage}"] if what.stage is not None else []
    places += [what.device] if what.device else []
    return ", ".join(filter(None, (" on ".join(places), clean(what.phase or ""))))


def failure_plan(failure: FailureRow, baseline_name: str) -> str:
    """`17+13 · micro-batch 16`, or `device_map, batch 32` for the baseline."""
    if failure.plan:
        return failure.plan.describe()
    return baseline_name if failure.batch_size is None else f"{baseline_name}, batch {failure.batch_size}"


def copies_text(plan: Plan) -> str:
    """`two copies of the model`, `two replicas of 2 stages`, `one pipeline of 3 stages`."""
    if plan.replicas == 1:
        return f"one pipeline of {len(plan.stages)} stages"
    count = {2: "two", 3: "three", 4: "four"}.get(plan.replicas, str(plan.replicas))
    return f"{count} copies of the model" if len(plan.stages) == 1 else f"{count} replicas of {len(plan.stages)} stages"


def rival_text(ranking: Ranking) -> str | None:
    """Which way of using several devices won, copies or one pipeline; None where one way alone was ranked."""
    best, rival = ranking.best, ranking.rival
    if best is None or rival is None or rival.gain is None or len(best.plan.devices) == 1:
        return None
    gain, several = rival.gain, best.plan.replicas > 1
    ours, theirs = copies_text(best.plan), copies_text(rival.row.plan)
    against = f"{theirs} ({rival.row.plan.describe()}): {ratio_text(gain)}, {ratio_evidence(gain)}"
    apart = gain.is_told if gain.paired else gain.value > 1
    if not apart:
        return sentence(f"{ours} {'are' if several else 'is'} not told apart from {against}")
    if not gain.paired:
        return sentence(f"{ours} {'were' if several else 'was'} faster during the search than {against}")
    most = max(best.plan.replicas, rival.row.plan.replicas)
    return sentence(f"{ours} beat{'' if several else 's'} {against}; {most} replicas hold the weights {most} times")


def engine_default_text(ranking: Ranking) -> str | None:
    """What is gained over another engine's own defaults; None where our own runtime ran the plans."""
    default = ranking.engine_default
    if default is None or default.row.plan.engine is None:
        return None
    name, what = ENGINE_TITLES[default.row.plan.engine.name], default.row.plan.describe()
    if default.gain is None:
        return f"Nothing is better than what {name} does by itself ({what})."
    return f"Over what {name} does by itself ({what}): {ratio_text(default.gain)}, {ratio_evidence(default.gain)}."


def compared_text(check: OutputCheck, *, scored: bool) -> str:
    """`logits within 2.1e-05 (allowed 2.0e-04)`, and how many positions lie beyond that."""
    what = "log-probabilities" if scored else "logits"
    if check.max_logit_error <= check.tolerance or not check.outliers:
        return f"{what} within {check.max_logit_error:.1e} (allowed {check.tolerance:.1e})"
    return (
        f"{what} within {check.tolerance:.1e} but for {check.outliers} of {check.positions} positions, as where two "
        "experts are nearly tied"
    )


def steps_text(measurement: Measurement) -> str:
    """`4 layers loaded in 0.80 s, output checked in 1.9 s`: what the timed iterations do not contain."""
    count, changed = len(measurement.loaded_layers), "the engine started or changed"
    steps = {
        (changed if measurement.method == "engine" else f"{count_text(count, 'layer')} loaded"): measurement.load_s,
        "output checked": measurement.check_s,
        "compiled or captured": measurement.prepare_s,
    }
    return ", ".join(f"{step} in {ms_text(1e3 * took_s)}" for step, took_s in steps.items() if took_s is not None)


def export_note(plan: Plan, device_map: str = "it") -> str | None:
    """What a device map, called so, leaves out of a plan; None where it says all."""
    if plan.replicas == 1:
        return None
    return (
        f"a device map describes one model: {device_map} holds the first of {plan.replicas} replicas; load the model "
        "once for each, on devices of its own, and share the requests out"
    )


def warnings_of(row: Row) -> tuple[str, ...]:
    """What must be said beside the best plan where something gained nothing."""
    warnings = []
    gain = row.speedup_over_baseline
    if len(row.plan.devices) == 1:
        warnings.append("The best plan is a single stage: pipelining gains nothing for this workload on these devices.")
    if gain is not None and gain.value < 1:
        warnings.append("The un-pipelined model is faster here: this plan does not pay for this workload.")
    elif gain is not None and gain.low is not None and gain.low <= 1:
        warnings.append("The plan is not told apart from the un-pipelined model.")
    return tuple(warnings)
