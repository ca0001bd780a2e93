"""Device maps: complete for transformers, readable with ranges, and every mistake named."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipetune.bench.errors import ConfigError, PlanError
from pipetune.bench.spec import Plan
from pipetune.tuner.planning.partition.device_map import hf_map, plan_from_map, ranges_map, read_device_map
from tests.record_factory import make_shape

TIED = make_shape()
UNTIED = TIED.model_copy(update={"tied": False, "head_bytes": TIED.embedding_bytes})
CUDA = ("cuda:0", "cuda:1", "cuda:2", "cuda:3")


def back(device_map: dict[str, Any], **options: Any) -> Plan:
    return plan_from_map(device_map, UNTIED, micro_batch_size=4, **options)


@given(cuts=st.sets(st.integers(1, 29), max_size=3))
def test_both_forms_read_back_as_the_same_stages(cuts: set[int]) -> None:
    bounds = [0, *sorted(cuts), 30]
    counts = tuple(end - first for first, end in itertools.pairwise(bounds))
    plan = Plan.from_layer_counts(counts, CUDA, 4)
    for shape in (TIED, UNTIED):
        for form in (hf_map, ranges_map):
            assert plan_from_map(form(shape, plan), shape, micro_batch_size=4) == plan


def test_a_map_for_transformers_names_every_module() -> None:
    device_map = hf_map(UNTIED, Plan.from_layer_counts((17, 13), CUDA, 4))
    layers = {f"model.layers.{index}" for index in range(30)}
    assert set(device_map) == layers | {"model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"}
    assert (device_map["model.layers.16"], device_map["model.layers.17"]) == ("cuda:0", "cuda:1")
    assert (device_map["model.embed_tokens"], device_map["lm_head"]) == ("cuda:0", "cuda:1")


def test_a_tied_head_goes_with_the_embedding() -> None:
    device_map = hf_map(TIED, Plan.from_layer_counts((17, 13), CUDA, 4))
    assert (device_map["lm_head"], device_map["model.norm"]) == ("cuda:0", "cuda:1")


def test_cpu_workers_become_cpu_unless_they_are_given_names() -> None:
    plan = Plan.from_layer_counts((17, 13), ("cpu:0", "cpu:1"), 4)
    assert set(hf_map(TIED, plan).values()) == {"cpu"}
    assert hf_map(UNTIED, plan, ("cuda:3", "cuda:5"))["lm_head"] == "cuda:5"
    assert ranges_map(UNTIED, plan, ("cuda:3", "cuda:5"))["model.layers.17-29"] == "cuda:5"
    with pytest.raises(ConfigError, match="2 stages and 1 names"):
        hf_map(TIED, plan, ("cuda:0",))


def test_ranges_alone_are_enough() -> None:
    plan = back({"model.layers.0-15": "cuda:0", "model.layers.16-29": "cuda:1"})
    assert plan.layer_counts == (16, 14)
    assert [stage.device for stage in plan.stages] == ["cuda:0", "cuda:1"]


def test_the_longest_name_decides_as_in_transformers() -> None:
    plan = back({"": 0, "model.layers.20-29": 1, "model.norm": 1, "lm_head": 1})
    assert plan.layer_counts == (20, 10)
    assert [stage.device for stage in plan.stages] == ["cuda:0", "cuda:1"]


@pytest.mark.parametrize(("first", "second"), [(0, 1), ("0", "1"), ("cuda", "cuda:1"), (0, "cpu"), ("cpu:1", "0")])
def test_devices_are_spelled_as_from_pretrained_takes_them(first: object, second: object) -> None:
    names = {0: "cuda:0", 1: "cuda:1", "0": "cuda:0", "1": "cuda:1", "cuda": "cuda:0", "cpu": "cpu:0"}
    plan = back({"model.layers.0-15": first, "model.layers.16-29": second, "lm_head": second})
    assert plan.devices == (names.get(first, first), names.get(second, second))


OLD = "language_model.model."


@pytest.mark.parametrize("prefix", [OLD, "base_model.model.model.", ""])
def test_what_older_transformers_and_wrappers_put_before_a_name_does_not_matter(prefix: str) -> None:
    ends = {f"{prefix}embed_tokens": 0, f"{prefix}norm": 1, "language_model.lm_head" if prefix == OLD else "lm_head": 1}
    assert back({f"{prefix}layers.{index}": index // 20 for index in range(30)} | ends).layer_counts == (20, 10)


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        (
            {f"transformer.h.{index}": 0 for index in range(30)} | {"transformer.wte": 0},
            r"its layers are transformer\.h\.N, unknown to LlamaForCausalLM; did you mean model\.layers\.N",
        ),
        ({"": 0} | {f"x{index}": 0 for index in range(9)}, "'x0', 'x1', 'x2' and 6 more"),
        *(({"": value}, f"on {value!r}; a stage runs on") for value in ("disk", "mps", True, 0.0, None, -1, "cuda:²")),
        ({"model.layers.0-14": 0, "model.layers.16-29": 1}, r"layer 15 is missing \(model\.layers has 0-29\)"),
        ({"model.layers.0-9": 0}, "layer 10-29 is missing"),
        ({"lm_head": 0}, "layer 0-29 is missing"),
        ({"model.layers.0-15": 0, "model.layers.15-29": 1}, "layer 15 is given twice"),
        ({"model.layers.0-29": 0, "model.layers.3": 0}, "layer 3 is given twice"),
        ({"model.layers.0-30": 0}, r"unknown to LlamaForCausalLM: 'model\.layers\.0-30'"),
        ({"model.layers.0-29": 0, "lm_haed": 0}, r"unknown .*'lm_haed' \(did you mean 'lm_head'\?\)"),
        ({"transformer.h.0-29": 0}, "unknown"),
        ({"model.layers.9-0": 0}, "runs backwards; write model.layers.0-9"),
        ({"model.layers.0-29": 0, "model.layers.3.mlp": 1}, "inside a layer"),
        ({"model.layers.0-9": 0, "model.layers.10-19": 1, "model.layers.20-29": 0}, "not neighbours"),
        ({"model.layers.0-9": 0, "model.layers.10-29": 1, "lm_head": 0}, "lm_head is on cuda:0, and must be where"),
        ({"model.layers.0-9": 0, "model.layers.10-29": 1, "model.embed_tokens": 1}, "embed_tokens is on cuda:1"),
        ({"model.layers.0-29": "disk"}, "'disk'; a stage runs on cpu:N or cuda:N"),
        ({"model.layers.0-29": True}, "a stage runs on"),
        ({"model.layers.0-29": -1}, "a stage runs on"),
    ],
)
def test_mistakes_are_named(device_map: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=f"my map: .*{message}"):
        back(device_map, place="my map")


def test_a_file_with_a_doubled_key_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    path.write_text('{"model.layers.0-9": 0, "model.layers.0-9": 1}', encoding="utf-8")
    with pytest.raises(PlanError, match=r"map\.json: model\.layers\.0-9 is given twice"):
        read_device_map(path)


@pytest.mark.parametrize(("text", "message"), [("{", "not JSON"), ("[]", "JSON object"), ("{}", "JSON object")])
def test_a_file_that_holds_no_map_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "map.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(PlanError, match=message):
        read_device_map(path)
    with pytest.raises(PlanError, match="cannot read"):
        read_device_map(tmp_path / "none.json")


def test_a_file_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    written = ranges_map(UNTIED, Plan.from_layer_counts((17, 13), CUDA, 4))
    path.write_text(json.dumps(written), encoding="utf-8")
    assert read_device_map(path) == written
