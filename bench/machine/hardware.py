"""The machine: its devices, how much memory and how many cores each may use, and what hardware and software it is.

Loads no torch, so that a driver may ask; NVML and the kernel's files say it all.
"""

import contextlib
import functools
import importlib.metadata
import logging
import os
import platform
import re
import socket
import subprocess
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pynvml

from pipetune.bench.machine.nvml import read, visible_gpus
from pipetune.bench.record import GpuInfo, Hardware, Machine, Software
from pipetune.bench.spec import device_index, device_kind, devices_here

PACKAGES = ("torch", "transformers", "accelerate", "optuna", "numpy", "pydantic", "safetensors", "tokenizers")
_GIB = 2**30
_CGROUP_ROOT = Path("/sys/fs/cgroup")
_PCI = Path("/sys/bus/pci/devices")
_given: set[int] = set()
"""CPUs that this process might use before it was bound to some of them."""
_TOPOLOGY = {
    pynvml.NVML_TOPOLOGY_INTERNAL: "PSB",
    pynvml.NVML_TOPOLOGY_SINGLE: "PIX",
    pynvml.NVML_TOPOLOGY_MULTIPLE: "PXB",
    pynvml.NVML_TOPOLOGY_HOSTBRIDGE: "PHB",
    pynvml.NVML_TOPOLOGY_NODE: "NODE",
    pynvml.NVML_TOPOLOGY_SYSTEM: "SYS",
}
"""What `nvidia-smi topo -m` calls the nearest common ancestor of two GPUs."""


