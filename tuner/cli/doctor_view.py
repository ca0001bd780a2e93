"""How `doctor` shows a model: facts, layers, memory of each stage, what would be refused; in 80 columns."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipetune.tuner.planning.model_fit import Fit, ModelFit, ranges_text

_LEFT = frozenset({"layers", "kind", "stage", "device"})
_MAX_RANGES = 18


def show(model_fit: ModelFit, console: Console) -> None:
    """Prints a model."""
    console.print()
    console.print(_facts(model_fit))
    console.print()
    console.print(_layers(model_fit))
    console.print()
    _show_fit(model_fit, console)
    for text in model_fit.refused:
        console.print(f"refused: {text}", markup=False)


def _facts(model_fit: ModelFit) -> Table:
    shape = model_fit.shape
    outside = {"embedding": shape.embedding_bytes, "head": shape.head_bytes, "other": shape.other_bytes}
    in_layers = sum(layer.weight_bytes for layer in shape.layers)
    active = sum(layer.active_params for layer in shape.layers)
    routed = active < 0.9 * in_layers / shape.dtype_bytes
    cuts = f"before layers {ranges_text(model_fit.cuts)}" if model_fit.cuts else "nowhere: it runs on one device"
    if model_fit.cuts == tuple(range(1, shape.num_layers)):
        cuts = f"anywhere: before layers {ranges_text(model_fit.cuts)}"
    facts = {
        "parameters": _count(shape.num_parameters)
        + (f"; of those in the layers a token meets {_count(active)}" if routed else ""),
        "weights": f"{_mib(in_layers + sum(outside.values()))} MiB at {shape.dtype_bytes} bytes a value"
        + (f"; checkpoint {_mib(shape.checkpoint_bytes)} MiB" if shape.checkpoint_bytes else "; no checkpoint read"),
        "outside layers": ", ".join(f"{name} {_mib(size)}" for name, size in outside.items() if size)
        + " MiB"
        + (", on every stage" if shape.embedding_on_every_stage else ""),
        "head": "tied to the embedding, which the last stage holds as well" if shape.tied else "its own weights",
        "shape": f"hidden {shape.hidden_size}, intermediate {shape.intermediate_size}, "
        f"{shape.num_attention_heads} heads, vocabulary {shape.vocab_size}",
        "positions": str(shape.max_positions) if shape.max_positions is not None else "no limit stated",
        "cuts": cuts,
    }
    grid = Table.grid(padding=(0, 2))
    for name, text in facts.items():
        grid.add_row(name, escape(text))
    return grid


def _layers(model_fit: ModelFit) -> Table:
    table = _table("layers", "n", "kind", "weights MiB", "active params", "KV B/token")
    for group in model_fit.groups:
        ranges = ranges_text(group.indices)
        table.add_row(
            ranges if len(ranges) <= _MAX_RANGES else f"{ranges[: _MAX_RANGES - 2].rpartition(',')[0]}, …",
            str(len(group.indices)),
            escape(group.kind),
            _mib(group.weight_bytes),
            _count(group.active_params),
            str(group.kv_bytes_per_token),
        )
    return table


def _show_fit(model_fit: ModelFit, console: Console) -> None:
    fit = model_fit.fit
    split = "+".join(str(count) for count in fit.layer_counts)
    size = f"micro-batch {fit.micro_batch_size}"
    if fit.micro_batch_size < fit.whole_size:
        size += f" ({fit.whole_size} does not fit)"
    to_do = f"{fit.output_len} to generate" if fit.output_len else "scored"
    console.print(
        f"Split {split} (balanced by predicted time), {size}, prompts of {fit.prompt_len} "
        f"tokens, {to_do}, caps at {fit.memory_fraction:.0%}; MiB:",
        markup=False,
    )
    console.print(_stages(fit))
    if fit.in_flight:
        console.print(
            f"{fit.in_flight} of the workload's {fit.num_micro_batches} micro-batches can be in flight.", markup=False
        )
    else:
        console.print("Not even one micro-batch fits.", markup=False)


def _stages(fit: Fit) -> Table:
    table = _table("stage", "device", "layers", "weights", "KV/micro-batch", "activations", "cap", "room for")
    for index, stage in enumerate(fit.stages):
        room = "any" if stage.in_flight is None else str(stage.in_flight)
        table.add_row(
            str(index),
            escape(stage.device),
            f"{stage.first_layer}-{stage.end_layer - 1}",
            _mib(stage.weight_bytes),
            _mib(stage.kv_bytes_per_micro_batch),
            _mib(stage.activation_bytes),
            _mib(stage.cap_bytes),
            room,
        )
    return table


def _table(*names: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in names:
        table.add_column(name, justify="left" if name in _LEFT else "right", no_wrap=True)
    return table


def _mib(size: float) -> str:
    value = size / 2**20
    if 0 < value < 0.01:
        return "<0.01"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _count(number: int) -> str:
    """`134.5 M`, `8.03 G`."""
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{number / scale:.4g} {unit}"
    return str(number)
