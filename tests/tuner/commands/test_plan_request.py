"""Which plan `bench` is asked for, and what the files that name it bring along."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipetune.bench.errors import ConfigError, PipetuneError, PlanError
from pipetune.bench.spec import EngineSettings, Lane, Sampling
from pipetune.tuner.commands.plan_request import PlanRequest
from pipetune.tuner.study.plan_file import PlanFile
from tests.record_factory import MODEL, WORKLOAD, make_plan, make_shape

DEVICES = ("cpu:0", "cpu:1")


def request(**values: Any) -> PlanRequest:
    return PlanRequest.of(values)


def plan_file(folder: Path, **fields: Any) -> Path:
    path = folder / "best_plan.json"
    path.write_text(PlanFile(plan=make_plan(prefill=8), **fields).model_dump_json(), encoding="utf-8")
    return path


def test_layers_alone_make_as_many_micro_batches_as_stages() -> None:
    plan = request(layers="17,13").complete(make_shape(), DEVICES, 33)
    assert (plan.layer_counts, plan.micro_batch_size) == ((17, 13), 17)
    assert [stage.memory_fraction for stage in plan.stages] == [0.9, 0.9]


def test_flags_change_a_plan_file(tmp_path: Path) -> None:
    given = request(plan=plan_file(tmp_path), micro_batch_size=4, memory_fraction=0.5)
    plan = given.complete(make_shape(), DEVICES, 32)
    assert (plan.micro_batch_size, plan.prefill_size) == (4, 4)
    assert {stage.memory_fraction for stage in plan.stages} == {0.5}
    assert request(plan=plan_file(tmp_path)).complete(make_shape(), DEVICES, 32) == make_plan(prefill=8)
    with pytest.raises(PlanError, match="larger than micro_batch_size"):
        request(plan=plan_file(tmp_path), prefill_micro_batch_size=99).complete(make_shape(), DEVICES, 32)


def test_a_plan_file_brings_model_workload_and_devices(tmp_path: Path) -> None:
    workload = WORKLOAD.model_copy(update={"prompts_file": "prompts.jsonl", "num_prompts": 7})
    path = plan_file(tmp_path, model=MODEL, workload=workload, devices=("cpu:0", "cpu:1", "cpu:2"))
    values, source = request(plan=path).settings_below()
    assert source == str(path)
    assert values[("model", "name")] == MODEL.name
    assert values[("model", "revision")] == MODEL.revision
    assert values[("workload", "num_prompts")] == 7
    assert values[("workload", "prompts_file")] == str(tmp_path / "prompts.jsonl")
    assert values[("devices",)] == ["cpu:0", "cpu:1", "cpu:2"]


def test_a_device_map_brings_its_devices(tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    path.write_text(
        '{"model.layers.0-9": "cpu:0", "model.layers.10-29": "cpu:1", "lm_head": "cpu:1"}', encoding="utf-8"
    )
    asked = request(device_map=path, micro_batch_size=4)
    assert asked.settings_below()[0] == {("devices",): ["cpu:0", "cpu:1"]}
    assert asked.complete(make_shape(), DEVICES, 32).layer_counts == (10, 20)


def test_a_map_of_other_devices_is_read_by_their_names(tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    path.write_text('{"model.layers.0-9": 0, "model.layers.10-29": "1"}')
    asked = request(device_map=path)
    with pytest.raises(
        PlanError, match=r"cuda:0 is not among the devices cpu:0, cpu:1; .*--device-names cuda:0,cuda:1"
    ):
        asked.complete(make_shape(), ("cpu:0", "cpu:1"), 32)
    plan = asked.complete(make_shape(), ("cpu:0", "cpu:1"), 32, ("cuda:0", "cuda:1"))
    assert (plan.layer_counts, plan.devices) == ((10, 20), ("cpu:0", "cpu:1"))


def test_every_part_of_a_plan_has_a_flag(tmp_path: Path) -> None:
    switches = {"plan_compile": True, "plan_cuda_graphs": None, "plan_packed_weights": False}
    given = request(layers="30", plan_replicas=2, prefill_chunk_size=16, **switches)
    plan = given.complete(make_shape(), DEVICES, 33)
    assert (plan.replicas, plan.devices, plan.micro_batch_size) == (2, DEVICES, 17)
    assert (plan.prefill_chunk_size, plan.compile, plan.packed_weights, plan.cuda_graphs) == (16, True, False, True)
    changed = request(plan=plan_file(tmp_path), prefill_chunk_size=16, micro_batch_size=4, **switches)
    assert changed.complete(make_shape(), DEVICES, 32).describe() == (
        "17+13 · micro-batch 4 (chunk 16) · compiled, unpacked"
    )


def test_lanes_are_given_as_json(tmp_path: Path) -> None:
    lanes = '[{"up_to_tokens": 64, "weight": 4}, {"prefills_per_decode": 1}]'
    plan = request(layers="17,13", lanes=lanes).complete(make_shape(), DEVICES, 32)
    assert plan.lanes == (Lane(up_to_tokens=64, weight=4), Lane(prefills_per_decode=1))
    assert request(plan=plan_file(tmp_path), lanes=lanes).complete(make_shape(), DEVICES, 32).lanes == plan.lanes
    for text, message in (("64", r"lanes"), ("[{]", r"--lanes: .*write JSON"), ('[{"weight": 0}]', "weight")):
        with pytest.raises(PipetuneError, match=message):
            request(layers="17,13", lanes=text).complete(make_shape(), DEVICES, 32)


def test_further_replicas_take_the_devices_that_are_left(tmp_path: Path) -> None:
    four = ("cpu:0", "cpu:1", "cpu:2", "cpu:3")
    plan = request(plan=plan_file(tmp_path), plan_replicas=2).complete(
        make_shape(), ("cpu:3", "cpu:2", "cpu:1", "cpu:0"), 32
    )
    assert plan.devices == ("cpu:0", "cpu:1", "cpu:3", "cpu:2")
    path = tmp_path / "map.json"
    path.write_text('{"model.layers.0-9": "cpu:1", "model.layers.10-29": "cpu:2"}', encoding="utf-8")
    mapped = request(device_map=path, plan_replicas=2).complete(make_shape(), four, 32)
    assert mapped.devices == ("cpu:1", "cpu:2", "cpu:0", "cpu:3")
    with pytest.raises(PlanError, match=r"--replicas 2: so many pipelines of 2 stages need 4 devices; given are 2"):
        request(layers="17,13", plan_replicas=2).complete(make_shape(), DEVICES, 32)


def test_a_plan_file_brings_the_devices_of_all_replicas_and_how_it_samples(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    workload = WORKLOAD.model_copy(update={"sampling": Sampling(temperature=0.5)})
    plan = make_plan((30,), 8, replicas=2)
    path.write_text(PlanFile(plan=plan, workload=workload).model_dump_json(), encoding="utf-8")
    values, _ = request(plan=path).settings_below()
    assert values[("devices",)] == ["cpu:0", "cpu:1"]
    assert values[("workload", "sampling", "temperature")] == 0.5
    assert request(plan=path).complete(make_shape(), DEVICES, 32) == plan


def test_one_way_to_name_a_plan_is_wanted(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not none"):
        request()
    with pytest.raises(ConfigError, match="not --plan and --layers"):
        request(plan=tmp_path, layers="1")


def test_caps_are_given_for_every_stage() -> None:
    plan = request(layers="17,13", memory_fraction=0.5, max_memory_bytes="600MiB").complete(make_shape(), DEVICES, 32)
    assert plan.describe().endswith("· cap 0.5 · cap 600 MiB")
    assert [stage.cap_bytes(2 * 2**30) for stage in plan.stages] == [600 * 2**20] * 2
    assert [stage.cap_bytes(2**30) for stage in plan.stages] == [2**29] * 2
    for field, value, why in (
        ("memory_fraction", 1.5, "less than or equal to 1"),
        ("max_memory_bytes", "much", "600MiB"),
    ):
        with pytest.raises(PlanError, match=f"--layers: stages.0.{field}: .*{why}"):
            request(layers="30", **{field: value}).complete(make_shape(), DEVICES, 32)


def test_more_stages_than_devices_are_refused() -> None:
    with pytest.raises(PlanError, match="--layers: 3 stages need as many devices"):
        request(layers="10,10,10").complete(make_shape(), DEVICES, 32)


def test_an_engine_takes_the_split_and_its_own_settings(tmp_path: Path) -> None:
    flags = {"engine_python": "python", "max_num_seqs": 8, "kv_cache_memory_bytes": "64MiB"}
    plan = request(plan=plan_file(tmp_path), **flags).complete(make_shape(), DEVICES, 32)
    assert plan.layer_counts == make_plan().layer_counts
    assert plan.engine == EngineSettings(max_num_seqs=8, kv_cache_memory_bytes=2**26)
    # What is in the file is kept, but for what a flag says.
    path = tmp_path / "engine.json"
    path.write_text(PlanFile(plan=plan).model_dump_json())
    again = request(plan=path, engine_python="python", max_num_seqs=9).complete(make_shape(), DEVICES, 32)
    assert again.engine == EngineSettings(max_num_seqs=9, kv_cache_memory_bytes=2**26)
    assert request(layers="17,13", max_num_seqs=9).complete(make_shape(), DEVICES, 32).engine is None


def test_the_engine_is_the_one_that_a_flag_or_the_file_names(tmp_path: Path) -> None:
    flags: dict[str, Any] = {"layers": "17,13", "engine_python": "python", "name": "sglang"}
    asked = request(**flags)
    plan = asked.complete(make_shape(), DEVICES, 32)
    assert (asked.engine_name, plan.engine) == ("sglang", EngineSettings(name="sglang"))
    path = tmp_path / "sglang.json"
    path.write_text(PlanFile(plan=plan).model_dump_json())
    assert request(plan=path, engine_python="python", max_num_seqs=8).engine_name == "sglang"
    assert request(plan=path, engine_python="python", name="vllm").engine_name == "vllm"
    assert request(plan=plan_file(tmp_path), engine_python="python").engine_name == "vllm"
