"""Hosts of a test: network namespaces with one address each, joined by a cable that can be cut."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

TOKEN = "a token of the tests alone"
ROOT = Path(__file__).resolve().parents[1]

DRIVER = """
import json, os, sys, time
from pathlib import Path
from pipetune.bench.errors import FleetError
from pipetune.bench.fleet.fleet import Fleet
from pipetune.bench.record import Failure
from pipetune.bench.spec import ModelSpec, Plan, Protocol, RunSpec, Workload, parse_devices

given = json.loads(sys.argv[1])
devices = parse_devices(given["devices"])
workload = Workload(**given["workload"])
protocol = Protocol(num_iters=given["num_iters"], num_iters_warmup=1)


def say(**told):
    print(json.dumps(told), flush=True)


options = {name: given[name] for name in ("listen", "hang_timeout_s", "host_timeout_s")}
try:
    fleet = Fleet.start(ModelSpec(name=given["model"], load_format=given["load_format"]), devices, **options)
except FleetError as error:
    say(refused=str(error))
    sys.exit(4)
with fleet:
    say(up=True, hostname=fleet.machine.hostname, hosts=1 + len(fleet.machine.hardware.further_hosts))
    for line in sys.stdin:
        if line.strip() == "reference":
            say(reference=fleet.make_reference(Path(given["reference"]), workload, protocol))
            continue
        if line.strip() == "baseline":
            measured = json.loads(fleet.baseline(workload, protocol, 2).model_dump_json())
            say(outcome=measured, device_bytes=fleet.device_bytes)
            continue
        if line.strip() == "pids":
            say(pids=[worker.process.pid for worker in fleet._supervisor._workers])
            continue
        word, _, wanted = line.strip().partition(" ")
        plan = Plan.model_validate_json(wanted) if wanted else Plan.from_layer_counts(given["layers"], devices, 2)
        spec = RunSpec(model=fleet.model, workload=workload, plan=plan, protocol=protocol)
        began = time.monotonic()
        try:
            outcome = fleet.measure(spec, fleet.resolve(plan, workload))
        except FleetError as error:
            outcome = error.failure
        say(took_s=time.monotonic() - began, outcome=json.loads(outcome.model_dump_json()))
"""


@dataclass
class Host:
    """A namespace, and what was started in it."""

    name: str
    address: str
    processes: list[subprocess.Popen[str]] = field(default_factory=list)
    prefix: tuple[str, ...] = ()
    """A command that commands are run by, such as one that makes a namespace of another kind."""

    def start(self, *command: str, **variables: str) -> subprocess.Popen[str]:
        """A process on this host, with pipes for its input and output."""
        environment = {**os.environ, "PIPETUNE_TOKEN": TOKEN, "PYTHONPATH": str(ROOT), **variables}
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.name, *self.prefix, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=ROOT,
        )
        self.processes.append(process)
        return process

    def pipetune(self, *arguments: object, **variables: str) -> subprocess.Popen[str]:
        """The command line on this host."""
        return self.start(sys.executable, "-m", "pipetune", *map(str, arguments), **variables)

    def pids(self) -> set[int]:
        """Of every process on this host."""
        listed = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=True)
        return set(map(int, listed.stdout.split()))

    def workers(self) -> list[psutil.Process]:
        """Worker processes on this host."""
        found = []
        for pid in self.pids():
            with contextlib.suppress(psutil.Error):
                command = psutil.Process(pid).cmdline()
                if command[-1:] == ["pipetune.bench.worker"] and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                    found.append(psutil.Process(pid))
        return found

    def listeners(self) -> set[str]:
        """Addresses that something listens on, ports left out."""
        listed = subprocess.run(
            ["ip", "netns", "exec", self.name, "ss", "-Hltn"], capture_output=True, text=True, check=True
        )
        return {line.split()[3].rpartition(":")[0] for line in listed.stdout.splitlines()}


@contextlib.contextmanager
def two_hosts(name: str, *, rate: float | None = None, delay_s: float = 0.0) -> Iterator[tuple[Host, Host]]:
    """Two hosts with a cable between them; what runs there is killed at the end.

    A rate in bits a second makes it a slow one, with a delay. Where namespaces cannot be made the test is skipped; it
    fails where CI is set.
    """
    hosts = Host(f"{name}-0", "10.77.0.1"), Host(f"{name}-1", "10.77.0.2")
    try:
        for host in hosts:
            _ip("netns", "add", host.name)
    except (OSError, subprocess.CalledProcessError) as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"no network namespaces here: {error}")
    try:
        if rate is None:
            _lay_cable(hosts, name)
        else:
            ends = [f"{host.name}={host.address}" for host in hosts]
            command = [sys.executable, "-m", "tests.slow_wire", "--rate", str(rate), "--delay", str(delay_s), *ends]
            # It ends with this process, which holds its input.
            wire = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
            hosts[0].processes.append(wire)
            assert wire.stdout is not None
            assert wire.stdout.readline() == "up\n"
        yield hosts
    finally:
        for host in hosts:
            for pid in host.pids():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, 9)
            for process in host.processes:
                process.kill()
                with process:
                    pass
            _ip("netns", "del", host.name)


def _lay_cable(hosts: tuple[Host, Host], name: str) -> None:
    _ip("link", "add", "name", f"{name}a", "netns", hosts[0].name, "type", "veth", "peer", "name", f"{name}b",
        "netns", hosts[1].name)  # fmt: skip
    for host, end in zip(hosts, "ab", strict=True):
        _ip("-n", host.name, "link", "set", "lo", "up")
        _ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", f"{name}{end}")
        _ip("-n", host.name, "link", "set", f"{name}{end}", "up")


def cut(host: Host, name: str, end: str, *, back: bool = False) -> None:
    """Takes a host's end of the cable out, or puts it back."""
    _ip("-n", host.name, "link", "set", f"{name}{end}", "up" if back else "down")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=30)


class Driver:
    """A driver on a host, which measures when it is told to."""

    def __init__(
        self,
        host: Host,
        model: Path,
        folder: Path,
        *,
        layers: Sequence[int] = (4, 2),
        variables: dict[str, str] | None = None,
        **given: Any,
    ) -> None:
        self.listen = f"{host.address}:29400"
        told = {
            "devices": "host0/cpu:0,host1/cpu:0", "layers": list(layers), "model": str(model), "listen": self.listen,
            "reference": str(folder / "reference"), "hang_timeout_s": 10.0, "host_timeout_s": 60.0,
            "workload": {"num_prompts": 6, "input_len": 12, "output_len": 5}, "num_iters": 2,
            "load_format": "auto",
        }  # fmt: skip
        self.process = host.start(sys.executable, "-c", DRIVER, json.dumps(told | given), **(variables or {}))

    def hear(self) -> dict[str, Any]:
        """The next thing it says."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise AssertionError(self.process.communicate()[1])
        said: dict[str, Any] = json.loads(line)
        return said

    def tell(self, command: str) -> None:
        """Asks it to do something."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{command}\n")
        self.process.stdin.flush()

    def do(self, command: str) -> dict[str, Any]:
        """What comes of a command."""
        self.tell(command)
        return self.hear()
