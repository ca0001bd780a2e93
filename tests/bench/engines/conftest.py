"""An engine over a fake host, and a fleet that only describes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from pipetune.bench.engines import vllm
from pipetune.bench.engines.sglang import ENGINES
from pipetune.bench.engines.vllm import VllmEngine
from pipetune.bench.record import Failure
from pipetune.bench.spec import EngineName, ModelSpec, Plan, Protocol, Workload
from tests.bench.engines import fake_host
from tests.tuner.fake_fleet import FakeFleet, Lab

WORKLOAD = Workload(num_prompts=5, input_len=8, output_len=4)
PROTOCOL = Protocol(num_iters=2, num_iters_warmup=1, hang_timeout_s=1.0, timeout_s=20.0)


def make_plan(counts: tuple[int, ...] = (16, 14), replicas: int = 1, **settings: Any) -> Plan:
    """A plan over the first devices, of vLLM's unless the settings name another."""
    width, kind = settings.get("tensor_parallel_size", 1), next(iter(ENGINES[settings.get("name", "vllm")].NOTES))
    devices = tuple(f"{kind}:{width * place}" for place in range(len(counts) * replicas))
    given = {"max_num_batched_tokens": 256, "max_num_seqs": 64, "kv_cache_memory_bytes": "64MiB", **settings}
    plan = Plan.from_layer_counts(counts, devices, 1, replicas=replicas)
    return Plan.model_validate(plan.model_dump() | {"engine": given})


class Describer(FakeFleet):
    """Knows the model and its prompts, and makes a reference that the fake host agrees with."""

    folder = Path("models/a")

    def prompts(self, workload: Workload, *, as_text: bool = False) -> tuple[tuple[int, ...], ...]:
        return tuple((index + 1,) * workload.input_len for index in range(workload.num_prompts))

    def make_reference(self, path: Path, workload: Workload, protocol: Protocol) -> Failure | None:
        prompts = self.prompts(workload)
        rows = [[fake_host.right(list(one), place) for place in range(workload.output_len)] for one in prompts]
        tokens = np.array(rows, dtype=np.int64)
        logits = np.zeros((2, 3, fake_host.VOCAB), dtype=np.float32)
        np.put_along_axis(logits, tokens[[0, 4], :3, None], fake_host.RISE, axis=-1)
        arrays: dict[str, Any] = {
            "tokens": tokens,
            "margins": np.full(tokens.shape, fake_host.RISE, dtype=np.float32),
            "checked": np.array([0, 4]),
            "logits": logits,
        }
        metadata = {"source": "unsplit", "workload_digest": "d", "spread": "1e-4", "typical": "5e-5"}
        save_file(arrays, path, metadata=metadata)
        return None

    def use_reference(self, path: Path, workload: Workload) -> None:
        assert path.is_file()


def describe(model: ModelSpec, devices: Sequence[str], **options: Any) -> Any:
    return Describer(Lab(), model, devices)


Make = Callable[..., VllmEngine]


@pytest.fixture
def told(tmp_path: Path) -> Callable[[], list[dict[str, Any]]]:
    """What the fake hosts were commanded so far."""
    path = tmp_path / "told"
    path.touch()
    return lambda: [json.loads(line) for line in path.read_text().splitlines()]


def fake_python(path: Path) -> Path:
    """What is started as an engine's Python, and runs the fake host whatever script it is told."""
    path.write_text(f'#!/bin/sh\nexec {sys.executable} {fake_host.__file__} "$2"\n', encoding="utf-8")
    path.chmod(0o755)
    return path


@pytest.fixture
def make_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Starts engines over fake hosts of some behaviour."""
    engines: list[VllmEngine] = []

    def make(
        devices: int = 4,
        *,
        reference: bool = True,
        name: EngineName = "vllm",
        script: Path | None = None,
        **options: Any,
    ) -> VllmEngine:
        kind, versions = ENGINES[name], {name: "0.5.23" if name == "sglang" else "0.32.0", "torch": "2"}
        monkeypatch.setenv("FAKE_HOST", json.dumps({"told": str(tmp_path / "told"), "versions": versions, **options}))
        device = next(iter(kind.NOTES))
        if device == "cuda":
            monkeypatch.setattr(vllm, "device_bytes", lambda names: dict.fromkeys(names, 2**36))
        engine = kind(
            ModelSpec(name="m"),
            [f"{device}:{index}" for index in range(devices)],
            python=Path(sys.executable),
            script=script or Path(fake_host.__file__),
            start_fleet=describe,
            log_dir=tmp_path / "logs",
            hang_timeout_s=PROTOCOL.hang_timeout_s,
        )
        engines.append(engine)
        if reference:
            assert engine.make_reference(tmp_path / "reference.safetensors", WORKLOAD, PROTOCOL) is None
        return engine

    yield make
    for engine in engines:
        engine.close()
