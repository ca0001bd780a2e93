"""What workers do before there is a model: whatever its files hold, what is wrong with them is the model's fault."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipetune.bench.errors import ModelError
from pipetune.bench.spec import ModelSpec
from pipetune.bench.worker.commands import find_model
from tests.tiny_models import save_tiny_model

ODD: dict[str, list[Any]] = {
    "auto_map": ["a list", True],
    "torch_dtype": [[1], {"a": 1}],
    "num_hidden_layers": [0, -1, "many"],
    "num_key_value_heads": [0, [2]],
    "quantization_config": [[1], "4 bit", {"quant_method": {}}],
    "text_config": [[1], {"a": 1}],
    "transformers_weights": [1, {}],
    "hidden_size": [0, None, 1e30],
    "model_type": [None, [1], {}],
}
"""Keys of a config, and values that no code was written for."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "llama", "llama", 2)


@pytest.mark.parametrize("key", ODD)
def test_whatever_a_config_holds_is_no_fault_of_ours(whole: Path, tmp_path: Path, key: str) -> None:
    folder = shutil.copytree(whole, tmp_path / "odd")
    config: dict[str, Any] = json.loads((whole / "config.json").read_text())
    for value in ODD[key]:
        (folder / "config.json").write_text(json.dumps({**config, key: value}))
        with contextlib.suppress(ModelError):
            find_model(ModelSpec(name=str(folder)), lambda message: None)
