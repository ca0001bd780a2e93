"""Whether a checkpoint and its config go together: weights that lack, that nothing reads, that are tied or apart.

transformers itself loads the checkpoint's names and shapes, on the meta device. No values are read, but those of
weights that the config ties and the checkpoint holds twice.
"""

import logging
import re
from collections.abc import Iterable, Mapping
from itertools import accumulate
from typing import Any

import torch
from safetensors import safe_open

from pipetune.bench.errors import ModelError
from pipetune.bench.models.checkpoint import UNQUANTIZED, StoredTensor, read_config, stored_tensors, weight_files
from pipetune.bench.models.describe import build_on_meta
from pipetune.bench.models.layers import check_family, find_layers
from pipetune.bench.models.resolve import ResolvedModel

_WIDE = ("F64", "F32", "BF16", "F16")
_TABLES = re.compile(
    r"(inv_freq|(rotary|rope)\w*\.\w*(cos|sin)\w*|causal_mask|position_ids|(\.|^|self_)att(n|ention)\.(masked_)?bias)$"
)
"""Names of what a model computes for itself, and older versions of transformers stored."""


def check_weights(resolved: ResolvedModel) -> ResolvedModel:
    """The model with what its checkpoint says of ties; none of its weights lacks, and nothing stored goes unread. Else
    ModelError names the first weight that does not go with the config."""
    if resolved.spec.load_format == "dummy":
        return resolved
    check_family(resolved.model_type)
    skeleton: Any = build_on_meta(resolved)
    extra = (resolved.folder / name for name in getattr(skeleton.config, "extra_files", ()))
    stored = stored_tensors((*weight_files(resolved.folder), *(file for file in extra if file.is_file())))
    where = f"model.name: {resolved.spec.name!r}"
    info, absent = _load_on_meta(skeleton, stored, where)
    wide = {name: tensor for name, tensor in stored.items() if tensor.dtype in _WIDE}
    if len(wide) < len(stored):
        _check_narrow(skeleton, stored, wide, where)
    config = read_config(resolved.folder)
    unread = sorted(name for name in info["unexpected_keys"] if not _is_harmless(name, config, skeleton))
    lacking = sorted(info["missing_keys"])
    problems = [
        f"gives {name} the shape {tuple(found)} and its config {tuple(asked)}"
        for name, found, asked in sorted(info["mismatched_keys"])[:1]
    ]
    problems += [f"lacks {len(lacking)} weights, {lacking[0]} first"] if lacking else []
    problems += [f"holds {len(unread)} weights that nothing reads, {unread[0]} first"] if unread else []
    if problems:
        raise ModelError(
            f"{where}: the checkpoint {', and '.join(problems)}; it is incomplete, quantized, with an adapter, or of "
            "another model than its config.json says: give the one that goes with it"
        )
    embedding = skeleton.get_input_embeddings()
    ties = [pair for pair in skeleton.all_tied_weights_keys.items() if absent.isdisjoint(pair)]
    return resolved.model_copy(
        update={
            "untied": tuple(one for one, other in ties if not _are_equal(skeleton, one, other, stored)),
            "embedding_in_head": any(
                f"{name}.weight" in absent for name, module in skeleton.named_modules() if module is embedding
            ),
        }
    )


def _load_on_meta(skeleton: Any, stored: Mapping[str, StoredTensor], where: str) -> tuple[dict[str, Any], set[str]]:
    """What transformers says of weights of these shapes, and all names without one, tied ones among them."""
    base, absent = type(skeleton), set[str]()

    def tie_weights(self: Any, missing_keys: set[str] | None = None, **kwargs: Any) -> None:
        absent.update(missing_keys or ())
        base.tie_weights(self, missing_keys=missing_keys, **kwargs)

    # Under the same name its conversions of old or fused checkpoints apply; nothing is there to initialise.
    methods = {"tie_weights": tie_weights, "_initialize_missing_keys": lambda self, is_quantized: None}
    probe: Any = type(base.__name__, (base,), {"__module__": base.__module__, **methods})
    logging.getLogger("transformers.modeling_utils").setLevel(logging.ERROR)
    try:
        _, info = probe.from_pretrained(
            None,
            config=skeleton.config,
            state_dict={name: torch.empty(tensor.shape, device="meta") for name, tensor in stored.items()},
            dtype=skeleton.dtype,
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    # Conversions fail in every way there is on shapes that they were not made for.
    except Exception as error:
        raise ModelError(f"{where}: transformers cannot load the checkpoint as its config says: {error}") from error
    return info, absent


def _check_narrow(
    skeleton: Any, stored: Mapping[str, StoredTensor], wide: Mapping[str, StoredTensor], where: str
) -> None:
    """Refuses weights that are stored as integers or in 8 bits: what they mean is for a quantization method to say."""
    values = skeleton.state_dict()
    missing = _load_on_meta(skeleton, wide, where)[0]["missing_keys"]
    if lacking := sorted(name for name in missing if values[name].is_floating_point()):
        name = _likest(lacking[0], stored.keys() - wide.keys())
        why = f"{name} is stored as {stored[name].dtype}, and nothing says by which method"
        raise ModelError(f"{where} is quantized: {why}; {UNQUANTIZED}")


def _is_harmless(name: str, config: Mapping[str, Any], skeleton: Any) -> bool:
    """Whether what nothing reads is a table, a layer that drafts, or of another part of a model of several."""
    prefix, layers = find_layers(skeleton)
    if _TABLES.search(name):
        return True
    if layer := re.match(rf"{re.escape(prefix)}\.(\d+)\.", name):
        return 0 <= int(layer[1]) - len(layers) < (config.get("num_nextn_predict_layers") or 0)
    several = any(isinstance(part, dict) and "model_type" in part for part in config.values())
    # Where the way of the name leaves the way to the layers.
    outer = next(outer for outer in accumulate(name.split("."), "{}.{}".format) if not prefix.startswith(f"{outer}."))
    return bool(several or config.get("is_encoder_decoder")) and outer not in dict(skeleton.named_modules())


def _are_equal(skeleton: Any, one: str, other: str, stored: Mapping[str, StoredTensor]) -> bool:
    """Whether two weights have the same values in the checkpoint, in the dtype that they are kept in."""
    shape = tuple(skeleton.get_parameter(one).shape)
    alike = [name for name, tensor in stored.items() if tensor.shape == shape]
    values = []
    for name in (_likest(one, alike), _likest(other, alike)):
        with safe_open(stored[name].file, framework="pt") as file:
            values.append(file.get_tensor(name).to(skeleton.dtype))
    return torch.equal(*values)


def _likest(name: str, names: Iterable[str]) -> str:
    """The one of other names that ends most alike."""
    ends = {name[start:] for start in range(len(name))}
    return max(sorted(names), key=lambda other: max(len(end) for end in ends | {""} if other.endswith(end)))
