"""A gate over two hosts: hosts that have joined stay from one side's process to the next, and go home at its end."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipetune.bench.errors import ConfigError
from pipetune.bench.spec import ModelSpec, Plan, Protocol, Workload
from pipetune.tuner.config.gate import Tolerance
from pipetune.tuner.gate.runners import FreshProcesses
from pipetune.tuner.gate.values import Case, Side
from tests.hosts import Host, two_hosts
from tests.tiny_models import save_tiny_model

CABLE = f"g{os.getpid()}"
DEVICES = ("host0/cpu:0", "host1/cpu:0")


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    with two_hosts(CABLE) as made:
        yield made


def gate(hosts: tuple[Host, Host], folder: Path, *more: object) -> dict[str, Any]:
    """What the same command on both hosts comes to, with a candidate that fits nowhere."""
    model = save_tiny_model(folder / "model", "llama")
    plans = {"baseline": Plan.from_layer_counts((4, 2), DEVICES, 2)}
    plans["candidate"] = Plan.from_layer_counts((2, 4), DEVICES, 2, memory_fraction=1e-9)
    for name, plan in plans.items():
        (folder / f"{name}.json").write_text(plan.model_dump_json(), encoding="utf-8")
    settings = folder / "gate.yaml"
    settings.write_text("protocol: {num_iters: 1, num_iters_warmup: 0}\n", encoding="utf-8")
    command = [
        *("gate", "--config", settings, "--model", model, "--devices", ",".join(DEVICES), "--no-progress", "--json"),
        *("--baseline-plan", folder / "baseline.json", "--candidate-plan", folder / "candidate.json"),
        *("--num-prompts", 4, "--input-len", 8, "--output-len", 3, "--metric", "output_throughput"),
        *("--nnodes", 2, "--master-addr", hosts[0].address, *more),
    ]
    leads = hosts[0].pipetune(*command, "--node-rank", 0)
    joins = hosts[1].pipetune(*command, "--node-rank", 1)
    said, complained = leads.communicate(timeout=200)
    assert leads.returncode in (0, 1, 3), complained
    assert joins.wait(30) == 0, joins.communicate()[1]
    assert not hosts[1].pids()
    result: dict[str, Any] = json.loads(said)
    return result


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--rounds-in-process",)])
def test_hosts_that_have_joined_serve_both_sides(hosts: tuple[Host, Host], tmp_path: Path, more: tuple[str]) -> None:
    result = gate(hosts, tmp_path, *more)
    assert (result["method"], result["verdict"]) == ("running_fleet" if more else "fresh_processes", "FAIL")
    (pair,) = result["pairs"]
    assert pair["baseline"]["metrics"]["output_throughput"] > 0
    assert pair["baseline"]["checked"]
    # What the caps are shares of is known to a fleet that is up.
    assert pair["candidate"]["failure"]["kind"] == "over_memory_cap"


def case(baseline: tuple[str, ...], candidate: tuple[str, ...], **of_candidate: object) -> Case:
    def side(name: str, devices: tuple[str, ...], **more: object) -> Side:
        plan = Plan.from_layer_counts((6,), devices[:1], 2)
        return Side.model_validate(
            {"name": name, "model": ModelSpec(name="m"), "plan": plan, "devices": devices} | more
        )

    return Case(
        name="tiny",
        workload=Workload(num_prompts=4, input_len=8, output_len=3),
        protocol=Protocol(),
        baseline=side("baseline", baseline),
        candidate=side("candidate", candidate, **of_candidate),
        metrics={"output_throughput": Tolerance()},
    )


def test_what_other_hosts_cannot_have_is_refused() -> None:
    FreshProcesses((case(DEVICES[:1], DEVICES),))
    with pytest.raises(ConfigError, match=r"candidate: on several hosts .* leave out its Python, revision and env"):
        FreshProcesses((case(DEVICES, DEVICES, env={"A": "1"}),))
    with pytest.raises(ConfigError, match=r"baseline: .* name the hosts of all devices"):
        FreshProcesses((case(("cpu:0",), DEVICES),))
