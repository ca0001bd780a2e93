"""Dummy weights: random values that depend on the seed and on each module's name alone.

Whatever is cut out of a model, what is left has the values that the whole model has there: every rank and every split
agree without talking. The values are the family's own initialisation (norms 1, biases 0, rotary tables computed …),
drawn on the CPU in the tensor's own dtype: the same for every device, while another dtype is another set of values.
"""

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from pipetune.bench.models.hf_private import init_weights
from pipetune.bench.models.layers import find_layers
from pipetune.bench.models.torch_private import tensors_of, version_of


def init_dummy_weights(model: PreTrainedModel, seed: int) -> None:
    """Fills every parameter and buffer in place, and leaves the global random state as it was.

    The model was built on the meta device or on the CPU; layers, embedding and head may have been replaced by others
    that own no parameters. Tensors on meta become real ones on the CPU; tied ones stay tied.
    """
    _materialize(model)
    untyped: Any = model
    modules = list(_with_owners(model))
    # A family's `_init_weights` may reach into a module's descendants. Around what may have been cut out, the outcome
    # would depend on it: such modules go first, for the sake of tensors of their own alone, and whatever else they
    # reach is drawn again. All others go inside out, as the families mean it.
    names = _names_around_cuts(model)
    around = [entry for entry in modules if entry[0] in names]
    inside = [entry for entry in modules if entry[0] not in names]
    # What the embedding shares with the head has the embedding's values, wherever the head stands.
    embedding = [entry for entry in inside if entry[1] is untyped.get_input_embeddings()]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for name, module, owner in (*around, *reversed(inside), *embedding):
            digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
            torch.default_generator.manual_seed(int.from_bytes(digest[:8], "big", signed=True))
            _init_module(module, owner)


def _names_around_cuts(model: Any) -> set[str]:
    """Names of the modules that hold the layers, the embedding or the head, at any depth."""
    replaceable = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    parts = [name for name, module in model.named_modules() if id(module) in replaceable]
    prefix, _ = find_layers(model)
    names = {""}
    for part in (f"{prefix}.0", *parts):
        path = part.split(".")
        names |= {".".join(path[:depth]) for depth in range(1, len(path))}
    return names


def _init_module(module: nn.Module, owner: Any) -> None:
    parameters = list(module.parameters(recurse=False))
    for parameter in parameters:
        parameter.zero_()
    versions = [version_of(parameter) for parameter in parameters]
    init_weights(owner, module)
    for parameter, version in zip(parameters, versions, strict=True):
        if version_of(parameter) == version and parameter.is_floating_point():
            config = owner.config.get_text_config(decoder=True)
            parameter.normal_(0.0, float(getattr(config, "initializer_range", None) or 0.02))


def _with_owners(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module, PreTrainedModel]]:
    """Every module by name, outside in, with the nearest `PreTrainedModel` around it, whose `_init_weights` counts."""
    owners: dict[str, PreTrainedModel] = {}
    for name, module in model.named_modules():
        parent = owners[name.rpartition(".")[0]] if name else model
        owners[name] = module if isinstance(module, PreTrainedModel) else parent
        yield name, module, owners[name]


def _materialize(model: nn.Module) -> None:
    """Gives every tensor on the meta device memory on the CPU; one shared by several modules stays shared."""
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for tensors in tensors_of(module):
            for name, tensor in tensors.items():
                if tensor is None or not tensor.is_meta:
                    continue
                if id(tensor) not in made:
                    real: torch.Tensor = torch.zeros_like(tensor, device="cpu")
                    is_parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(real, tensor.requires_grad) if is_parameter else real
                tensors[name] = made[id(tensor)]
