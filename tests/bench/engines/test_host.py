"""The real host and its guard over a stand-in for vLLM: who ends with whom, what stays, and what the probe asks for."""

from __future__ import annotations

import ast
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from pipetune.bench.engines.host import COMMON, EngineHost
from pipetune.bench.engines.sglang import SglangEngine
from pipetune.bench.engines.vllm import VllmEngine
from pipetune.bench.errors import FleetError
from pipetune.bench.record import FailureKind
from tests.bench.engines.conftest import make_plan

STAND_IN = """
import multiprocessing, os, subprocess, sys, time, types
from multiprocessing.shared_memory import SharedMemory

WORKER = '''
import os, sys, time
from multiprocessing.shared_memory import SharedMemory
held = SharedMemory(sys.argv[1])
time.sleep(60)
'''

class LLM:
    def __init__(self, **settings):
        self.shared = SharedMemory(create=True, size=4096)
        worker = subprocess.Popen([sys.executable, "-c", WORKER, self.shared.name])
        self.lock = multiprocessing.get_context("spawn").Lock()
        print("shared", self.shared.name, f"sem.{self.lock._semlock.name[1:]}", file=sys.stderr, flush=True)
        if os.environ.get("STUCK"):
            time.sleep(60)
        proc = types.SimpleNamespace(exitcode=None)
        executor = types.SimpleNamespace(workers=[types.SimpleNamespace(proc=proc)])
        scheduler = types.SimpleNamespace(max_num_batched_tokens=8, max_num_seqs=4)
        config = types.SimpleNamespace(scheduler_config=scheduler)
        core = types.SimpleNamespace(model_executor=executor, scheduler=scheduler)
        self.llm_engine = types.SimpleNamespace(
            vllm_config=config, engine_core=types.SimpleNamespace(engine_core=core)
        )

    def collective_rpc(self, name, args=()):
        return [{"stage": 0}]
"""
DRIVER = """
import sys, time
from pathlib import Path
from pipetune.bench.engines.host import EngineHost
from tests.bench.engines.conftest import make_plan

log = Path(sys.argv[2])
host = EngineHost(Path(sys.executable), Path(sys.argv[1]), log=log, environment={}, hang_timeout_s=5.0)
host.send("start", "start", make_plan(), layers=[16, 14])
print(host.hello["hello"], flush=True)
time.sleep(60)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """The host's files beside something that stands in for vLLM."""
    folder = tmp_path / "host"
    shutil.copytree(VllmEngine.HOST.parent, folder)
    (folder / "vllm.py").write_text(STAND_IN)
    return folder / VllmEngine.HOST.name


@pytest.fixture
def start(script: Path, tmp_path: Path) -> Iterator[Callable[[], EngineHost]]:
    hosts: list[EngineHost] = []

    def begin() -> EngineHost:
        python = Path(sys.executable)
        hosts.append(EngineHost(python, script, log=tmp_path / "log", environment={}, hang_timeout_s=5.0))
        return hosts[-1]

    yield begin
    for host in hosts:
        host.close()


def session(leader: int) -> list[int]:
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except (psutil.NoSuchProcess, ProcessLookupError):
            continue
    return found


def wait_until(done: Callable[[], bool], seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while not (was := done()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return was


def shared_of(log: Path) -> list[Path]:
    names = [name for line in log.read_text().splitlines() if line.startswith("shared ") for name in line.split()[1:]]
    return [Path("/dev/shm") / name for name in names]


def folders() -> set[Path]:
    return {*Path("/tmp").glob("pipetune-engine-*")}


@pytest.mark.parametrize("stuck", ["1", ""])
def test_with_a_killed_driver_all_processes_and_files_go(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stuck: str
) -> None:
    monkeypatch.setenv("STUCK", stuck)
    before, log = folders(), tmp_path / "log"
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, script, log],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
    )
    assert driver.stdout is not None
    with driver.stdout:
        host = int(driver.stdout.readline())
    assert wait_until(lambda: log.exists() and len(shared_of(log)) == 2 and len(session(host)) >= 2)
    shared = shared_of(log)
    assert all(file.exists() for file in shared)
    assert len(folders() - before) == 1
    driver.kill()
    driver.wait()
    assert wait_until(
        lambda: not session(host) and not any(file.exists() for file in shared) and folders() == before, 2.0
    )


def test_a_killed_host_takes_its_workers_along_and_is_told_of(start: Callable[[], EngineHost]) -> None:
    host = start()
    leader = host.hello["hello"]
    host.send("start", "start", make_plan(), layers=[16, 14])
    host.receive(time.monotonic() + 20)
    assert len(session(leader)) >= 2
    os.kill(leader, signal.SIGKILL)
    with pytest.raises(FleetError, match="the engine's host: was killed by SIGKILL during start") as caught:
        host.receive(time.monotonic() + 20)
    assert caught.value.failure.kind is FailureKind.WORKER_DIED
    assert session(leader) == []


def test_a_closed_host_leaves_nothing(start: Callable[[], EngineHost], tmp_path: Path) -> None:
    host = start()
    host.send("start", "start", make_plan(), layers=[16, 14])
    assert host.receive(time.monotonic() + 20)["max_num_seqs"] == 4
    host.close()
    assert session(host.hello["hello"]) == []
    assert [file for file in shared_of(tmp_path / "log") if file.exists()] == []


def test_what_vllm_has_no_more_is_named(start: Callable[[], EngineHost]) -> None:
    host = start()
    host.send("start", "start", make_plan(), layers=[16, 14])
    host.receive(time.monotonic() + 20)
    host.send("limits", "load", make_plan(), max_num_batched_tokens=4, max_num_seqs=2)
    with pytest.raises(FleetError, match=r"has no SimpleNamespace\.max_num_running_reqs, which the probe needs"):
        host.receive(time.monotonic() + 20)


def test_a_stopped_host_is_hung(script: Path, tmp_path: Path) -> None:
    host = EngineHost(Path(sys.executable), script, log=None, environment={}, hang_timeout_s=1.0)
    os.kill(host.hello["hello"], signal.SIGSTOP)
    host.send("limits", "load", make_plan(), max_num_batched_tokens=4, max_num_seqs=2)
    with pytest.raises(FleetError, match="no sign of life for 1 s during load") as caught:
        host.receive(time.monotonic() + 20)
    assert caught.value.failure.kind is FailureKind.WORKER_HUNG
    assert session(host.hello["hello"]) == []


@pytest.mark.parametrize("engine", [VllmEngine, SglangEngine])
def test_the_host_imports_nothing_that_the_engines_environment_lacks(engine: type[VllmEngine]) -> None:
    imported = set()
    for path in (*engine.HOST.parent.glob("*.py"), *COMMON.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").partition(".")[0])
    others = {"vllm": {"pipetune_vllm_probe", "pipetune_vllm_served", "torch"}, "sglang": set[str]()}[engine.NAME]
    assert imported - sys.stdlib_module_names == {"pipetune_host", engine.NAME, *others}