def read_machine() -> Machine:
    """Everything a record says of the machine it was made on."""
    named = re.search(r"^model name\s*:(.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    with visible_gpus() as gpus:
        hardware = Hardware(
            cpu_model=named[1].strip() if named else platform.processor() or platform.machine(),
            cpu_cores=cpu_cores(),
            memory_bytes=host_memory_bytes() // _GIB * _GIB,
            gpus=tuple(_gpu_info(handle) for handle in gpus.values()),
            links=tuple(f"{a}-{b}:{_link(gpus[a], gpus[b])}" for a, b in combinations(sorted(gpus), 2)),
        )
        driver = read(pynvml.nvmlSystemGetDriverVersion) or None
    return Machine(
        hostname=socket.gethostname(),
        hardware_id=hardware.hardware_id,
        hardware=hardware,
        software=Software(
            python=platform.python_version(),
            packages={name: version for name in PACKAGES if (version := _version(name))},
            driver=driver,
            # The CUDA build of torch brings the runtime as packages of their own, under names with and without suffix.
            cuda=_version("nvidia-cuda-runtime", "nvidia-cuda-runtime-cu13", "nvidia-cuda-runtime-cu12"),
            nccl=_version("nvidia-nccl-cu13", "nvidia-nccl-cu12"),
            os=platform.platform(),
            git_revision=git_revision(Path(__file__).resolve().parents[2]),
            pipetune=_version("pipetune") or "not installed",
        ),
    )


def available_devices() -> tuple[str, ...]:
    """All GPUs that CUDA would show; without any, two CPU workers, or one where there is but one core."""
    with visible_gpus() as found:
        gpus = tuple(f"cuda:{index}" for index in found)
    return gpus or (("cpu:0", "cpu:1") if cpu_cores() >= 2 else ("cpu:0",))


def device_bytes(devices: Sequence[str]) -> dict[str, int]:
    """Memory of each device: a GPU's, or an even share of it where several workers share the GPU; of the host's, limits
    of the cgroup respected, an even share per `cpu:N`. ValueError for a GPU that is not there, or does not tell."""
    num_cpus = sum(device_kind(device) == "cpu" for device in devices)
    with visible_gpus() as gpus:
        sizes = {}
        for device in devices:
            if device_kind(device) == "cpu":
                sizes[device] = host_memory_bytes() // num_cpus
            elif device_index(device) not in gpus:
                there = ", ".join(f"cuda:{index}" for index in gpus) or "no GPU"
                raise ValueError(f"devices: {device} is not on this machine; CUDA shows {there}")
            elif (memory := read(pynvml.nvmlDeviceGetMemoryInfo, gpus[device_index(device)])) is None:
                raise ValueError(f"devices: the memory of {device} is not known: NVML does not tell")
            else:
                sizes[device] = int(memory.total) // list(devices).count(device)
    return sizes


def cpu_cores() -> int:
    """Cores this process may use: its affinity and the cgroup's quota, whichever is less; at least 1."""
    return max(1, int(min(_core_limits().values())))


@functools.cache
def warn_of_cores(devices: tuple[str, ...]) -> tuple[str, ...]:
    """Logs, once, what spoils the times of a fleet of these devices: cores that its workers share or may not have. It
    is returned as a note; none where every worker has a core, and CPU workers have all of the machine's."""
    devices = devices_here(devices)
    limits, there, count = _core_limits(), os.cpu_count() or 1, len(devices)
    less = [name for name, cores in limits.items() if cores < there and "cpu" in map(device_kind, devices)]
    if not less and count <= cpu_cores():
        return ()
    note = f"cores: {count} worker{'s' if count > 1 else ''} may use {min(limits.values()):g} of the machine's {there}"
    note += f" ({' and '.join(less)})" if less else ""
    note += " and wait for each other; take fewer devices" if count > cpu_cores() else ""
    # By default Python prints it on stderr.
    logging.getLogger("pipetune").warning("pipetune: %s", note)
    return (note,)


def cores_of(device: str, devices: Sequence[str]) -> int:
    """Cores for one of a fleet's workers: an equal share, at least 1; the rest stays free for gloo's threads."""
    assert device in devices, f"{device} is not one of {devices}"
    return max(1, cpu_cores() // len(devices))


def bind_near(device: str) -> None:
    """Binds this thread, and those that it starts from now on, to the CPUs of a GPU's NUMA node that it may use. Memory
    that they touch first then lies there, too. Nothing changes where no node or none of its CPUs is known."""
    with visible_gpus() as gpus:
        _, cpus = _near(gpus.get(device_index(device)))
    allowed = os.sched_getaffinity(0)
    if cpus & allowed:
        _given.update(allowed)
        os.sched_setaffinity(0, cpus & allowed)


def _near(gpu: Any) -> tuple[int | None, set[int]]:
    """A GPU's NUMA node and the CPUs there; None and none where the kernel does not tell."""
    whole = read(pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle, gpu)
    found = read(pynvml.nvmlDeviceGetPciInfo, gpu if whole is None else whole)
    domain, _, place = getattr(found, "busId", "").lower().partition(":")
    # NVML writes eight digits of the domain, the kernel four.
    folder = _PCI / f"{int(domain or '0', 16):04x}:{place}"
    node = int([*_words(folder / "numa_node"), "-1"][0])
    spans = [span.split("-") for word in _words(folder / "local_cpulist") for span in word.split(",")]
    cpus = {cpu for span in spans for cpu in range(int(span[0]), int(span[-1]) + 1)}
    return (node, cpus) if node >= 0 else (None, set())


def _core_limits() -> dict[str, float]:
    """Cores that this process may use, by what sets them."""
    quota = _cgroup_cores(Path("/proc/self/cgroup").read_text(), _CGROUP_ROOT)
    return {"affinity": len(_given or os.sched_getaffinity(0))} | ({} if quota is None else {"a cgroup's quota": quota})


def host_memory_bytes() -> int:
    """Memory this process may use: the host's or the cgroup's limit, whichever is less."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _cgroup_memory(Path("/proc/self/cgroup").read_text(), _CGROUP_ROOT)
    return total if limit is None else min(total, limit)


def git_revision(folder: Path) -> str | None:
    """Commit of the checkout whose root `folder` is, with `-dirty` behind it where files were changed; else None."""
    env = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}

    def run(*command: str) -> str:
        git = ["git", "-C", str(folder), *command]
        return subprocess.check_output(git, stderr=subprocess.DEVNULL, text=True, timeout=10, env=env).strip()

    try:
        # pipetune may be installed somewhere inside a repository that is not its own.
        if Path(run("rev-parse", "--show-toplevel")).resolve() != folder.resolve():
            return None
        revision = run("rev-parse", "HEAD")
        return f"{revision}-dirty" if run("status", "--porcelain", "--untracked-files=no") else revision
    except (OSError, subprocess.SubprocessError):
        return None


def _gpu_info(handle: Any) -> GpuInfo:
    capability = read(pynvml.nvmlDeviceGetCudaComputeCapability, handle)
    memory = read(pynvml.nvmlDeviceGetMemoryInfo, handle)
    return GpuInfo(
        name=read(pynvml.nvmlDeviceGetName, handle) or "not known",
        memory_bytes=None if memory is None else int(memory.total),
        uuid=read(pynvml.nvmlDeviceGetUUID, handle) or "",
        compute_capability=None if capability is None else f"{capability[0]}.{capability[1]}",
        numa_node=_near(handle)[0],
    )


def _link(one: Any, other: Any) -> str:
    """`NV<n>` for n NVLinks (direct or through a switch), else the topology, and `+p2p` where copies may go direct."""
    if read(pynvml.nvmlDeviceGetP2PStatus, one, other, pynvml.NVML_P2P_CAPS_INDEX_NVLINK) == pynvml.NVML_P2P_STATUS_OK:
        return f"NV{_num_nvlinks(one, other)}"
    level = _TOPOLOGY.get(read(pynvml.nvmlDeviceGetTopologyCommonAncestor, one, other), "not known")
    direct = read(pynvml.nvmlDeviceGetP2PStatus, one, other, pynvml.NVML_P2P_CAPS_INDEX_READ)
    return f"{level}+p2p" if direct == pynvml.NVML_P2P_STATUS_OK else level


def _num_nvlinks(one: Any, other: Any) -> int:
    """Active links from one GPU to the other, or all its active links where they end at a switch."""
    target = getattr(read(pynvml.nvmlDeviceGetPciInfo, other), "busId", "")
    ends = [
        getattr(read(pynvml.nvmlDeviceGetNvLinkRemotePciInfo, one, link), "busId", "")
        for link in range(pynvml.NVML_NVLINK_MAX_LINKS)
        if read(pynvml.nvmlDeviceGetNvLinkState, one, link) == pynvml.NVML_FEATURE_ENABLED
    ]
    return ends.count(target) or len(ends)


def _version(*packages: str) -> str | None:
    """Version of the first of some packages that is installed."""
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(package)
    return None


def _cgroup_cores(membership: str, root: Path) -> float | None:
    """The tightest CPU quota, in cores, of a process's cgroup (`/proc/<pid>/cgroup`) and those above; None without."""
    quotas = []
    for folder in _cgroup_folders(membership, root, controller="cpu"):
        # Version 2 has "<quota or max> <period>" in one file, version 1 a file for each.
        values = _words(folder / "cpu.max")
        values = values or [*_words(folder / "cpu.cfs_quota_us"), *_words(folder / "cpu.cfs_period_us")]
        if len(values) == 2 and values[0].isdecimal() and int(values[1]) > 0:
            quotas.append(int(values[0]) / int(values[1]))
    return min(quotas, default=None)


def _cgroup_memory(membership: str, root: Path) -> int | None:
    """The tightest memory limit, in bytes, of a process's cgroup and those above it; None without one."""
    names = ("memory.max", "memory.limit_in_bytes")
    files = [folder / name for folder in _cgroup_folders(membership, root, controller="memory") for name in names]
    return min((int(word) for file in files for word in _words(file) if word.isdecimal()), default=None)


def _cgroup_folders(membership: str, root: Path, *, controller: str) -> list[Path]:
    """Folders, from a process's own cgroup up to the mount, that may hold a controller's files."""
    folders = []
    for line in membership.splitlines():
        _, names, path = line.split(":", 2)
        mounts = [root, root / "unified"] if not names else [root / names] if controller in names.split(",") else []
        for mount in mounts:
            # In a container the path may be the host's, and not exist below the mount; the mount itself then counts.
            own = mount / path.lstrip("/")
            folders += [folder for folder in (own, *own.parents) if folder.is_relative_to(mount) and folder.is_dir()]
    return folders


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []
