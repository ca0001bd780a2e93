"""A model as `doctor` tells of it: facts, layers, memory of each stage, what would be refused."""

from pipetune.tuner.planning.model_fit import Fit, ModelFit, ranges_text
from pipetune.tuner.report.document import GAP, Column, Facts, Part, Table, Text, left, rows_of
from pipetune.tuner.report.wording import bytes_text, short_list, small_text

_MAX_RANGES = 18


def parts_of(model_fit: ModelFit) -> tuple[Part, ...]:
    """Facts, groups of equal layers, and the balanced split."""
    fit = model_fit.fit
    room = f"{fit.in_flight} of the workload's {fit.num_micro_batches} micro-batches can be in flight."
    return (
        _facts(model_fit),
        GAP,
        _layers(model_fit),
        GAP,
        Text(_split_text(fit)),
        _stages(fit),
        Text(room if fit.in_flight else "Not even one micro-batch fits."),
        *(Text(f"refused: {text}") for text in model_fit.refused),
    )


def _facts(model_fit: ModelFit) -> Facts:
    shape = model_fit.shape
    outside = {"embedding": shape.embedding_bytes, "head": shape.head_bytes, "other": shape.other_bytes}
    in_layers = sum(layer.weight_bytes for layer in shape.layers)
    active = sum(layer.active_params for layer in shape.layers)
    routed = active < 0.9 * in_layers / shape.dtype_bytes
    cuts = f"before layers {ranges_text(model_fit.cuts)}" if model_fit.cuts else "nowhere: it runs on one device"
    anywhere = "anywhere: " if len(model_fit.cuts) == shape.num_layers - 1 > 0 else ""
    checkpoint = shape.checkpoint_bytes
    read = f"checkpoint {_mib(checkpoint)} MiB" if checkpoint else "no checkpoint read"
    facts = {
        "parameters": _count(shape.num_parameters)
        + (f"; of those in the layers a token meets {_count(active)}" if routed else ""),
        "weights": f"{_mib(in_layers + sum(outside.values()))} MiB at {shape.dtype_bytes} bytes a value; {read}",
        "outside layers": ", ".join(f"{name} {_mib(size)}" for name, size in outside.items() if size)
        + " MiB"
        + (", on every stage" if shape.embedding_on_every_stage else ""),
        "head": "tied to the embedding, which the last stage holds as well" if shape.tied else "its own weights",
        "shape": f"hidden {shape.hidden_size}, intermediate {shape.intermediate_size}, "
        f"{shape.num_attention_heads} heads, vocabulary {shape.vocab_size}",
        "positions": str(shape.max_positions) if shape.max_positions is not None else "no limit stated",
        "cuts": anywhere + cuts,
    }
    return Facts(tuple(facts.items()))


def _layers(model_fit: ModelFit) -> Table:
    rows = []
    for group in model_fit.groups:
        sizes = (_mib(group.weight_bytes), _count(group.active_params), str(group.kv_bytes_per_token))
        rows.append((short_list(ranges_text(group.indices), _MAX_RANGES), str(len(group.indices)), group.kind, *sizes))
    sizes_of = map(Column, ("weights MiB", "active params", "KV B/token"))
    return Table(columns=(left("layers"), Column("n"), left("kind"), *sizes_of), rows=rows_of(rows))


def _split_text(fit: Fit) -> str:
    split = "+".join(str(count) for count in fit.layer_counts)
    size = f"micro-batch {fit.micro_batch_size}"
    if fit.micro_batch_size < fit.whole_size:
        size += f" ({fit.whole_size} does not fit)"
    to_do = f"{fit.output_len} to generate" if fit.output_len else "scored"
    return (
        f"Split {split} (balanced by predicted time), {size}, prompts of {fit.prompt_len} tokens, {to_do}, caps at "
        f"{fit.memory_fraction:.0%}{f' and {bytes_text(fit.max_memory_bytes)}' if fit.max_memory_bytes else ''}; MiB:"
    )


def _stages(fit: Fit) -> Table:
    rows = []
    for index, stage in enumerate(fit.stages):
        layers = ranges_text(range(stage.first_layer, stage.end_layer))
        sizes = (stage.weight_bytes, stage.kv_bytes_per_micro_batch, stage.activation_bytes, stage.cap_bytes)
        room = "any" if stage.in_flight is None else str(stage.in_flight)
        rows.append((str(index), stage.device, layers, *map(_mib, sizes), room))
    numbers = map(Column, ("weights", "KV/micro-batch", "activations", "cap", "room for"))
    return Table(columns=(*map(left, ("stage", "device", "layers")), *numbers), rows=rows_of(rows))


def _mib(size: float) -> str:
    return small_text(size / 2**20)


def _count(number: int) -> str:
    """`134.5 M`, `8.03 G`."""
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{number / scale:.4g} {unit}"
    return str(number)
