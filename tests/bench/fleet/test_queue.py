"""Requests given one by one to running workers: tokens as they come, refusals, cancels, and workers that die."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from pipetune.bench.errors import ConfigError, FleetError
from pipetune.bench.fleet.fleet import Fleet
from pipetune.bench.record import FailureKind
from pipetune.bench.spec import ModelSpec, Plan
from tests.tiny_models import save_tiny_model, tiny_prompts, unsplit_tokens
from tests.workers import worker_pids

PLAN = Plan.from_layer_counts((2, 4), ("cpu:0", "cpu:1"), 2)
REPLICAS = Plan.from_layer_counts((6,), ("cpu:0", "cpu:1"), 2, replicas=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "llama", "llama")


@pytest.fixture(scope="module")
def fleet(folder: Path) -> Iterator[Fleet]:
    with Fleet.start(ModelSpec(name=str(folder)), ("cpu:0", "cpu:1")) as fleet:
        yield fleet


@pytest.mark.parametrize("plan", [PLAN, REPLICAS], ids=["pipeline", "replicas"])
def test_requests_from_several_threads_get_the_unsplit_models_tokens(plan: Plan, folder: Path, fleet: Fleet) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    prompts = tiny_prompts(12)
    expected = [unsplit_tokens(model, [prompt], output_len=2 + index % 5)[0] for index, prompt in enumerate(prompts)]
    found: dict[int, list[int]] = {}
    with fleet.open_queue(plan, max_len=32) as requests:

        def ask(first: int) -> None:
            for index in range(first, len(prompts), 3):
                handle = requests.submit(prompts[index], max_new_tokens=2 + index % 5, ignore_eos=True)
                found[index] = list(handle)
                result = handle.result()
                assert list(result.token_ids) == found[index]
                assert result.prompt_token_ids == prompts[index]
                assert result.e2el_s == result.token_times_s[-1] >= result.ttft_s > 0

        threads = [threading.Thread(target=ask, args=(first,)) for first in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [found[index] for index in range(len(prompts))] == expected


@pytest.mark.parametrize("plan", [PLAN, REPLICAS], ids=["pipeline", "replicas"])
def test_what_is_refused_and_cancelled_is_let_go(plan: Plan, fleet: Fleet) -> None:
    pids = worker_pids(fleet)
    with pytest.raises(ConfigError, match=r"max_len=4000.*2048 positions"):
        fleet.open_queue(PLAN, max_len=4000)
    with fleet.open_queue(plan, max_len=64, in_flight=1) as requests:
        with pytest.raises(ConfigError, match="close that first"):
            fleet.generate(PLAN, [[5]], max_new_tokens=1)
        with pytest.raises(ConfigError, match="max_new_tokens=0"):
            requests.submit([5], max_new_tokens=0)
        too_long = requests.submit([5] * 60, max_new_tokens=5)
        with pytest.raises(ConfigError, match="max_len=64"):
            list(too_long)
        # More than there are rows, so that some are cancelled while they wait.
        handles = [requests.submit([5, 6, one], max_new_tokens=60, ignore_eos=True) for one in range(7, 13)]
        for handle in handles:
            handle.cancel()
        assert all(len(handle.result(60).token_ids) <= 60 for handle in handles)
        assert any(len(handle.result().token_ids) < 60 for handle in handles)
        after = requests.submit([5], max_new_tokens=3, ignore_eos=True)
    assert len(after.result(0).token_ids) == 3
    with pytest.raises(ConfigError, match="is closed"):
        requests.submit([5], max_new_tokens=1)
    # A client may go away after its answer.
    after.cancel()
    assert len(fleet.generate(PLAN, [[5]], max_new_tokens=2, ignore_eos=True)[0].token_ids) == 2
    assert worker_pids(fleet) == pids


def test_requests_go_to_the_replica_with_the_fewest(fleet: Fleet) -> None:
    for _ in range(2):
        with fleet.open_queue(REPLICAS, max_len=2000) as requests:
            long = requests.submit([5], max_new_tokens=1900, ignore_eos=True)
            others = [requests.submit([5, one], max_new_tokens=2, ignore_eos=True) for one in range(2)]
            others[0].result(60)
            others[1].result(60)
            others += [requests.submit([5, 9], max_new_tokens=2, ignore_eos=True)]
            assert [one.rank != long.rank for one in others][::2] == [True, True]
            assert not long.future.done()
            long.cancel()


def test_a_plan_may_begin_on_any_device(fleet: Fleet) -> None:
    plans = (PLAN, Plan.from_layer_counts((2, 4), ("cpu:1", "cpu:0"), 2))
    found = []
    for plan in plans:
        with fleet.open_queue(plan, max_len=64) as requests:
            found.append(requests.submit([5, 6], max_new_tokens=5, ignore_eos=True).result(60).token_ids)
    assert found[0] == found[1]


def test_an_error_outside_cancels_what_was_given(fleet: Fleet) -> None:
    handles = []

    def fail() -> None:
        with fleet.open_queue(PLAN, max_len=2000) as requests:
            handles.append(requests.submit([5], max_new_tokens=1900, ignore_eos=True))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert len(handles[0].result(0).token_ids) < 1900


@pytest.mark.parametrize(("plan", "rank"), [(PLAN, 0), (PLAN, 1), (REPLICAS, 1)])
def test_requests_of_killed_workers_fail_by_name(plan: Plan, rank: int, fleet: Fleet) -> None:
    requests = fleet.open_queue(plan, max_len=2000)
    handle = requests.submit([5], max_new_tokens=1900, ignore_eos=True)
    tokens = iter(handle)
    next(tokens)
    os.kill(worker_pids(fleet)[rank], signal.SIGKILL)
    with pytest.raises(FleetError) as caught:
        handle.result(60)
    assert (caught.value.failure.kind, caught.value.failure.device) == (FailureKind.WORKER_DIED, f"cpu:{rank}")
    with pytest.raises(FleetError):
        requests.submit([5], max_new_tokens=1)
    with pytest.raises(FleetError):
        requests.close()
    with fleet.open_queue(PLAN, max_len=32) as others:
        assert len(others.submit([5], max_new_tokens=2, ignore_eos=True).result(60).token_ids) == 2
