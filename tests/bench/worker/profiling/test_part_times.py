"""Shares of a task among its parts, by stamps of a clock that is tied to the host's anew at each look."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipetune.bench.models.resolve import resolve_model
from pipetune.bench.runtime.device import DeviceContext
from pipetune.bench.runtime.job import Job
from pipetune.bench.runtime.kernels.graphs import DecodeGraphs
from pipetune.bench.runtime.loop import StageLoop, Status
from pipetune.bench.runtime.stage.stage import Stage
from pipetune.bench.spec import ModelSpec
from pipetune.bench.worker.profiling.part_times import PartStamps
from tests.tiny_models import save_tiny_model, tiny_prompts


class Drifting:
    """A clock that is off by one more second at each look."""

    def __init__(self) -> None:
        self.looks = 0

    def stamp(self) -> float:
        return 0.0

    def resolve(self, stamps: list[float]) -> list[float]:
        self.looks += 1
        return [stamp + self.looks - 1 for stamp in stamps]


def test_begins_and_ends_are_resolved_at_one_look() -> None:
    stage: Any = SimpleNamespace(own_layers=range(2))
    stamps = PartStamps(stage, Drifting())
    stamps._calls = [("embedding", 0.0, 0.1), (0, 0.1, 0.4), (1, 0.4, 0.6)]
    (shares,) = stamps.shares([(0.0, 1.0)])
    expected = {"embedding": 0.1, 0: 0.3, 1: 0.2, "head": 0.4, "overhead": 0.0}
    assert shares == pytest.approx(expected)


@pytest.mark.gpu
def test_a_captured_step_is_stamped_at_each_replay(tmp_path: Path) -> None:
    gpu = DeviceContext("cuda:0", num_threads=1)
    stage = Stage(resolve_model(ModelSpec(name=str(save_tiny_model(tmp_path / "llama", "llama")))), gpu.torch_device)
    stage.assign(0, 6, is_first=True, is_last=True)
    loop = StageLoop(stage, gpu, Status(), graphs=DecodeGraphs(stage, gpu))
    job = Job(prompts=tiny_prompts(2), output_len=9, micro_batch_size=2, prefill_size=2, in_flight=1, pad_token_id=0)
    with PartStamps(stage, gpu.clock()) as stamps:
        for _ in range(2):
            loop.prepare(job)
            timeline = loop.run(job).timeline
            prefill, first, *_, last = stamps.shares(
                list(zip(timeline.compute_start_s, timeline.compute_end_s, strict=True))
            )
            for shares in (prefill, last):
                assert sum(shares.values()) == pytest.approx(1.0, abs=0.05)
                assert all(0.0 < shares[layer] < 1.0 for layer in range(6))
                assert shares["head"] > 0.0
            # The same graph ran eight times, and its events tell of the last alone.
            assert all(first[layer] == 0.0 for layer in range(6))
    loop.close()
