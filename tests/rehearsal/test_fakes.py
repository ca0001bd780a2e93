"""What a stage does on a GPU without padding: nothing waits for the host, nothing is copied from pageable memory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipetune.bench.models.describe import describe_model
from pipetune.bench.models.resolve import resolve_model
from pipetune.bench.runtime.kernels.static_step import StaticStep, StepKey
from pipetune.bench.spec import ModelSpec, Sampling
from tests.families.configs import FAMILIES as ALL_FAMILIES
from tests.families.configs import tiny_config
from tests.rehearsal.conftest import IS_WHOLE, ROOT
from tests.rehearsal.fakes import CUDA, FakeGpu, Watch
from tests.rehearsal.survey import SHAPES, read_verdicts, survey_family, survey_shape

FAMILIES = ("llama", "gpt2", "gemma2", "opt", *(("qwen3", "bloom", "phi3", "gpt_oss") if IS_WHOLE else ()))


def watched(work: Callable[[], object]) -> Watch:
    watch = Watch()
    with watch:
        work()
    return watch


@pytest.mark.parametrize("family", FAMILIES)
def test_no_pass_waits_for_the_host_or_copies_pageable_memory(family: str, tmp_path: Path) -> None:
    tiny_config(family).save_pretrained(tmp_path)
    resolved = resolve_model(ModelSpec(name=str(tmp_path), dtype="bfloat16", load_format="dummy"))
    gpu, num_layers = FakeGpu(), describe_model(resolved).num_layers
    stage = gpu.stage(resolved, 0, num_layers, num_layers)
    slot = stage.new_cache(rows=3, max_len=32)
    with gpu.running():
        ids = torch.ones((3, 16), dtype=torch.long, device=CUDA)
        slot.seek(0, 3, 0)
        seen = {"prefill": watched(lambda: stage.forward(ids, None, ids, slot, None))}
        slot.seek(0, 3, 16)
        seen["decode"] = watched(lambda: stage.forward(ids[:, :1], None, ids[:, :1], slot, None))
        step = StaticStep(stage, slot, StepKey(0, 3, 32))
        seen["captured"] = watched(step.forward)
        logits = torch.empty((3, 20_000), dtype=torch.bfloat16, device=CUDA)
        for sampling in (Sampling(), Sampling(top_k=9, top_p=0.8), Sampling(top_p=0.8)):
            seen[str(sampling)] = watched(functools.partial(step.choose, logits, sampling))
    assert all(watch.operations > 8 and watch.live.peak > 0 for watch in seen.values())
    assert {name: dict(watch.syncs + watch.copies) for name, watch in seen.items()} == {name: {} for name in seen}


@pytest.mark.parametrize("family", ALL_FAMILIES if IS_WHOLE else ("phimoe", "mixtral"))
def test_a_family_is_captured_or_known_as_not(family: str) -> None:
    found = survey_family(family, memory=False)
    listed = read_verdicts((ROOT / "docs" / "gpus.md").read_text(encoding="utf-8"))
    assert found.verdict == listed[family], found.reason


@pytest.mark.parametrize("name", SHAPES if IS_WHOLE else ("Llama 3 8B", "Mixtral 8x7B"))
def test_real_shapes_take_what_was_predicted_and_no_more(name: str, tmp_path: Path) -> None:
    predicted, peak = survey_shape(name, tmp_path)
    assert peak <= predicted <= 1.15 * peak


def test_what_waits_for_the_host_is_seen() -> None:
    gpu = FakeGpu()
    with gpu.running():
        ones = torch.ones(3, device=CUDA)
        assert watched(lambda: bool(ones.sum() > 0)).syncs
        assert watched(lambda: ones.cpu()).syncs
        assert watched(lambda: torch.ones(3).to(CUDA)).copies
