"""How `device_map="auto"` splits a model over equal GPUs: asked of accelerate itself, on a model without weights.

`python -m tests.evaluation.peers.auto_map MODEL N` prints the layers of each of N devices as a JSON list.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from accelerate import infer_auto_device_map
from accelerate.utils import get_balanced_memory

from pipetune.bench.errors import ModelError
from pipetune.bench.models.describe import build_on_meta
from pipetune.bench.models.layers import find_layers
from pipetune.bench.models.resolve import resolve_model
from pipetune.bench.spec import ModelSpec

_PLENTY = 1 << 40
"""Bytes of each device: as much as is wanted, so that the split is the balanced one."""


def auto_layer_counts(model: ModelSpec, num_devices: int) -> tuple[int, ...]:
    """Layers of each device, in order.

    Raises:
        ModelError: the model cannot be found or read, or the split leaves the order of the layers.
    """
    skeleton = build_on_meta(resolve_model(model))
    whole = list(skeleton._no_split_modules or ())
    most = get_balanced_memory(
        skeleton, max_memory=dict.fromkeys(range(num_devices), _PLENTY), no_split_module_classes=whole
    )
    places = infer_auto_device_map(skeleton, max_memory=most, no_split_module_classes=whole)
    prefix, layers = find_layers(skeleton)
    counts = [0] * num_devices
    before = 0
    for index in range(len(layers)):
        name = f"{prefix}.{index}"
        device = next(place for module, place in places.items() if name == module or name.startswith(f"{module}."))
        if not isinstance(device, int) or device < before:
            raise ModelError(f"{model.name}: device_map='auto' puts layer {index} on {device}, behind {before}")
        counts[device] += 1
        before = device
    return tuple(counts)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the split of a dummy model."""
    name, num_devices = arguments or sys.argv[1:]
    sys.stdout.write(json.dumps(auto_layer_counts(ModelSpec(name=name, load_format="dummy"), int(num_devices))) + "\n")


if __name__ == "__main__":
    main()
