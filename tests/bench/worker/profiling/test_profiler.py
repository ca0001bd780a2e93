"""Profiles of real fleets: every layer once, like ones together, parts that add up, a link for each ordered pair."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipetune.bench.errors import FleetError
from pipetune.bench.fleet.fleet import Fleet, Progress
from pipetune.bench.profile import ContentionProfile, DeviceProfile, Profile, ProfileGrid, TaskTime
from pipetune.bench.record import FailureKind, Measurement
from pipetune.bench.spec import EffectivePlan, ModelSpec, Plan, Protocol, RunSpec, Sampling, Workload
from tests.hooks import break_workers
from tests.tiny_models import save_tiny_model
from tests.workers import worker_pids

DEVICES = ("cpu:0", "cpu:1")
GRID = ProfileGrid(rows=(1, 3), lengths=(5, 12), pasts=(9,), chunks=((4, 8),))
KINDS = {(1, 5, 0), (3, 5, 0), (1, 12, 0), (3, 12, 0), (1, 1, 9), (3, 1, 9), (1, 4, 8), (3, 4, 8)}
FIRST_WINDOW = range(3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the fleet's workers write down what the loop took for whole tasks, as the profiler sees it."""
    return tmp_path_factory.mktemp("seen")


@pytest.fixture(scope="module")
def fleet(folder: Path, seen: Path) -> Iterator[Fleet]:
    body = f"""
    import json
    times_of = module._times_of
    def spy(seen):
        found = times_of(seen)
        parts = dict(found.parts_s)
        row = [sorted(seen.whole_s), *(parts.pop(name) for name in ("overhead", "embedding", "head"))]
        row.append(list(parts.values()))
        with open({str(seen / "rank")!r} + str(module.os.getpid()), "a") as file:
            file.write(json.dumps(row) + "\\n")
        return found
    import os
    module.os = os
    module._times_of = spy
"""
    with pytest.MonkeyPatch.context() as patch:
        break_workers(seen / "hook", patch, target="pipetune.bench.worker.profiling.profiler", body=body)
        started = Fleet.start(ModelSpec(name=str(folder)), DEVICES)
    with started:
        yield started


@pytest.fixture(scope="module")
def profile(fleet: Fleet, seen: Path) -> Profile:
    for file in seen.glob("rank*"):
        file.unlink()
    profile = fleet.profile(GRID)
    for file in seen.glob("rank*"):
        file.rename(seen / file.name.replace("rank", "first"))
    return profile


def kinds(times: tuple[TaskTime, ...]) -> set[tuple[int, int, int]]:
    return {(time.rows, time.new_tokens, time.past_tokens) for time in times}


def covered(device: DeviceProfile) -> list[int]:
    return sorted(layer for group in device.layers for layer in group.layers)


def test_every_part_is_timed_for_every_kind_of_task_on_every_device(profile: Profile) -> None:
    assert tuple(device.device for device in profile.devices) == DEVICES
    for device in profile.devices:
        assert covered(device) == list(range(6))
        assert len(device.layers) == 1, "equal layers are one group"
        for times in (device.overhead, device.embedding, device.head, device.layers[0].times):
            assert kinds(times) == KINDS
            assert all(time.seconds > 0 and time.samples >= 3 for time in times)
    assert profile.took_s > 0
    assert profile.contention.prefill is not None
    assert profile.contention.decode is not None
    assert profile.notes == ()


def test_a_profile_says_what_it_is_of(fleet: Fleet, profile: Profile) -> None:
    assert (profile.model, profile.shape, profile.machine) == (fleet.model, fleet.shape, fleet.machine)
    assert profile.device_bytes == fleet.device_bytes
    assert Profile.model_validate_json(profile.model_dump_json()) == profile


