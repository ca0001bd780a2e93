"""A fleet over two hosts: the same tokens, faults that are found and survived, and nobody let in without the token."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import pytest
from transformers import AutoModelForCausalLM

from tests.hosts import ROOT, Driver, Host, cut, two_hosts
from tests.tiny_models import save_tiny_model, tiny_prompts, unsplit_tokens

CABLE = f"p{os.getpid()}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    with two_hosts(CABLE) as made:
        yield made


def soon(condition: Callable[[], object], within_s: float = 30.0) -> bool:
    deadline = time.monotonic() + within_s
    while not (found := condition()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return bool(found)


def worker_in_a_run(host: Host, driver: Driver) -> psutil.Process:
    """The worker of a host that has joined and computes."""
    join(host, driver)
    driver.hear()
    (worker,) = host.workers()
    driver.tell("measure")
    assert soon(lambda: worker.cpu_percent(0.2) > 50)
    return worker


def join(host: Host, driver: Driver, *more: object) -> None:
    host.pipetune("join", driver.listen, "--node-rank", 1, *more)


def end(driver: Driver) -> None:
    assert driver.process.stdin is not None
    driver.process.stdin.close()
    assert driver.process.wait(30) == 0


def test_two_hosts_give_the_tokens_of_the_unsplit_model_and_only_their_addresses_listen(
    hosts: tuple[Host, Host], model: Path, tmp_path: Path
) -> None:
    # Their clocks are 1,000 seconds apart.
    hosts[1].prefix = ("unshare", "-T", "--monotonic", "1000")
    driver = Driver(hosts[0], model, tmp_path)
    join(hosts[1], driver)
    up = driver.hear()
    assert up["hosts"] == 2
    assert driver.do("reference") == {"reference": None}
    said = driver.do("measure")
    outcome = said["outcome"]
    assert outcome["outcome"] == "measurement"
    assert outcome["check"]["tokens_equal"] is True
    assert [stage["device"] for stage in outcome["memory"]] == ["host0/cpu:0", "host1/cpu:0"]
    assert 0 < outcome["clock_error_s"] < 0.1
    assert all(run["duration_s"] < said["took_s"] for run in outcome["iterations"])
    for run in outcome["iterations"]:
        first, last = run["stages"]
        slack = 2 * outcome["clock_error_s"]
        ends = zip(first["compute_end_s"], last["compute_start_s"], strict=True)
        assert all(sent <= begun + slack for sent, begun in ends)
    for host in hosts:
        assert host.listeners() <= {host.address}, "beyond the address given"
    end(driver)
    assert hosts[1].processes[-1].wait(30) == 0
    assert soon(lambda: not hosts[0].pids() | hosts[1].pids())


def test_a_baseline_has_the_memory_of_its_own_host(hosts: tuple[Host, Host], model: Path, tmp_path: Path) -> None:
    # Two workers share what the first host has; the one of the second has all.
    driver = Driver(hosts[0], model, tmp_path, devices="host0/cpu:0-1,host1/cpu:0", layers=(2, 2, 2))
    join(hosts[1], driver)
    driver.hear()
    said = driver.do("baseline")
    (memory,) = said["outcome"]["memory"]
    assert memory["cap_bytes"] == said["device_bytes"]["host0/cpu:0"] < said["device_bytes"]["host1/cpu:0"]


PIPELINE = """
import json, os, sys, warnings
from pipetune import Pipeline
from pipetune.bench.spec import Plan

given = json.loads(sys.argv[1])
plan = Plan.from_layer_counts((4, 2), ("host0/cpu:0", "host1/cpu:0"), 2)
with warnings.catch_warnings(record=True) as caught, Pipeline.start(given["model"], plan) as pipeline:
    for line in sys.stdin:
        found = pipeline.generate(given["prompts"], max_new_tokens=4, ignore_eos=True)
        told = [str(one.message) for one in caught if "run again" in str(one.message)]
        print(json.dumps([[list(one.token_ids) for one in found], told]), flush=True)
