"""Worker processes forked or started by themselves: what the driver sees of them is the same."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import psutil
import pytest

from pipetune.bench.fleet import processes
from pipetune.bench.fleet.processes import Process, start_worker

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3])}


@pytest.fixture
def servers() -> list[processes._ForkServer]:
    """Those of this process, that of `ENVIRONMENT` alone at first."""
    for server in processes._servers.get(os.getpid(), []):
        assert server.is_idle
    assert processes._server_for(ENVIRONMENT) is not None
    return processes._servers[os.getpid()]


def start(log: Path, *arguments: str, environment: Mapping[str, str] = ENVIRONMENT, forked: bool = True) -> Process:
    with log.open("ab") as output:
        return start_worker(arguments, environment, output, forked=forked)


def idle_worker(folder: Path) -> Process:
    """A worker that waits for its peer."""
    given = ("--rank", "1", "--devices", "cpu:0,cpu:1", "--model", '{"name": "m"}')
    driver = ("--socket", str(folder / "driver.sock"), "--rendezvous", str(folder / "rendezvous"))
    return start(folder / "log", *given, *driver)


def soon(condition: Callable[[], object]) -> bool:
    deadline = time.monotonic() + 30
    while not (found := condition()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(found)


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[None]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as driver:
        driver.bind(str(tmp_path / "driver.sock"))
        driver.listen()
        yield


@pytest.mark.parametrize("forked", [True, False])
def test_a_worker_that_refuses_its_arguments_writes_to_its_log_and_exits(tmp_path: Path, forked: bool) -> None:
    process = start(tmp_path / "log", "--rank", "zero", forked=forked)
    assert process.wait(60) == process.poll() == 2
    assert "invalid int value: 'zero'" in (tmp_path / "log").read_text(encoding="utf-8")
    process.kill()


@pytest.mark.usefixtures("listener")
def test_forked_workers_have_sessions_and_names_of_their_own_and_the_driver_as_grandparent(tmp_path: Path) -> None:
    process = idle_worker(tmp_path)
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.1)
    seen = psutil.Process(process.pid)
    assert os.getsid(process.pid) == process.pid
    assert soon(lambda: Path(f"/proc/{process.pid}/comm").read_text(encoding="utf-8") == "pipetune-rank-1\n")
    parent = seen.parent()
    assert parent is not None
    assert parent.ppid() == os.getpid()
    assert Path(f"/proc/{process.pid}/cwd").resolve() == Path.cwd()
    assert process.pid in {one.pid for one in psutil.Process().children(recursive=True)}
    process.kill()
    assert process.wait(30) == -signal.SIGKILL


@pytest.mark.usefixtures("listener")
def test_workers_end_with_the_server_that_forked_them_and_the_next_have_another(
    tmp_path: Path, servers: list[processes._ForkServer]
) -> None:
    process = idle_worker(tmp_path)
    (server,) = servers
    server._process.kill()
    assert process.wait(30) == -signal.SIGKILL
    assert soon(lambda: not psutil.pid_exists(process.pid))
    again = idle_worker(tmp_path)
    assert again.poll() is None
    assert servers != [server]
    again.kill()
    again.wait(30)


@pytest.mark.usefixtures("listener")
def test_another_environment_has_another_server_and_one_without_workers_goes(
    tmp_path: Path, servers: list[processes._ForkServer]
) -> None:
    first = idle_worker(tmp_path)
    (server,) = servers
    changed = {**ENVIRONMENT, "OMP_NUM_THREADS": "1"}
    start(tmp_path / "log", "--help", environment=changed).wait(30)
    assert first.poll() is None, "its workers run on"
    assert len(servers) == 2
    start(tmp_path / "log", "--help", environment={**changed, "PYTEST_CURRENT_TEST": "another"}).wait(30)
    assert len(servers) == 2, "no worker reads that"
    first.kill()
    first.wait(30)
    start(tmp_path / "log", "--help", environment=changed).wait(30)
    assert server not in servers
    assert not server.is_up


def test_where_none_can_be_forked_a_worker_starts_by_itself_and_says_why(tmp_path: Path) -> None:
    broken = tmp_path / "transformers"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise ImportError('half installed')", encoding="utf-8")
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{tmp_path}:{ENVIRONMENT['PYTHONPATH']}"}
    process = start(tmp_path / "log", "--rank", "zero", environment=environment)
    assert process.wait(60) == 2
    assert isinstance(process, subprocess.Popen)
