"""A tiny model, for all tests of references."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from tests.tiny_models import save_tiny_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    untyped: Any = AutoModelForCausalLM
    return untyped.from_pretrained(save_tiny_model(tmp_path_factory.mktemp("models"), "llama")).eval()
