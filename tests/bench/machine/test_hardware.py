"""What the machine is said to be decides comparisons, resumes and memory caps."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipetune.bench.machine import hardware
from pipetune.bench.spec import device_kind


def test_no_torch_is_loaded_to_ask_for_the_machine() -> None:
    program = (
        "import sys, pipetune.bench.machine.hardware, pipetune.bench.machine.telemetry\n"
        "pipetune.bench.machine.hardware.read_machine(), pipetune.bench.machine.hardware.available_devices()\n"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_machine_is_the_same_each_time() -> None:
    first, again = hardware.read_machine(), hardware.read_machine()
    assert first == again
    assert first.hardware_id == first.hardware.hardware_id
    assert first.hardware.cpu_model
    assert first.hardware.cpu_cores >= 1
    assert first.hardware.memory_bytes % 2**30 == 0
    assert {"torch", "transformers", "numpy"} <= set(first.software.packages)


@pytest.mark.gpu
def test_gpus_are_those_that_cuda_shows() -> None:
    import torch

    seen = hardware.read_machine().hardware
    assert len(seen.gpus) == torch.cuda.device_count()
    for index, gpu in enumerate(seen.gpus):
        properties = torch.cuda.get_device_properties(index)
        assert gpu.uuid == f"GPU-{properties.uuid}"
        assert gpu.compute_capability == f"{properties.major}.{properties.minor}"
    assert len(seen.links) == len(seen.gpus) * (len(seen.gpus) - 1) // 2
    assert hardware.available_devices() == tuple(f"cuda:{index}" for index in range(len(seen.gpus)))
    assert hardware.device_bytes(["cuda:0"])["cuda:0"] == seen.gpus[0].memory_bytes


def test_available_devices_can_be_used_as_they_are() -> None:
    devices = hardware.available_devices()
    assert set(hardware.device_bytes(devices)) == set(devices)
    if device_kind(devices[0]) == "cpu":
        assert devices == (("cpu:0", "cpu:1") if hardware.cpu_cores() >= 2 else ("cpu:0",))


def test_cpu_workers_share_memory_and_cores_evenly() -> None:
    devices = ["cpu:0", "cpu:1", "cpu:2"]
    assert set(hardware.device_bytes(devices).values()) == {hardware.host_memory_bytes() // 3}
    shares = [hardware.cores_of(device, devices) for device in devices]
    assert shares == [max(1, hardware.cpu_cores() // 3)] * 3


def test_a_gpu_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match="cuda:99 is not on this machine"):
        hardware.device_bytes(["cuda:99"])


def test_affinity_limits_the_cores() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert hardware.cpu_cores() == 1
    finally:
        os.sched_setaffinity(0, before)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_cgroup_limits_version_2(tmp_path: Path) -> None:
    write(tmp_path / "a" / "cpu.max", "350000 100000\n")
    write(tmp_path / "a" / "b" / "cpu.max", "max 100000\n")
    write(tmp_path / "a" / "memory.max", "max\n")
    write(tmp_path / "a" / "b" / "memory.max", "1048576\n")
    assert hardware._cgroup_cores("0::/a/b\n", tmp_path) == 3.5
    assert hardware._cgroup_memory("0::/a/b\n", tmp_path) == 1048576


def test_cgroup_limits_version_1(tmp_path: Path) -> None:
    membership = "5:cpu,cpuacct:/job\n4:memory:/job\n2:freezer:/\n"
    write(tmp_path / "cpu,cpuacct" / "job" / "cpu.cfs_quota_us", "-1\n")
    write(tmp_path / "cpu,cpuacct" / "job" / "cpu.cfs_period_us", "100000\n")
    write(tmp_path / "cpu,cpuacct" / "cpu.cfs_quota_us", "200000\n")
    write(tmp_path / "cpu,cpuacct" / "cpu.cfs_period_us", "100000\n")
    write(tmp_path / "memory" / "job" / "memory.limit_in_bytes", "4096\n")
    assert hardware._cgroup_cores(membership, tmp_path) == 2.0
    assert hardware._cgroup_memory(membership, tmp_path) == 4096


def test_cgroup_of_a_container_counts_from_its_mount(tmp_path: Path) -> None:
    # The path is the host's, and only its content is mounted here.
    write(tmp_path / "cpu.max", "100000 100000\n")
    write(tmp_path / "memory.max", "512\n")
    assert hardware._cgroup_cores("0::/docker/0123\n", tmp_path) == 1.0
    assert hardware._cgroup_memory("0::/docker/0123\n", tmp_path) == 512


def test_no_cgroup_means_no_limit(tmp_path: Path) -> None:
    assert hardware._cgroup_cores("0::/\n", tmp_path) is None
    assert hardware._cgroup_memory("", tmp_path) is None


def git(folder: Path, *command: str) -> str:
    who = ["-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
    result = subprocess.run(["git", "-C", str(folder), *who, *command], check=True, capture_output=True, text=True)
    return result.stdout.strip()


def test_git_revision_of_a_checkout(tmp_path: Path) -> None:
    assert hardware.git_revision(tmp_path) is None
    git(tmp_path, "init", "-q")
    write(tmp_path / "package" / "file", "one")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "one")
    revision = git(tmp_path, "rev-parse", "HEAD")
    assert hardware.git_revision(tmp_path) == revision
    write(tmp_path / "package" / "file", "two")
    assert hardware.git_revision(tmp_path) == f"{revision}-dirty"
    # Installed inside somebody else's repository.
    assert hardware.git_revision(tmp_path / "package") is None


def test_git_revision_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert hardware.git_revision(tmp_path) is None
