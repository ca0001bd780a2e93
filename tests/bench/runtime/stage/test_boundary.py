"""What crosses between stages: its size, its dtype, and how it is packed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipetune.bench.models.resolve import resolve_model
from pipetune.bench.runtime.stage.boundary import MessageFormat
from pipetune.bench.runtime.stage.stage import Stage
from pipetune.bench.spec import ModelSpec
from tests.bench.models.model_configs import model_config
from tests.families.configs import tiny_config

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("family", "values", "dtype"),
    [
        ("llama", 32, torch.bfloat16),
        ("gemma3n_text", 4 * 32, torch.bfloat16),
        ("hy_v4", 4 * 32, torch.bfloat16),
        ("zaya", 32 + 256, torch.float32),
    ],
)
def test_a_message_is_what_a_layer_takes(family: str, values: int, dtype: torch.dtype, tmp_path: Path) -> None:
    model_config(family).save_pretrained(tmp_path)
    stage = Stage(resolve_model(ModelSpec(name=str(tmp_path), load_format="dummy", dtype="bfloat16")), CPU)
    assert (stage.message_values, stage.message_dtype) == (values, dtype)


@pytest.mark.parametrize(
    ("family", "reads"),
    [
        ("llama", False),
        ("bloom", False),
        ("qwen3_moe", False),
        # Experts by the token's hash; embeddings of each layer; the embedding beside the hidden states.
        ("deepseek_v4", True),
        ("gemma3n_text", True),
        ("zamba2", True),
        # Positions from where the padding ends; what is not padding's id.
        ("roberta", True),
        ("gpt2", True),
    ],
)
def test_who_reads_ids_behind_the_embedding(family: str, reads: bool, tmp_path: Path) -> None:
    tiny_config(family).save_pretrained(tmp_path)
    stage = Stage(resolve_model(ModelSpec(name=str(tmp_path), load_format="dummy")), CPU)
    assert stage.reads_ids == reads


def test_a_message_gives_back_what_was_packed() -> None:
    # Two streams of hidden states before the rows, and a further tensor beside them.
    message = MessageFormat(
        before=(2,),
        behind=(5,),
        carried=(("router", 3),),
        carried_dtype=torch.float32,
        dtype=torch.float32,
        arguments=("hidden_states", "mask", "router"),
        returns_tuple_of=0,
    )
    hidden, router = torch.randn(2, 4, 6, 5), torch.randn(4, 6, 3)
    packed = message.pack((hidden, None), {"router": router})
    assert packed.shape == (4, 6, message.values)
    assert message.values == 2 * 5 + 3
    args, kwargs = message.unpack(packed, (torch.empty(0), None), {"router": None})
    assert torch.equal(args[0], hidden)
    assert args[1] is None
    assert torch.equal(kwargs["router"], router)
