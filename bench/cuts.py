"""What a model's config says of cuts: where there must be none, and what each stage must hold; read off its attributes.

Whoever has a config of transformers at hand may ask, without loading transformers.
"""

from typing import Any

_EMBEDS_IN_LAYERS = ("zamba", "zamba2", "gemma3n", "gemma3n_text")


def forbidden_cuts(config: Any) -> tuple[int, ...]:
    """Layers before which the model must not be cut: what a layer reads of an earlier one does not cross.

    These are keys and values that a layer uses again, positions that an earlier layer chose to attend to, and layers
    that are left out where there is no image (a cut behind them is the same).
    """
    text_config = config.get_text_config(decoder=True)
    forbidden: set[int] = set()
    kinds = getattr(text_config, "layer_types", None) or []
    stored: dict[str, int] = {}
    shared = getattr(text_config, "num_kv_shared_layers", None) or 0
    # transformers 5.17 knows no modes: the last layers use those of the last one of their kind before all of them.
    older = ["store"] * (text_config.num_hidden_layers - shared) + ["reuse"] * shared if shared else []
    for index, mode in enumerate(getattr(text_config, "kv_sharing_modes", None) or older):
        if mode == "store":
            stored[kinds[index]] = index
        elif mode == "reuse":
            forbidden |= set(range(stored[kinds[index]] + 1, index + 1))
    indexers = getattr(text_config, "indexer_types", None) or []
    forbidden |= {index for index, mode in enumerate(indexers) if mode == "shared"}
    return tuple(sorted(cut for cut in forbidden | idle_layers(config) if 0 < cut < text_config.num_hidden_layers))


def idle_layers(config: Any) -> frozenset[int]:
    """Layers that the model never calls when it is given text alone."""
    return frozenset(getattr(config.get_text_config(decoder=True), "cross_attention_layers", None) or ())


def embeds_in_layers(config: Any) -> bool:
    """Whether layers read the embedding of the tokens, so that every stage must hold it."""
    text_config = config.get_text_config(decoder=True)
    per_layer = getattr(text_config, "hidden_size_per_layer_input", None)
    return text_config.model_type in _EMBEDS_IN_LAYERS or bool(per_layer)
