"""What the machine is said to be decides comparisons, resumes and memory caps."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipetune.bench.machine import hardware
from pipetune.bench.spec import device_kind
from tests.nvml_stub import Device, install


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


@pytest.mark.parametrize(
    ("node", "cpus", "expected"),
    [
        ("1\n", "2-3,6-7\n", (1, {2, 3, 6})),
        ("0\n", "5\n", (0, {5})),
        # CPUs that this process may not use, or none; and a kernel that knows no nodes, or no such device.
        ("1\n", "8-15\n", (1, set(range(7)))),
        ("1\n", "\n", (1, set(range(7)))),
        ("-1\n", "2-3\n", (None, set(range(7)))),
        (None, None, (None, set(range(7)))),
    ],
)
def test_a_gpus_worker_is_bound_to_the_cpus_of_its_numa_node(
    node: str | None,
    cpus: str | None,
    expected: tuple[int | None, set[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bound = set(range(7))

    def bind(pid: int, cpus: set[int]) -> None:
        bound.intersection_update(cpus)

    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(bound))
    monkeypatch.setattr(os, "sched_setaffinity", bind)
    monkeypatch.setattr(hardware, "_given", set())
    monkeypatch.setattr(hardware, "_PCI", tmp_path)
    monkeypatch.setattr(hardware, "_CGROUP_ROOT", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    install([Device("GPU-aa11"), Device("GPU-bb22", bus_id="00000000:3B:00.0")], monkeypatch.setattr)
    if node is not None and cpus is not None:
        write(tmp_path / "0000:3b:00.0" / "numa_node", node)
        write(tmp_path / "0000:3b:00.0" / "local_cpulist", cpus)
    before = hardware.read_machine()
    hardware.bind_near("cuda:0")
    assert bound == set(range(7))
    hardware.bind_near("cuda:1")
    assert bound == expected[1]
    assert [gpu.numa_node for gpu in before.hardware.gpus] == [None, expected[0]]
    # The machine is what it was, though fewer cores are this worker's.
    assert hardware.read_machine() == before


@pytest.fixture(autouse=True)
def what_was_said() -> Iterator[None]:
    """No test says of the machine what later ones would take for known."""
    yield
    hardware.warn_of_cores.cache_clear()


def cores_said(
    devices: tuple[str, ...], cores: int, affinity: int, quota: float | None, monkeypatch: pytest.MonkeyPatch
) -> tuple[str, ...]:
    """What is said of a fleet on a machine of so many cores, its process's affinity and its cgroup's quota."""
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(affinity)))
    monkeypatch.setattr(hardware, "_cgroup_cores", lambda membership, root: quota)
    hardware.warn_of_cores.cache_clear()
    return hardware.warn_of_cores(devices)


@pytest.mark.parametrize(
    ("workers", "cores", "affinity", "quota", "said"),
    [
        (2, 2, 2, None, None),
        (2, 8, 8, None, None),
        (2, 8, 8, 8.0, None),
        (2, 8, 8, 9.5, None),
        (3, 2, 2, None, "3 workers may use 2 of the machine's 2 and wait for each other; take fewer devices"),
        (2, 8, 4, None, "2 workers may use 4 of the machine's 8 (affinity)"),
        (2, 8, 8, 3.5, "2 workers may use 3.5 of the machine's 8 (a cgroup's quota)"),
        (1, 8, 4, 2.5, "1 worker may use 2.5 of the machine's 8 (affinity and a cgroup's quota)"),
        (
            2,
            2,
            2,
            1.5,
            "2 workers may use 1.5 of the machine's 2 (a cgroup's quota) and wait for each other; take fewer devices",
        ),
    ],
)
def test_cores_that_workers_lack_are_said(
    workers: int,
    cores: int,
    affinity: int,
    quota: float | None,
    said: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    devices = tuple(f"cpu:{index}" for index in range(workers))
    expected = () if said is None else (f"cores: {said}",)
    assert cores_said(devices, cores, affinity, quota, monkeypatch) == expected
    assert hardware.warn_of_cores(devices) == expected
    assert caplog.messages == [f"pipetune: {text}" for text in expected]


def test_gpus_lack_cores_only_where_their_workers_share_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cores_said(("cuda:0", "cuda:1"), 8, 4, 2.0, monkeypatch) == ()
    (said,) = cores_said(("cuda:0", "cuda:1"), 8, 8, 1.0, monkeypatch)
    assert said.startswith("cores: 2 workers may use 1 of the machine's 8 and wait")


def test_a_real_quota_of_a_cgroup_limits_the_cores_and_is_said() -> None:
    program = (
        "from pipetune.bench.machine import hardware\n"
        "print(hardware.cpu_cores(), *hardware.warn_of_cores(('cpu:0', 'cpu:1')))"
    )
    with cpu_quota(150_000) as join:
        done = subprocess.run([sys.executable, "-c", program], preexec_fn=join, text=True, capture_output=True)
    note = f"cores: 2 workers may use 1.5 of the machine's {os.cpu_count()} (a cgroup's quota) and wait for each other"
    assert done.stdout == f"1 {note}; take fewer devices\n"
    assert done.stderr == f"pipetune: {note}; take fewer devices\n"


@contextmanager
def cpu_quota(microseconds: int) -> Iterator[Callable[[], None]]:
    """What a process calls to be in a cgroup of its own, with a quota of each 100 ms; skips where none can be made."""
    folder, quota, text = Path("/sys/fs/cgroup/cpu"), "cpu.cfs_quota_us", f"{microseconds}"
    if not folder.is_dir():
        folder, quota, text = Path("/sys/fs/cgroup"), "cpu.max", f"{microseconds} 100000"
    own = folder / f"pipetune-test-{os.getpid()}"

    def join() -> None:
        (own / "cgroup.procs").write_text(str(os.getpid()))

    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("a single core is below the quota")
    try:
        own.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup can be made here: {error}")
    try:
        (own / quota).write_text(text)
        yield join
    except OSError as error:
        pytest.skip(f"no quota can be set here: {error}")
    finally:
        own.rmdir()


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
