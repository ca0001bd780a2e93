"""The trace against the rules of its format and against the record it shows."""

from __future__ import annotations

import gzip
import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pipetune.bench import metrics
from pipetune.tuner.report.data import Report
from pipetune.tuner.report.files import write_report
from pipetune.tuner.report.trace import trace_events
from pipetune.tuner.study.files import load_study
from tests.record_factory import make_measurement, make_plan
from tests.study_factory import write_study

PLAN = make_plan((8, 12, 10), 8, prefill=4)
MEASUREMENT = make_measurement(PLAN)
EVENTS = trace_events(MEASUREMENT, 0, PLAN)


def spans(stage: int, track: int) -> list[dict[str, Any]]:
    return [event for event in EVENTS if event["ph"] == "X" and (event["pid"], event["tid"]) == (stage + 1, track)]


def test_every_stage_is_a_named_process_with_named_tracks() -> None:
    names = {event["pid"]: event["args"]["name"] for event in EVENTS if event["name"] == "process_name"}
    assert names == {
        1: "stage 0 · cpu:0 · layers 0-7",
        2: "stage 1 · cpu:1 · layers 8-19",
        3: "stage 2 · cpu:2 · layers 20-29",
    }
    tracks = [event["args"]["name"] for event in EVENTS if event["name"] == "thread_name" and event["pid"] == 1]
    assert tracks == ["compute", "receive wait", "send wait"]


@pytest.mark.parametrize("stage", range(3))
def test_compute_spans_are_the_records_in_microseconds(stage: int) -> None:
    own = spans(stage, 1)
    trace = MEASUREMENT.iterations[0].stages[stage]
    assert len(own) == len(MEASUREMENT.tasks)
    assert [event["ts"] for event in own] == pytest.approx([start * 1e6 for start in trace.compute_start_s], abs=1e-3)
    total_us = sum(event["dur"] for event in own)
    assert total_us == pytest.approx(metrics.stage_busy_s(MEASUREMENT, 0)[stage] * 1e6, rel=1e-6)
    for event, task in zip(own, MEASUREMENT.tasks, strict=True):
        assert event["args"] == {
            "micro_batch": task.micro_batch,
            "step": task.step,
            "rows": task.end_row - task.first_row,
        }


@pytest.mark.parametrize("stage", range(3))
@pytest.mark.parametrize("track", [1, 2, 3])
def test_spans_of_a_track_do_not_overlap(stage: int, track: int) -> None:
    own = sorted(spans(stage, track), key=lambda event: event["ts"])
    for before, after in itertools.pairwise(own):
        assert before["ts"] + before["dur"] <= after["ts"] + 2e-3


def test_arrows_run_forward_in_time_between_spans_that_exist() -> None:
    starts = {event["id"]: event for event in EVENTS if event["ph"] == "s"}
    ends = {event["id"]: event for event in EVENTS if event["ph"] == "f"}
    assert starts.keys() == ends.keys()
    prefills = sum(task.step == 0 for task in MEASUREMENT.tasks)
    names = Counter(event["name"] for event in starts.values())
    assert names == {"hidden states": 2 * len(MEASUREMENT.tasks), "tokens": len(MEASUREMENT.tasks) - prefills}
    for number, start in starts.items():
        assert start["ts"] < ends[number]["ts"]
        for end in (start, ends[number]):
            around = [e for e in spans(end["pid"] - 1, end["tid"]) if e["ts"] <= end["ts"] <= e["ts"] + e["dur"]]
            assert around


def test_replicas_are_processes_of_their_own_and_chunks_are_named() -> None:
    plan = make_plan((16, 14), 8, prefill=4, chunk=32, replicas=2)
    measurement = make_measurement(plan)
    events = trace_events(measurement, 0, plan)
    names = [event["args"]["name"] for event in events if event["name"] == "process_name"]
    assert names == [
        "replica 0 stage 0 · cpu:0 · layers 0-15",
        "replica 0 stage 1 · cpu:1 · layers 16-29",
        "replica 1 stage 0 · cpu:2 · layers 0-15",
        "replica 1 stage 1 · cpu:3 · layers 16-29",
    ]
    assert measurement.replica_tasks is not None
    compute = [event for event in events if event["ph"] == "X" and event["tid"] == 1]
    assert [sum(event["pid"] == pid for event in compute) for pid in range(1, 5)] == [
        count for count in measurement.replica_tasks for _ in range(2)
    ]
    batches = [{event["args"]["micro_batch"] for event in compute if event["pid"] == pid} for pid in range(1, 5)]
    assert batches[0] == batches[1] == {0, 1}
    assert batches[2] == batches[3] == {2, 3}
    assert "prefill m2 rows 4–7 tokens 32–63" in {event["name"] for event in compute}
    flows = [event for event in events if event["ph"] in "sf"]
    assert len({event["id"] for event in flows}) == len(flows) // 2
    pairs = {(event["id"], (event["pid"] - 1) // 2) for event in flows}
    assert len(pairs) == len(flows) // 2, "no arrow crosses from replica to replica"


def test_the_file_is_gzipped_json_and_says_what_it_shows(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study")
    write_report(Report.of(load_study(folder)))
    document = json.loads(gzip.decompress((folder / "trace.json.gz").read_bytes()))
    assert document["otherData"]["plan"].startswith("16+14 · micro-batch 16")
    assert {event["ph"] for event in document["traceEvents"]} == {"M", "X", "s", "f"}
