"""Settings as one value: constraints as text, studies by safe names, metrics that the workload can yield."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipetune.bench.errors import ConfigError
from pipetune.tuner.config.schema import Constraint, TuneConfig, check_metrics


def config(**values: Any) -> TuneConfig:
    return TuneConfig.model_validate({"model": {"name": "m"}, "devices": "cpu:0-1", **values})


@pytest.mark.parametrize("text", ["p90_ttft_ms<=500", "output_throughput>=1234567.5", "bubble_ratio<=0.05"])
def test_a_constraint_reads_back_as_it_was_written(text: str) -> None:
    constraint = Constraint.model_validate(text)
    assert str(constraint) == text
    assert Constraint.model_validate_json(constraint.model_dump_json()) == constraint


@pytest.mark.parametrize("text", ["p90_ttft_ms", "p90_ttft_ms<500", "<=5", "a<=b", "a<=1e999", ""])
def test_what_is_no_constraint_is_refused(text: str) -> None:
    with pytest.raises(ValidationError):
        Constraint.model_validate(text)


@given(limit=st.floats(0.01, 1e6), value=st.floats(0.0, 1e7))
def test_excess_is_graded_and_positive_only_when_broken(limit: float, value: float) -> None:
    at_most = Constraint(metric="a", operator="<=", limit=limit)
    at_least = Constraint(metric="a", operator=">=", limit=limit)
    assert (at_most.excess(value) > 0) == (value > limit)
    assert at_most.excess(value) == -at_least.excess(value)


def test_devices_are_expanded() -> None:
    assert config(devices="cuda:0-2").devices == ("cuda:0", "cuda:1", "cuda:2")
    assert config(devices=["cpu:0", "cpu:1"]).concrete_devices == ("cpu:0", "cpu:1")
    assert config(devices="auto").devices == "auto"


def test_more_stages_than_devices_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"space\.max_stages=3 needs as many devices"):
        config(space={"max_stages": 3})


@pytest.mark.parametrize("name", ["../x", "a/b", ".hidden", "", "-x", "a" * 65, "a b"])
def test_a_study_name_stays_within_results(name: str) -> None:
    with pytest.raises(ValidationError, match="no study name"):
        config(name=name)


def test_a_percentile_without_enough_prompts_is_refused_with_what_it_needs() -> None:
    with pytest.raises(ConfigError, match=r"p99_ttft_ms needs at least 100 prompts and this workload has 32"):
        check_metrics(config(constraints=["p99_ttft_ms<=5"]))
    check_metrics(config(constraints=["p99_ttft_ms<=5"], workload={"num_prompts": 100}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"objectives": ["throughput"]}, "throughput is no metric of this workload; did you mean output_throughput"),
        ({"objectives": ["speed"]}, "speed is no metric of this workload; there are: .*output_throughput"),
        ({"objectives": ["energy_j"]}, "only measured on GPUs"),
        ({"objectives": ["mean_tpot_ms"], "workload": {"output_len": 1}}, "at least 2 tokens"),
        ({"objectives": ["bubble_ratio"], "protocol": {"instrument": False}}, "needs protocol.instrument"),
        ({"constraints": ["p90_ttft_ms<=1"], "workload": {"num_prompts": 9}}, "at least 10 prompts"),
    ],
)
def test_metrics_that_the_workload_cannot_yield_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_metrics(config(**values))


def test_where_texts_are_scored_all_tokens_count() -> None:
    scored = config(workload={"kind": "score"})
    assert scored.objectives == ("total_token_throughput",)
    assert config().objectives == ("output_throughput",)
    assert config(workload=scored.workload).objectives == ("total_token_throughput",)
    check_metrics(scored)
    check_metrics(config(workload={"kind": "score"}, objectives=["mean_e2el_ms"], constraints=["bubble_ratio<=0.3"]))


@pytest.mark.parametrize("metric", ["output_throughput", "mean_ttft_ms", "p90_tpot_ms"])
def test_metrics_of_generated_tokens_are_refused_where_texts_are_scored(metric: str) -> None:
    with pytest.raises(ConfigError, match=f"{metric} counts generated tokens.*total_token_throughput.*--workload-kind"):
        check_metrics(config(workload={"kind": "score"}, objectives=[metric]))


def test_chunks_and_switches_read_words() -> None:
    space = config(space={"prefill_chunk_sizes": "64,whole", "compile": "Search", "replicas": "1,2"}).space
    assert space.prefill_chunk_sizes == (64, None)
    assert space.compile == "search"
    assert space.replicas == (1, 2)
    assert [config(space={"compile": word}).space.compile for word in ("true", "off", True)] == [True, False, True]
    assert config(space={"prefill_chunk_sizes": [None, 32]}).space.prefill_chunk_sizes == (None, 32)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"compile": "often"}, "neither true nor false nor search"),
        ({"prefill_chunk_sizes": "64,half"}, "'half' is neither a number of tokens nor whole"),
        ({"prefill_chunk_sizes": [0]}, "greater than or equal to 1"),
        ({"replicas": [3]}, r"space\.replicas=3 needs as many devices"),
        ({"replicas": [2], "min_stages": 2}, r"space\.replicas=2 of at least 2 stages .* need 4 devices"),
    ],
)
def test_bounds_that_cannot_be_met_are_refused(space: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config(space=space)


def test_gpu_metrics_are_there_on_gpus_alone() -> None:
    check_metrics(config(objectives=["energy_j"], devices="cuda:0"))
    with pytest.raises(ConfigError, match="energy_j"):
        check_metrics(config(objectives=["energy_j"], devices="cpu:0"))
