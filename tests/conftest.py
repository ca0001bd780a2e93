"""What all tests share: hypothesis profiles, skips for what this machine lacks, and quiet offline third parties."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Generator
from functools import cache
from unittest import mock

import pytest
from hypothesis import settings

from pipetune.bench.fleet.supervisor import Supervisor

# The tests that load real models find them in the cache or build them; nothing may reach for the hub by accident.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
# Our matrices are small: BLAS threads that wait for a core beside other tests make them 50 times slower.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# Slow machines are not wrong machines: no deadline. CI draws the same examples each time.
settings.register_profile("default", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")

_SLOW = (
    "tests/bench/engines/test_host.py",
    "tests/bench/engines/test_sglang.py",
    "tests/bench/engines/test_vllm.py",
    "tests/bench/fleet/test_fleet.py",
    "tests/bench/fleet/test_hosts.py",
    "tests/bench/fleet/test_processes.py",
    "tests/bench/fleet/test_queue.py",
    "tests/bench/models/test_attention.py",
    "tests/bench/models/test_smollm2",
    "tests/bench/runtime/kernels/",
    "tests/bench/runtime/stage/test_family_caches.py",
    "tests/bench/runtime/stage/test_parts.py",
    "tests/bench/runtime/stage/test_precision.py",
    "tests/bench/runtime/test_loop.py",
    "tests/bench/runtime/test_online.py",
    "tests/bench/runtime/test_sampling.py",
    "tests/bench/runtime/test_scoring.py",
    "tests/bench/suite/",
    "tests/bench/test_pipeline.py",
    "tests/bench/worker/profiling/test_profiler.py",
    "tests/bench/worker/test_load_run.py",
    "tests/bench/worker/test_online.py",
    "tests/evaluation/",
    "tests/families/",
    "tests/rehearsal/",
    "tests/golden/test_golden.py",
    "tests/tuner/cli/test_cli.py",
    "tests/tuner/cli/test_gate.py",
    "tests/tuner/cli/test_profile.py",
    "tests/tuner/commands/test_doctor.py",
    "tests/tuner/gate/test_runners.py",
    "tests/tuner/planning/costs/test_profile_cache.py",
    "tests/tuner/search/policy/test_tpe.py",
    "tests/tuner/search/shared/test_driver.py",
    "tests/tuner/search/test_driver.py",
    "tests/tuner/search/test_runs.py",
)
"""Where tests start fleets or processes, load real models, go through many families, or search whole spaces."""


@cache
def _num_gpus() -> int:
    """GPUs that the driver names, without loading torch."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return 0
    listing = subprocess.run([tool, "--list-gpus"], capture_output=True, text=True, timeout=30, check=False)
    return sum(line.startswith("GPU ") for line in listing.stdout.splitlines())


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what starts fleets as slow, and skips `gpu` tests where no NVIDIA GPU is at hand."""
    for item in items:
        if any(item.nodeid.startswith(place) for place in _SLOW):
            item.add_marker(pytest.mark.slow)
    if not any(item.get_closest_marker("gpu") for item in items) or _num_gpus() > 0:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU on this machine"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Fails a test that starts workers and is not marked as one that does."""
    if item.get_closest_marker("slow") or item.get_closest_marker("e2e"):
        return (yield)
    with mock.patch.object(Supervisor, "start", _refuse_workers):
        return (yield)


def _refuse_workers(*_: object) -> None:
    pytest.fail("this test starts workers: mark it slow, in tests/conftest.py or by pytest.mark.slow")
