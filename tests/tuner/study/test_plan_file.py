"""Plan files: what is written reads back, bare plans are taken too, and mistakes are named."""

from __future__ import annotations

import bisect
import json
import shlex
from pathlib import Path

import pytest
import yaml

from pipetune.bench.errors import PlanError
from pipetune.bench.spec import Plan
from pipetune.tuner.study.plan_file import FORMATS, MAPS, PlanFile, read_plan, render, write_best
from tests.record_factory import MODEL, WORKLOAD, make_machine, make_plan, make_shape

FILE = PlanFile(plan=make_plan(prefill=8), model=MODEL, workload=WORKLOAD, in_flight=2, metrics={"duration_s": 1.0})


def test_a_study_exports_a_plan_and_a_map(tmp_path: Path) -> None:
    write_best(tmp_path, FILE, make_shape())
    assert read_plan(tmp_path / "best_plan.json") == FILE
    device_map = json.loads((tmp_path / "best_device_map.json").read_text(encoding="utf-8"))
    assert len(device_map) == 30 + 4
    assert set(device_map.values()) == {"cpu"}


def test_a_bare_plan_is_a_plan_file_too(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(FILE.plan.model_dump_json(), encoding="utf-8")
    assert read_plan(path) == PlanFile(plan=FILE.plan)


def test_every_form_ends_with_a_newline() -> None:
    assert all(render(FILE, make_shape(), form).endswith("\n") for form in FORMATS)


def test_engines_get_counts_and_the_number_of_stages() -> None:
    assert render(FILE, make_shape(), "vllm").splitlines()[-1] == "VLLM_PP_LAYER_PARTITION=17,13"
    assert "--pipeline-parallel-size 2" in render(FILE, make_shape(), "vllm")
    assert render(FILE, make_shape(), "sglang").splitlines()[-1] == "SGLANG_PP_LAYER_PARTITION=17,13"
    options = yaml.safe_load(render(FILE, make_shape(), "trtllm"))
    assert options == {"pipeline_parallel_size": 2, "pp_partition": [17, 13]}


@pytest.mark.parametrize("counts", [(17, 13), (1, 29), (29, 1), (10, 7, 13), (30,)])
def test_llama_cpp_gives_each_device_its_layers(counts: tuple[int, ...]) -> None:
    plan = Plan.from_layer_counts(counts, ("cpu:0", "cpu:1", "cpu:2"), 1)
    line = render(PlanFile(plan=plan), make_shape(), "llama.cpp").splitlines()[-1]
    shares = [float(part) for part in line.removeprefix("--tensor-split ").split(",")]
    splits = [sum(shares[: place + 1]) / sum(shares) for place in range(len(shares))]
    # Its rule: of all layers and the output layer, each lies on the first device whose share ends behind it.
    positions = sum(counts) + 1
    held = [
        sum(bisect.bisect_right(splits, at / positions) == place for at in range(positions))
        for place in range(len(shares))
    ]
    assert held == [*counts[:-1], counts[-1] + 1]


def test_replicas_are_said_where_a_form_cannot_hold_them(tmp_path: Path) -> None:
    file = FILE.model_copy(update={"plan": make_plan((17, 13), 8, chunk=32, replicas=2, compile=True)})
    write_best(tmp_path, file, make_shape())
    assert read_plan(tmp_path / "best_plan.json") == file
    first = FILE.model_copy(update={"plan": make_plan((17, 13), 8)})
    for form in MAPS:
        assert render(file, make_shape(), form) == render(first, make_shape(), form)
    lines = render(file, make_shape(), "vllm").splitlines()
    assert lines[1] == "# The plan runs 2 replicas side by side: --data-parallel-size 2, not measured either."
    assert lines[-1] == "VLLM_PP_LAYER_PARTITION=17,13"
    assert "--dp-size 2, not measured" in render(file, make_shape(), "sglang")
    assert "replicas" not in render(FILE, make_shape(), "vllm")


def test_engines_side_by_side_have_cores_and_ports_of_their_own() -> None:
    plan = Plan.from_layer_counts((16, 14), tuple(f"cpu:{index}" for index in range(4)), 1, replicas=2)
    settings = {"max_num_batched_tokens": 256}
    plan = Plan.model_validate(plan.model_dump() | {"engine": settings})
    file = PlanFile(plan=plan, model=MODEL, workload=WORKLOAD)
    machine = make_machine()
    machine = machine.model_copy(update={"hardware": machine.hardware.model_copy(update={"cpu_cores": 9})})
    machine = machine.model_copy(update={"hostname": "a\nb; reboot"})
    lens = (64,) * WORKLOAD.num_prompts
    text = render(file, make_shape(), "vllm", machine=machine, prompt_lens=lens)
    remarks = [line for line in text.splitlines() if line.startswith("#")]
    assert remarks[0].startswith("# Measured on vLLM of a version not known on a b; reboot (Example CPU")
    assert any("2 engines side by side" in line for line in remarks)
    assert any("vLLM's default" in line for line in remarks)
    commands = [shlex.split(one) for one in text.replace("\\\n", "").splitlines() if not one.startswith("#")]
    assert [one[1] for one in commands] == [
        "VLLM_CPU_OMP_THREADS_BIND=0,1|2,3",
        "VLLM_CPU_OMP_THREADS_BIND=4,5|6,7",
    ]
    assert [one[-2:] for one in commands] == [["--port", "8000"], ["--port", "8001"]]
    # 0.9 of a device, of which there are four.
    assert commands[0][commands[0].index("--gpu-memory-utilization") + 1] == "0.225"
    assert "--max-num-seqs" not in commands[0]
    # Of a machine that is not known nothing is said.
    assert "Not measured on vLLM" in render(file, make_shape(), "vllm")


def _without_a_layer() -> str:
    values = Plan.from_layer_counts((2, 2), ("cpu:0", "cpu:1"), 1).model_dump()
    values["stages"][1]["first_layer"] = 3
    return json.dumps({"plan": values})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no plan of this version: Expecting"),
        ("[]", "plan.json"),
        ('{"plan": {"stages": [], "micro_batch_size": 1}}', r"plan\.stages: "),
        ('{"plan": {}, "colour": 1}', "plan"),
        (_without_a_layer(), r"layer 2 is missing before 3"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(PlanError, match=message):
        read_plan(path)
    with pytest.raises(PlanError, match="cannot read the plan"):
        read_plan(tmp_path / "none.json")
