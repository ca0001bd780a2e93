"""Attention kernels that cannot work are refused with a way out, before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from pipetune.bench.errors import ModelError
from pipetune.bench.fleet.fleet import Fleet
from pipetune.bench.models import attention
from pipetune.bench.models.attention import check_attention_devices
from pipetune.bench.models.describe import build_on_meta, describe_model
from pipetune.bench.models.resolve import ResolvedModel, resolve_model
from pipetune.bench.spec import ModelSpec
from tests.tiny_models import tiny_config

FLASH = ["flash_attention_2", "flash_attention_3"]


def resolved(folder: Path, family: str, **spec: Any) -> ResolvedModel:
    tiny_config(family).save_pretrained(folder)
    return resolve_model(ModelSpec(name=str(folder), load_format="dummy", **spec))


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = {name: (lambda: True, package) for name, (_, package) in attention._FLASH.items()}
    monkeypatch.setattr(attention, "_FLASH", kernels)


@pytest.mark.parametrize("kernel", FLASH)
@pytest.mark.skipif(torch.cuda.is_available(), reason="they may be installed here")
def test_a_kernel_that_is_not_installed_is_refused(kernel: str, tmp_path: Path) -> None:
    model = resolved(tmp_path, "llama", attention=kernel, dtype="bfloat16")
    with pytest.raises(ModelError, match=rf"{kernel}.*flash-attn.*not installed.*choose sdpa or auto"):
        describe_model(model)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("kernel", FLASH)
def test_flash_kernels_compute_in_half_precision(kernel: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="bfloat16 and float16 alone"):
        describe_model(resolved(tmp_path, "llama", attention=kernel))


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("kernel", FLASH)
def test_a_family_without_a_kernel_is_named(kernel: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"BloomForCausalLM does not support it; choose eager, or auto"):
        describe_model(resolved(tmp_path, "bloom", attention=kernel, dtype="bfloat16"))


def test_sdpa_is_refused_where_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"sdpa: BloomForCausalLM has none; choose eager or auto"):
        describe_model(resolved(tmp_path, "bloom", attention="sdpa"))


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_a_kernel_that_is_there_is_taken(kernel: str, tmp_path: Path) -> None:
    config: Any = build_on_meta(resolved(tmp_path, "llama", attention=kernel)).config
    assert isinstance(config, LlamaConfig)
    assert config._attn_implementation == kernel


def test_a_cpu_worker_cannot_run_flash_kernels(tmp_path: Path) -> None:
    check_attention_devices(ModelSpec(name="m", attention="flash_attention_2"), ("cuda:0", "cuda:1"))
    check_attention_devices(ModelSpec(name="m", attention="sdpa"), ("cuda:0", "cpu:0"))
    tiny_config("llama").save_pretrained(tmp_path)
    spec = ModelSpec(name=str(tmp_path), load_format="dummy", attention="flash_attention_2", dtype="bfloat16")
    with pytest.raises(ModelError, match=r"GPUs alone, and cpu:0 is none"):
        Fleet.start(spec, ("cpu:0", "cpu:1"))
