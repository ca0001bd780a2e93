"""`auto_split_model` on real Hugging Face models, tiny and on the meta device."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipetune import auto_split_model
from pipetune.bench.errors import PlanError
from pipetune.bench.memory import check_plan
from pipetune.bench.models.describe import describe_model, read_shape
from pipetune.bench.models.resolve import resolve_model
from pipetune.bench.spec import ModelSpec
from pipetune.tuner.planning.partition.device_map import plan_from_map
from tests.bench.models.model_configs import model_config
from tests.tiny_models import save_tiny_model, tiny_config

FAMILIES = ("llama", "qwen3", "gpt2", "bloom", "gemma2", "mixtral")
DEVICES = ("cuda:0", "cuda:1", "cuda:2")
GIB = 2**30


def build(family: str, num_layers: int = 6) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(tiny_config(family, num_layers))  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_map_covers_the_model_in_order(family: str) -> None:
    model = build(family)
    device_map = auto_split_model(model, 3, devices=DEVICES, device_bytes=[GIB] * 3)
    shape = read_shape(model, 4)
    assert set(shape.first_modules) | set(shape.last_modules) < set(device_map)
    plan = plan_from_map(device_map, shape, micro_batch_size=1)
    assert plan.num_layers == 6
    assert [stage.device for stage in plan.stages] == list(DEVICES)
    # Every weight lies below a module that the map names.
    prefixes = [
        name.partition(f"{shape.layers_prefix}.")[0] or shape.layers_prefix
        if name.startswith(shape.layers_prefix)
        else name
        for name in device_map
    ]
    for name, _ in model.named_parameters():
        assert any(name.startswith(f"{prefix}.") for prefix in prefixes), name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_shape_is_the_one_that_bench_reads(family: str, tmp_path: Path) -> None:
    """One way to read a model at hand and one that is named."""
    tiny_config(family).save_pretrained(tmp_path)
    spec = ModelSpec(name=str(tmp_path), load_format="dummy")
    there = describe_model(resolve_model(spec)).model_dump()
    here = read_shape(build(family), 4).model_dump()
    for key in ("num_parameters", "layers_prefix", "embedding_bytes", "head_bytes", "tied", "vocab_size"):
        assert here[key] == there[key], key
    for key in ("first_modules", "last_modules"):
        assert set(here[key]) == set(there[key]), key
    for ours, theirs in zip(here["layers"], there["layers"], strict=True):
        assert ours["weight_bytes"] == theirs["weight_bytes"]
        assert ours["active_params"] == theirs["active_params"]
        assert ours["kv_bytes_per_token"] == theirs["kv_bytes_per_token"]


@pytest.mark.parametrize("family", ["gemma4_text", "gemma3n_text", "glm_moe_dsa", "mllama", "zamba2", "llama"])
def test_the_cuts_are_those_that_bench_allows(family: str, tmp_path: Path) -> None:
    config = model_config(family)
    config.save_pretrained(tmp_path)
    there = describe_model(resolve_model(ModelSpec(name=str(tmp_path), load_format="dummy")))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    here = read_shape(model, 4)
    assert (here.forbidden_cuts, here.embedding_on_every_stage) == (
        there.forbidden_cuts,
        there.embedding_on_every_stage,
    )
    most = here.num_layers - len(here.forbidden_cuts)
    devices = [f"cuda:{index}" for index in range(most + 1)]
    plan = plan_from_map(
        auto_split_model(model, most, devices=devices, device_bytes=[GIB] * (most + 1)), here, micro_batch_size=1
    )
    check_plan(there, plan)
    with pytest.raises(PlanError, match=f"can be cut into {most} stages|has {most} layers"):
        auto_split_model(model, most + 1, devices=devices, device_bytes=[GIB] * (most + 1))


def test_a_cap_moves_layers_to_the_larger_device() -> None:
    model = build("llama", 8)
    shape = read_shape(model, 4)
    layer = shape.layers[0].weight_bytes
    small = 2 * layer + shape.embedding_bytes + shape.head_bytes + shape.other_bytes
    device_map = auto_split_model(model, 2, 1.0, devices=DEVICES[:2], device_bytes=[small, 10 * small])
    assert plan_from_map(device_map, shape, micro_batch_size=1).stages[0].num_layers <= 2


def test_what_cannot_be_split_so_is_refused() -> None:
    model = build("llama", 4)
    with pytest.raises(PlanError, match="has 4 layers"):
        auto_split_model(model, 5)
    with pytest.raises(PlanError, match="no split"):
        auto_split_model(model, 2, devices=DEVICES[:2], device_bytes=[1000, 1000])
    with pytest.raises(PlanError, match="above 0 and up to 1"):
        auto_split_model(model, 2, 1.5)


def test_without_devices_the_machine_is_asked() -> None:
    device_map = auto_split_model(build("llama", 4), 2, ranges=True)
    assert len(set(device_map.values())) == 2
    assert "model.layers.0-1" in device_map


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_from_pretrained_takes_the_map(family: str, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / family, family, 4)
    model = AutoModelForCausalLM.from_pretrained(folder)
    device_map = auto_split_model(model, 2, devices=("cpu:0", "cpu:1"), device_bytes=[GIB] * 2)
    loaded = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    named = auto_split_model(model, 2, devices=("cuda:1", "cuda:3"), device_bytes=[GIB] * 2)
    assert set(named.values()) == {"cuda:1", "cuda:3"}
    assert named.keys() == device_map.keys()


def test_it_imports_no_torch() -> None:
    code = "import sys; from pipetune import auto_split_model; assert not {'torch', 'transformers'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
