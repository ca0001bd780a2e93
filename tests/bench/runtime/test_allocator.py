"""What a CPU worker keeps of a checkpoint's files, and what of them stays mapped."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from pipetune.bench.models.resolve import resolve_model
from pipetune.bench.runtime import allocator
from pipetune.bench.runtime.stage.stage import Stage
from pipetune.bench.spec import ModelSpec
from tests.tiny_models import save_tiny_model


def test_no_checkpoint_stays_mapped(tmp_path: Path) -> None:
    """Its pages would count as the worker's memory, once for every load that left a tensor behind."""
    stage = Stage(resolve_model(ModelSpec(name=str(save_tiny_model(tmp_path, "llama", 4)))), torch.device("cpu"))
    stage.assign(0, 2, is_first=True, is_last=False)
    stage.assign(1, 4, is_first=False, is_last=True)
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_tensors_taken_over_keep_their_values(tmp_path: Path) -> None:
    given = {"matrix": torch.randn(300, 7), "number": torch.tensor(3.0), "none": torch.empty(0, 4)}
    save_file(given, tmp_path / "model.safetensors")
    loaded = load_file(tmp_path / "model.safetensors")
    allocator.own(loaded.values(), tmp_path)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in given.items())
