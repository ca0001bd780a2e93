"""Where the search for each side's best setting begins, which knobs it may turn, and how often. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from pipetune.bench.memory import ModelShape
from pipetune.bench.spec import Workload
from tests.evaluation.peers.climb import Step, chunked, moved, scaled, sleeping
from tests.evaluation.peers.values import Setting


@dataclass(frozen=True, kw_only=True, slots=True)
class Search:
    """The search of one side."""

    start: Setting
    knobs: tuple[Step, ...]
    max_runs: int


def balanced_cut(shape: ModelShape, workload: Workload) -> int:
    """The cut that gives two stages like work: the head counts as the layers that it costs as much as.

    A generated token meets the head once, a prompt's token only if it is the last or if it is scored.
    """
    per_layer = sum(layer.active_params for layer in shape.layers) / shape.num_layers
    head = shape.vocab_size * shape.hidden_size
    through_layers = workload.input_len + max(workload.generated_len - 1, 0)
    through_head = workload.generated_len or workload.input_len
    extra = head / per_layer * through_head / through_layers
    return min(max(round((shape.num_layers + extra) / 2), 1), shape.num_layers - 1)


def search_of(side: str, shape: ModelShape, workload: Workload, *, quick: bool) -> Search:
    """The search for one side; prompts are shared out among two processes or replicas where the side has them."""
    number = workload.num_prompts
    half = max(1, number // 2)
    cuts = (moved(1, num_layers=shape.num_layers), moved(-1, num_layers=shape.num_layers))
    cut = balanced_cut(shape, workload)
    halve_rows = scaled("rows", 0.5, high=number)
    double_rows = scaled("rows", 2.0, high=half)
    halve_prefill = scaled("prefill_rows", 0.5, high=number)
    double_prefill = scaled("prefill_rows", 2.0, high=number)
    chunks = (chunked(workload.input_len // 2),) if workload.input_len >= 128 else ()
    piece = max(1, number // 8)
    if side == "pipeline":
        start = Setting(rows=half, prefill_rows=piece, cut=cut)
        return Search(
            start=start, knobs=(halve_prefill, double_prefill, *chunks, *cuts, halve_rows), max_runs=4 if quick else 6
        )
    if side in ("single", "replicas"):
        rows = number if side == "single" else half
        start = Setting(rows=rows, prefill_rows=min(piece, rows))
        return Search(start=start, knobs=(double_prefill, halve_prefill, halve_rows), max_runs=2 if quick else 3)
    if side in ("score_pipeline", "gpipe"):
        start = Setting(rows=max(1, number // (8 if side == "score_pipeline" else 4)), cut=cut)
        return Search(start=start, knobs=(halve_rows, double_rows, *cuts), max_runs=3 if quick else 4)
    if side == "score_single":
        start = Setting(rows=piece)
        return Search(start=start, knobs=(scaled("rows", 2.0, high=number), halve_rows), max_runs=2)
    assert side in ("hf_one", "hf_all", "hf_two"), f"no search for {side}"
    start = Setting(rows=half if side == "hf_two" else number)
    knobs = (sleeping, halve_rows) if side == "hf_all" else (halve_rows,)
    return Search(start=start, knobs=knobs, max_runs=2 if quick and side != "hf_all" else 3)
