"""Runs over a trace on real workers: tokens as of each prompt alone, all that was seen, and what is refused."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from pipetune.bench.errors import ConfigError, FleetError, PlanError
from pipetune.bench.fleet import supervisor
from pipetune.bench.fleet.fleet import Fleet
from pipetune.bench.load.online import OnlineRequest
from pipetune.bench.record import FailureKind
from pipetune.bench.spec import Lane, ModelSpec, Plan, Sampling
from tests.families.configs import tiny_config
from tests.tiny_models import save_tiny_model, tiny_prompts, unsplit_tokens
from tests.workers import worker_pids

DEVICES = ("cpu:0", "cpu:1", "cpu:2", "cpu:3")
REPLICAS = Plan.from_layer_counts((2, 4), DEVICES[::-1], 2, prefill_chunk_size=5, replicas=2)
PLANS = (
    Plan.from_layer_counts((6,), DEVICES, 3, prefill_micro_batch_size=2),
    Plan.from_layer_counts((2, 4), DEVICES[::-1], 2, prefill_chunk_size=5),
    Plan.from_layer_counts((1, 3, 2), DEVICES, 3, prefill_micro_batch_size=1).model_copy(
        update={"lanes": (Lane(up_to_tokens=4, weight=4, slots=1), Lane(prefill_chunk_size=5, prefills_per_decode=1))}
    ),
)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A llama on four workers."""
    folder = save_tiny_model(tmp_path_factory.mktemp("models") / "llama", "llama")
    with Fleet.start(ModelSpec(name=str(folder)), DEVICES) as started:
        yield started


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "bloom", "gpt2"])
def test_a_trace_on_workers(family: str, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / family, family)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    source = random.Random(1)
    requests = [
        OnlineRequest(number=number, prompt=prompt, output_len=source.randint(1, 10), at_s=0.01 * (number // 3))
        for number, prompt in enumerate(tiny_prompts(18))
    ]
    expected = [tuple(unsplit_tokens(model, [one.prompt], output_len=one.output_len)[0]) for one in requests]
    with Fleet.start(ModelSpec(name=str(folder)), DEVICES) as fleet:
        for plan in (REPLICAS, *PLANS):
            run = fleet.run_trace(plan, requests)
            assert tuple(one.token_ids for one in run.requests) == tuple(expected), plan.describe()
            assert [one.arrived_s for one in run.requests] == [one.at_s for one in requests]
            assert run.duration_s == max(one.token_times_s[-1] for one in run.requests)
            assert len(run.stages) == len(plan.devices)
            for stage, load in zip(run.stages, run.stage_loads, strict=True):
                assert len(stage.compute_start_s) == len(load.load_tasks) > 0
        # An offline pass finds its own slots again, behind which the plan is the same.
        results = fleet.generate(plan, [one.prompt for one in requests], max_new_tokens=4, ignore_eos=True)
        again = fleet.run_trace(plan, requests, instrument=False, max_concurrency=2)
        assert all(one.token_ids[:4] == row[:4] for one, row in zip(results, expected, strict=True) if len(row) >= 4)
        assert tuple(one.token_ids for one in again.requests) == tuple(expected)
        assert not any(stage.compute_start_s for stage in again.stages)


@pytest.mark.parametrize("most", [1, 3])
def test_replicas_share_the_places_for_requests(most: int, fleet: Fleet) -> None:
    requests = [OnlineRequest(number=one, prompt=(5, 6), output_len=4) for one in range(7)]
    run = fleet.run_trace(REPLICAS, requests, max_concurrency=most)
    spans = [(one.admitted_s or 0.0, one.token_times_s[-1]) for one in run.requests]
    assert max(sum(begin <= at < end for begin, end in spans) for at, _ in spans) <= most
    (other,) = run.further_replicas
    steps = [sum(task.rows for task in load.load_tasks if task.samples) for load in (run, other)]
    assert steps == ([28, 0] if most == 1 else [16, 12])
    # A replica that has done its part is idle until the last token.
    assert max(load.idle_s[-1][1] for load in (run, other) if load.idle_s) == run.duration_s
    if most == 1:
        assert other.idle_s == ((0.0, run.duration_s),)


def test_draws_are_those_of_the_batch(fleet: Fleet) -> None:
    sampling = Sampling(temperature=0.8, seed=5)
    prompts = tiny_prompts(6)
    requests = [OnlineRequest(number=one, prompt=prompts[one], output_len=6) for one in (4, 2, 0, 5, 1, 3)]
    plan = Plan.from_layer_counts((3, 3), DEVICES, 2)
    batch = fleet.generate(plan, prompts, max_new_tokens=6, ignore_eos=True, sampling=sampling)
    run = fleet.run_trace(plan, requests, sampling=sampling)
    assert {one.number: one.token_ids for one in run.requests} == {
        number: result.token_ids for number, result in enumerate(batch)
    }


def test_what_is_refused_costs_no_worker(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "gpt2", "gpt2")
    request = OnlineRequest(number=0, prompt=(5, 6, 7), output_len=2)
    plan = Plan.from_layer_counts((3, 3), DEVICES, 2)
    with Fleet.start(ModelSpec(name=str(folder)), DEVICES[:2]) as fleet:
        pids = worker_pids(fleet)
        with pytest.raises(ConfigError, match="128 positions"):
            fleet.run_trace(plan, [request.model_copy(update={"output_len": 200})])
        with pytest.raises(ConfigError, match="token id 999 is outside"):
            fleet.run_trace(plan, [request.model_copy(update={"prompt": (999,)})])
        with pytest.raises(ConfigError, match="a number of its own"):
            fleet.run_trace(plan, [request, request])
        with pytest.raises(PlanError, match=r"plan\.compile"):
            fleet.run_trace(plan.model_copy(update={"compile": True}), [request])
        assert len(fleet.run_trace(plan, [request]).requests[0].token_ids) == 2
        assert worker_pids(fleet) == pids


@pytest.mark.parametrize("family", ["jamba", "minimax", "xlstm", "recurrent_gemma", "bart", "deepseek_v32"])
def test_families_whose_rows_cannot_be_moved_fill_slots_whole(family: str, tmp_path: Path) -> None:
    tiny_config(family).save_pretrained(tmp_path)
    source = random.Random(2)
    lens = [(source.choice((3, 7)), source.randint(1, 9)) for _ in range(16)]
    with Fleet.start(ModelSpec(name=str(tmp_path), load_format="dummy"), DEVICES[:2]) as fleet:
        requests = [
            OnlineRequest(
                number=number,
                prompt=tuple(source.randrange(5, fleet.shape.vocab_size) for _ in range(prompt_len)),
                output_len=output_len,
                at_s=0.01 * (number // 4),
            )
            for number, (prompt_len, output_len) in enumerate(lens)
        ]
        cut = next(one for one in range(1, fleet.shape.num_layers) if one not in fleet.shape.forbidden_cuts)
        plan = Plan.from_layer_counts((cut, fleet.shape.num_layers - cut), DEVICES, 3)
        alone, prompts = plan.model_copy(update={"micro_batch_size": 1}), [one.prompt for one in requests]
        sampling = Sampling(temperature=0.8, seed=5)
        for own in (None, sampling):
            batch = fleet.generate(alone, prompts, max_new_tokens=9, ignore_eos=True, sampling=own)
            run = fleet.run_trace(plan, requests, sampling=own)
            for one, row, (_, output_len) in zip(run.requests, batch, lens, strict=True):
                assert one.token_ids == row.token_ids[:output_len]
            assert max(task.rows for task in run.load_tasks) > 1
        chunks = plan.model_copy(update={"lanes": (Lane(prefill_chunk_size=2),)})
        if fleet.shape.recurrent:
            with pytest.raises(PlanError, match=r"plan\.lanes\.prefill_chunk_size: .* must be given whole prompts"):
                fleet.run_trace(chunks, requests)
        elif family == "bart":
            runs = [fleet.run_trace(one, requests, sampling=sampling).requests for one in (plan, chunks)]
            assert len({tuple(one.token_ids for one in own) for own in runs}) == 1


def test_a_pipeline_without_requests_is_not_taken_for_stuck(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "STUCK_AFTER_S", 1.2)
    requests = [OnlineRequest(number=one, prompt=(5, 6), output_len=2, at_s=4.0 * one) for one in range(2)]
    run = fleet.run_trace(PLANS[2], requests)
    first, second = run.requests
    assert run.idle_s == ((first.token_times_s[-1], 4.0),)
    assert second.noticed_s >= 4.0


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_killed_stage_is_named(rank: int, fleet: Fleet) -> None:
    requests = [
        OnlineRequest(number=number, prompt=(5, 6, 7), output_len=20, at_s=0.02 * number) for number in range(1000)
    ]
    plan = PLANS[2]
    fleet.run_trace(plan, requests[:3])
    timer = threading.Timer(1.0, os.kill, (worker_pids(fleet)[rank], signal.SIGKILL))
    timer.start()
    with pytest.raises(FleetError) as caught:
        fleet.run_trace(plan, requests, in_flight=3)
    assert (caught.value.failure.kind, caught.value.failure.stage) == (FailureKind.WORKER_DIED, rank)
    # The next use starts the workers again.
    assert len(fleet.run_trace(plan, requests[:2]).requests) == 2
