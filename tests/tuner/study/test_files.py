"""Files that a study did not write: the tool that did is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipetune.tuner.study.files import _TOOLS, written_by
from tests.study_factory import write_study

BENCHMARK = {"name": "plan", "stats": {"mean": 0.1}, "extra_info": {}}
SAMPLES: dict[str, Any] = {
    "vllm bench serve, or SGLang's bench_serving": {"request_throughput": 3.2, "mean_ttft_ms": 41.0, "completed": 100},
    "vllm bench throughput": {"elapsed_time": 9.1, "requests_per_second": 11.0, "tokens_per_second": 5000.0},
    "vllm bench latency": {"avg_latency": 1.2, "latencies": [1.1, 1.3], "percentiles": {"50": 1.2}},
    "llama-bench": [{"build_commit": "5143fa8", "n_prompt": 512, "n_gen": 0, "avg_ts": 100.1}],
    "asv": {"commit_hash": "5143fa8", "env_name": "py3.11", "results": {}, "python": "3.11"},
    "Google Benchmark": {"context": {"num_cpus": 2}, "benchmarks": [{"name": "BM_a", "real_time": 1.0}]},
    "pytest-benchmark, by another suite than pipetune's": {"machine_info": {}, "benchmarks": [BENCHMARK]},
    "hyperfine": {"results": [{"command": "sleep 1", "mean": 1.0, "stddev": 0.1}]},
    "github-action-benchmark": {"lastUpdate": 1, "repoUrl": "https://example.org", "entries": {}},
    "a tool for github-action-benchmark": [{"name": "a", "unit": "ms", "value": 1.0}],
}
"""What tools write, cut short."""


@pytest.mark.parametrize("tool", _TOOLS)
def test_the_tool_that_wrote_a_file_is_named(tool: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps(SAMPLES[tool], indent=1))
    assert written_by(tmp_path / "results.json") == f" (written by {tool})"


def test_no_tool_is_named_for_what_is_ours_or_nobodys(tmp_path: Path) -> None:
    for path in write_study(tmp_path / "study").rglob("*.*"):
        assert written_by(path) == ""
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    assert written_by(tmp_path / "binary") == written_by(tmp_path) == written_by(tmp_path / "missing") == ""
