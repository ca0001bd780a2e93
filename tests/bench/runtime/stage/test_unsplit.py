"""The unsplit model over several GPUs: on none of them, or on all of them, and never on disk."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version

from pipetune.bench.models.describe import build_on_meta
from pipetune.bench.models.resolve import ResolvedModel, resolve_model
from pipetune.bench.runtime.stage.unsplit import spread_over
from pipetune.bench.spec import ModelSpec
from tests.tiny_models import tiny_config


def tiny_dummy(folder: Path) -> ResolvedModel:
    tiny_config("llama").save_pretrained(folder)
    return resolve_model(ModelSpec(name=str(folder), load_format="dummy"))


@pytest.mark.skipif(
    Version(version("accelerate")) < Version("1.15") and not torch.cuda.is_available(),
    reason="accelerate asks torch for the GPUs before 1.15, and there are none",
)
def test_a_model_that_fits_on_no_gpus_is_out_of_memory_and_not_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = build_on_meta(tiny_dummy(tmp_path))
    size = sum(parameter.nbytes for parameter in model.parameters())
    gpus = ("cuda:0", "cuda:2")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (size, size))
    assert set(spread_over(model, gpus).values()) == {0, 2}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (size // 3, size))
    with pytest.raises(MemoryError, match="cuda:0, cuda:2"):
        spread_over(model, gpus)