"""


def test_a_pipeline_over_hosts_generates_and_survives_the_loss_of_a_worker(
    hosts: tuple[Host, Host], model: Path
) -> None:
    untyped: Any = AutoModelForCausalLM
    prompts = tiny_prompts(5)
    truth = unsplit_tokens(untyped.from_pretrained(model).eval(), prompts, output_len=4)
    address = f"{hosts[0].address}:29400"
    given = json.dumps({"model": str(model), "prompts": prompts})
    process = hosts[0].start(sys.executable, "-c", PIPELINE, given, PIPETUNE_LISTEN=address)
    joined = hosts[1].pipetune("join", address, "--node-rank", 1)
    assert process.stdin is not None
    assert process.stdout is not None
    print(file=process.stdin, flush=True)
    assert json.loads(process.stdout.readline()) == [truth, []]
    (worker,) = hosts[1].workers()
    worker.kill()
    print(file=process.stdin, flush=True)
    tokens, told = json.loads(process.stdout.readline())
    assert tokens == truth
    assert len(told) == 1
    assert "host1/cpu:0" in told[0]
    process.stdin.close()
    assert process.wait(30) == 0
    assert joined.wait(30) == 0


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_worker_elsewhere_is_found_named_and_replaced(
    hosts: tuple[Host, Host], model: Path, tmp_path: Path, fault: signal.Signals
) -> None:
    driver = Driver(hosts[0], model, tmp_path, hang_timeout_s=4.0, num_iters=2000)
    worker = worker_in_a_run(hosts[1], driver)
    worker.send_signal(fault)
    outcome = driver.hear()["outcome"]
    assert outcome["kind"] == ("worker_died" if fault is signal.SIGKILL else "worker_hung")
    assert outcome["device"] == "host1/cpu:0"
    assert soon(lambda: not psutil.pid_exists(worker.pid), 12.0)
    # The next measurement works, on workers that are new on both hosts.
    driver.tell("measure")
    assert soon(lambda: hosts[1].workers() and hosts[1].workers()[0].cpu_percent(0.2) > 20, 60.0)


def test_a_cut_cable_ends_the_workers_beyond_it_and_they_come_back_with_it(
    hosts: tuple[Host, Host], model: Path, tmp_path: Path
) -> None:
    driver = Driver(hosts[0], model, tmp_path, hang_timeout_s=4.0)
    join(hosts[1], driver)
    driver.hear()
    assert driver.do("measure")["outcome"]["outcome"] == "measurement"
    workers = [*hosts[0].workers(), *hosts[1].workers()]
    assert len(workers) == 2
    cut(hosts[1], CABLE, "b")
    assert driver.do("measure")["outcome"]["kind"] in {"worker_hung", "worker_died"}
    assert soon(lambda: not any(psutil.pid_exists(worker.pid) for worker in workers), 15.0)
    cut(hosts[1], CABLE, "b", back=True)
    assert driver.do("measure")["outcome"]["outcome"] == "measurement"


def test_a_killed_agent_takes_its_workers_along_and_another_takes_its_place(
    hosts: tuple[Host, Host], model: Path, tmp_path: Path
) -> None:
    driver = Driver(hosts[0], model, tmp_path, num_iters=2000)
    worker = worker_in_a_run(hosts[1], driver)
    psutil.Process(worker.ppid()).kill()
    outcome = driver.hear()["outcome"]
    assert (outcome["kind"], outcome["device"]) == ("worker_died", "host1/cpu:0")
    assert soon(lambda: not hosts[1].pids(), 12.0)
    assert hosts[1].processes[-1].wait(5) == 4
    join(hosts[1], driver)
    driver.tell("measure")
    assert soon(lambda: hosts[1].workers() and hosts[1].workers()[0].cpu_percent(0.2) > 20, 60.0)


def test_a_killed_driver_leaves_nothing_on_any_host(hosts: tuple[Host, Host], model: Path, tmp_path: Path) -> None:
    driver = Driver(hosts[0], model, tmp_path)
    join(hosts[1], driver)
    driver.hear()
    # `ip netns exec` has become the driver.
    driver.process.kill()
    assert soon(lambda: not hosts[0].workers() and not hosts[1].pids(), 12.0)
    assert hosts[1].processes[-1].wait(5) == 4


def test_a_host_stays_where_a_further_driver_comes_until_it_is_sent_home(
    hosts: tuple[Host, Host], model: Path, tmp_path: Path
) -> None:
    stay = {"PIPETUNE_STAY": "1"}
    killed = Driver(hosts[0], model, tmp_path, variables=stay)
    join(hosts[1], killed)
    joined = hosts[1].processes[-1]
    killed.hear()
    killed.process.kill()
    # The next one has no work for it, and the last one has.
    without = Driver(hosts[0], model, tmp_path, devices="host0/cpu:0", layers=(6,), variables=stay)
    without.hear()
    assert without.do("measure")["outcome"]["outcome"] == "measurement"
    end(without)
    last = Driver(hosts[0], model, tmp_path, variables=stay)
    assert last.hear()["hosts"] == 2
    end(last)
    assert joined.poll() is None
    home = f"from pipetune.bench.fleet.hosts import dismiss; dismiss({killed.listen!r}, ('host0', 'host1'))"
    hosts[0].start(sys.executable, "-c", home)
    assert joined.wait(60) == 0
    assert "has no work for host1; its hosts are host0" in joined.communicate()[1]


def test_plain_torchrun_joins_and_strangers_hold_up_nobody(
    hosts: tuple[Host, Host], model: Path, tmp_path: Path
) -> None:
    driver = Driver(hosts[0], model, tmp_path)
    script = (
        "import socket, time\n"
        f"silent = [socket.create_connection(({hosts[0].address!r}, 29400)) for _ in range(50)]\n"
        "print('there', flush=True)\ntime.sleep(100)"
    )
    assert soon(lambda: hosts[0].address in hosts[0].listeners())
    stranger = hosts[1].start(sys.executable, "-c", script)
    assert stranger.stdout is not None
    assert stranger.stdout.readline() == "there\n"
    hosts[1].start(
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"),
        *("--rdzv-backend", "pipetune", "--rdzv-endpoint", driver.listen, "--rdzv-conf", "node=1"),
        *("--max-restarts", "1000", "-m", "pipetune.bench.worker"),
    )
    assert driver.hear()["up"]
    assert driver.do("measure")["outcome"]["outcome"] == "measurement"


def test_a_host_with_other_versions_is_refused_by_name(hosts: tuple[Host, Host], model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / "transformers-4.0.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 4.0\n", encoding="utf-8")
    driver = Driver(hosts[0], model, tmp_path)
    refused = hosts[1].pipetune("join", driver.listen, "--node-rank", 1, PYTHONPATH=f"{other.parent}:{ROOT}")
    told = rf"host1 \(\S+\) has transformers 4\.0 \({version('transformers')} here\): install the same versions"
    assert re.fullmatch(told, driver.hear()["refused"])
    assert re.search(told, refused.communicate(timeout=60)[1])
    assert refused.returncode == 4


def test_a_host_with_another_token_or_none_is_told_so(hosts: tuple[Host, Host], model: Path, tmp_path: Path) -> None:
    driver = Driver(hosts[0], model, tmp_path, host_timeout_s=25.0)
    assert soon(lambda: hosts[0].address in hosts[0].listeners())
    wrong = hosts[1].pipetune("join", driver.listen, "--node-rank", 1, PIPETUNE_TOKEN="quite another secret")
    assert "ended the handshake: its PIPETUNE_TOKEN is another" in wrong.communicate(timeout=60)[1]
    assert wrong.returncode == 4
    none = hosts[1].pipetune("join", driver.listen, "--node-rank", 1, PIPETUNE_TOKEN="")
    assert "PIPETUNE_TOKEN: must hold the same secret on all hosts" in none.communicate(timeout=60)[1]
    assert none.returncode == 2
    stray = hosts[1].pipetune("join", driver.listen, "--node-rank", 7)
    assert "has no work for host7; its hosts are host0, host1" in stray.communicate(timeout=60)[1]
    assert driver.hear()["refused"] == f"host1 did not join {driver.listen} within 25 s"