def test_the_parts_of_a_task_are_the_task(profile: Profile, seen: Path) -> None:
    files = list(seen.glob("first*"))
    assert len(files) == len(profile.devices) == len(DEVICES)
    for file in files:
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        assert len(rows) == len(KINDS)
        for whole_s, overhead_s, embedding_s, head_s, layers_s in rows:
            assert len(layers_s) == len(FIRST_WINDOW)
            middle = (whole_s[(len(whole_s) - 1) // 2] + whole_s[len(whole_s) // 2]) / 2
            assert overhead_s + embedding_s + head_s + sum(layers_s) == pytest.approx(middle, rel=1e-9)


def test_links_go_both_ways_between_each_pair(folder: Path) -> None:
    devices = ("cpu:0", "cpu:1", "cpu:2")
    with Fleet.start(ModelSpec(name=str(folder)), devices) as three:
        profile = three.profile(ProfileGrid(rows=(1,), lengths=(4,), pasts=()))
    pairs = [(link.source, link.target) for link in profile.links]
    assert sorted(pairs) == sorted(itertools.permutations(devices, 2))
    assert all(link.bytes_per_s > 1e6 and link.latency_s < 1 for link in profile.links)


def test_a_single_device_has_no_links_and_its_progress_is_told(folder: Path) -> None:
    told: list[Progress] = []
    with Fleet.start(ModelSpec(name=str(folder)), ("cpu:0",), on_progress=told.append) as one:
        profile = one.profile(ProfileGrid(rows=(2,), lengths=(4,), pasts=(4,)))
    assert profile.links == ()
    assert profile.contention == ContentionProfile()
    assert covered(profile.devices[0]) == list(range(6))
    counts = [(row.done, row.total) for row in told if row.phase == "profile"]
    assert counts == [(done, len(counts)) for done in range(len(counts))]


def test_plans_run_right_behind_a_profile(fleet: Fleet, profile: Profile, tmp_path: Path) -> None:
    workload = Workload(num_prompts=4, input_len=6, output_len=3)
    protocol = Protocol(num_iters=1, num_iters_warmup=0)
    assert fleet.make_reference(tmp_path / "reference", workload, protocol) is None
    fleet.profile(ProfileGrid(rows=(1,), lengths=(4,), pasts=()))
    plan = Plan.from_layer_counts((2, 4), DEVICES, 2)
    spec = RunSpec(model=fleet.model, workload=workload, plan=plan, protocol=protocol)
    outcome = fleet.measure(spec, EffectivePlan(plan=plan, in_flight=2))
    assert isinstance(outcome, Measurement), outcome
    assert outcome.check is not None
    assert outcome.check.tokens_equal is True


def test_unpacked_padded_sampled_and_scored_tasks_are_timed_as_well(fleet: Fleet) -> None:
    drawn = fleet.profile(
        ProfileGrid(rows=(1, 2), lengths=(6,), pasts=(6,), padded=True, sampling=Sampling(top_k=5)),
        packed_weights=False,
    )
    assert not drawn.packed_weights
    scored = fleet.profile(ProfileGrid(rows=(1, 2), lengths=(1, 6), scores=True, padded=True))
    assert scored.scores
    assert kinds(scored.devices[0].head) == {(1, 1, 0), (2, 1, 0), (1, 6, 0), (2, 6, 0)}


MIXED = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "mlp_only_layers": [0, 1, 2, 4],
    "vocab_size": 64,
}
HYBRID = {
    "architectures": ["JambaForCausalLM"],
    "model_type": "jamba",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attn_layer_period": 4,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "mamba_d_state": 8,
    "mamba_dt_rank": 4,
    "use_mamba_kernels": False,
    "vocab_size": 64,
}


def write_dummy(folder: Path, config: dict[str, object]) -> ModelSpec:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return ModelSpec(name=str(folder), load_format="dummy")


def test_unlike_layers_are_timed_apart(tmp_path: Path) -> None:
    with Fleet.start(write_dummy(tmp_path / "mixed", MIXED), DEVICES) as mixed:
        profile = mixed.profile(GRID)
    for device in profile.devices:
        assert {group.layers for group in device.layers} == {(0, 1, 2, 4), (3, 5)}
        assert all(kinds(group.times) == KINDS for group in device.layers)


def test_what_keeps_states_is_timed_on_whole_prompts(tmp_path: Path) -> None:
    with Fleet.start(write_dummy(tmp_path / "hybrid", HYBRID), DEVICES) as hybrid:
        assert hybrid.shape.recurrent
        profile = hybrid.profile(GRID)
    assert any("whole prompts" in note for note in profile.notes)
    for device in profile.devices:
        assert covered(device) == list(range(4))
        # Attention, Mamba with experts, and Mamba without.
        assert {group.layers for group in device.layers} == {(0, 2), (1,), (3,)}
        assert kinds(device.head) == {kind for kind in KINDS if kind[2] != 8}


def test_memory_that_holds_not_even_a_layer_is_a_failure(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = """
    scope_of = module.scope_of
    module.scope_of = lambda *args, **given: scope_of(*args, **{**given, "device_bytes": 1 << 10})
"""
    break_workers(tmp_path / "hook", monkeypatch, target="pipetune.bench.worker.profiling.profiler", body=body)
    with Fleet.start(ModelSpec(name=str(folder)), DEVICES) as small:
        with pytest.raises(FleetError, match="a single layer between embedding and head needs") as caught:
            small.profile(GRID)
        assert caught.value.failure.kind is FailureKind.OVER_MEMORY_CAP
        assert worker_pids(small), "nothing broke: the workers are still there"


def test_an_allocation_that_fails_names_the_device(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = """
    forward = module.Stage.forward
    def hungry(self, *args, **kwargs):
        module.torch.empty(1 << 46, dtype=module.torch.uint8)
    module.Stage.forward = hungry
"""
    break_workers(tmp_path / "hook", monkeypatch, target="pipetune.bench.runtime.stage.stage", body=body)
    with Fleet.start(ModelSpec(name=str(folder)), DEVICES) as broken, pytest.raises(FleetError) as caught:
        broken.profile(GRID)
    failure = caught.value.failure
    assert failure.kind is FailureKind.OUT_OF_MEMORY
    assert failure.phase == "profile"
    assert failure.device in DEVICES


def test_a_message_lost_while_links_are_timed_is_found(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = """
    send = module.Sender.send
    module.Sender.send = lambda self, tensor: send(self, tensor) if tensor.numel() < 1 << 20 else None
"""
    break_workers(tmp_path / "hook", monkeypatch, target="pipetune.bench.runtime.links", body=body)
    monkeypatch.setattr("pipetune.bench.fleet.supervisor.STUCK_AFTER_S", 2.0)
    with Fleet.start(ModelSpec(name=str(folder)), DEVICES) as broken, pytest.raises(FleetError) as caught:
        broken.profile(GRID)
    failure = caught.value.failure
    assert (failure.kind, failure.phase) == (FailureKind.COMMUNICATION_TIMEOUT, "profile")
    assert "worker on cpu:0 receives, worker on cpu:1 receives" in failure.message
