"""A whole study of another engine's plans, run by hosts that speak its protocol."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pipetune.bench.engines.vllm import VllmEngine
from pipetune.bench.errors import ConfigError
from pipetune.bench.record import Measurement, Record
from pipetune.tuner.commands.conclude import document
from pipetune.tuner.commands.plan import Planned
from pipetune.tuner.commands.plan_document import document_of, json_of
from pipetune.tuner.config.schema import TuneConfig
from pipetune.tuner.planning.costs.described import read_devices
from pipetune.tuner.progress import Reporter
from pipetune.tuner.report.data import Report
from pipetune.tuner.report.render.markdown import render_markdown
from pipetune.tuner.search.driver import rank_study, run_study
from pipetune.tuner.study.files import load_study
from pipetune.tuner.study.plan_file import read_plan
from pipetune.tuner.study.store import StudyStore
from tests.bench.engines import fake_host
from tests.bench.engines.conftest import describe

CONFIG = {
    "model": {"name": "m"},
    "devices": "cpu:0-1",
    "workload": {"num_prompts": 8, "input_len": 16, "output_len": 4},
    "protocol": {"num_iters": 1, "num_iters_warmup": 0, "max_warmup": 0, "hang_timeout_s": 2.0},
    "engine": {"python": sys.executable},
    "space": {"min_stages": 2},
    "baseline_batch_sizes": "8",
    "n_trials": 4,
    "stop_early": False,
    "finalists": 1,
    "finalist_rounds": 2,
    "max_finalist_rounds": 2,
}


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    told = {"told": str(tmp_path / "told"), "fast_layers": 14}
    monkeypatch.setenv("FAKE_HOST", json.dumps(told))
    return partial(VllmEngine, python=Path(sys.executable), script=Path(fake_host.__file__), start_fleet=describe)


def run(folder: Path, start: Any, config: TuneConfig, *, resume: bool = False) -> tuple[Record, ...]:
    with StudyStore.resume(folder, config) if resume else StudyStore.create(folder, config) as store:
        assert run_study(store, Reporter(), start_fleet=start)
        return store.records


def budgets(records: Sequence[Record]) -> list[int | None]:
    plans = [one.spec.plan for one in records if one.role == "trial" and one.spec]
    return [plan.engine.max_num_batched_tokens for plan in plans if plan.engine]


def test_a_study_begins_with_the_engine_as_it_is_and_says_what_is_gained(tmp_path: Path, start: Any) -> None:
    config = TuneConfig.model_validate(CONFIG)
    records = run(tmp_path / "s", start, config)
    assert all(isinstance(one.result, Measurement) for one in records)
    assert [one.role for one in records[:2]] == ["baseline", "trial"]
    assert budgets(records)[0] is None
    report = Report.of(load_study(tmp_path / "s"))
    best, default = report.ranking.best, report.ranking.engine_default
    assert best is not None
    assert best.plan.layer_counts[0] <= 14
    assert default is not None
    assert default.row.plan.is_engine_default
    assert default.gain is not None
    assert default.gain.paired
    assert default.gain.value > 1.5
    told = document(report)["engine_default"]
    assert told["gain_over_it"]["value"] == pytest.approx(default.gain.value)


def test_an_earlier_study_of_the_engine_teaches_and_its_best_plan_runs_behind_the_default(
    tmp_path: Path, start: Any
) -> None:
    run(tmp_path / "a", start, TuneConfig.model_validate(CONFIG))
    best = Report.of(load_study(tmp_path / "a")).ranking.best
    assert best is not None
    warm = {**CONFIG, "n_trials": 2, "finalists": 0, "warm_start": [str(tmp_path / "a")]}
    records = run(tmp_path / "b", start, TuneConfig.model_validate(warm))
    trials = [one.spec.plan for one in records if one.role == "trial" and one.spec]
    assert trials[0].is_engine_default
    assert trials[1] == best.plan
    (said,) = json.loads((tmp_path / "b" / "warm_start.json").read_text(encoding="utf-8"))["said"]
    assert "last runs teach the cost model" in said


def test_a_study_and_a_prediction_of_requests_that_come_over_time(tmp_path: Path, start: Any) -> None:
    workload = {"num_prompts": 12, "input_len": 16, "output_len": 4, "arrivals": {"request_rate": 20}}
    asked = {**CONFIG, "workload": workload | {"goodput": ["ttft:150", "tpot:60"]}, "objectives": ["mean_e2el_ms"]}
    records = run(tmp_path / "s", start, TuneConfig.model_validate(asked))
    assert all(isinstance(one.result, Measurement) for one in records)
    assert {one.role for one in records} == {"trial", "finalist"}, "the un-pipelined model takes prompts by the batch"
    report = Report.of(load_study(tmp_path / "s"))
    best, default = report.ranking.best, report.ranking.engine_default
    assert best is not None
    assert best.plan.layer_counts[0] <= 14
    assert default is not None
    planned = Planned(
        TuneConfig.model_validate(asked | {"warm_start": [str(tmp_path / "s")]}), Reporter(), start_fleet=start
    )
    assert planned.plans[0].load is not None
    rates = [one.metrics["max_request_rate"] for one in planned.plans]
    assert min(rates) > 0
    screen = render_markdown(document_of(planned))
    assert "| budget/seqs | KV | TTFT p90 |" in screen
    assert not re.search("in each of the slots", screen)


def test_finals_are_served_where_that_is_asked_for(tmp_path: Path, start: Any) -> None:
    asked = {**CONFIG, "engine": {"python": sys.executable, "served_finals": True}}
    records = run(tmp_path / "s", start, TuneConfig.model_validate(asked))
    by_role: dict[str, set[bool]] = {}
    for one in records:
        if one.spec and one.spec.plan.engine:
            by_role.setdefault(one.role, set()).add(one.spec.plan.engine.served)
    assert by_role == {"trial": {False}, "finalist": {True}}
    report = Report.of(load_study(tmp_path / "s"))
    best, default = report.ranking.best, report.ranking.engine_default
    assert best is not None
    assert best.in_finals
    assert best.effective.key != best.effective.by(served=False).key
    assert default is not None
    assert default.gain is not None
    assert default.gain.paired
    # What is compared with in process is not compared with what was served.
    assert best.speedup_over_baseline is None


def test_plans_are_predicted_by_what_an_earlier_study_saw_of_the_engine(tmp_path: Path, start: Any) -> None:
    run(tmp_path / "a", start, TuneConfig.model_validate(CONFIG))
    default = Report.of(load_study(tmp_path / "a")).ranking.engine_default
    assert default is not None
    nominal = Planned(TuneConfig.model_validate(CONFIG), Reporter(), start_fleet=start, top=1000)
    assert nominal.source.remedy is not None
    assert "--warm-start" in nominal.source.remedy
    warm = TuneConfig.model_validate({**CONFIG, "warm_start": [str(tmp_path / "a")]})
    planned = Planned(warm, Reporter(), start_fleet=start, top=1000)
    was, now = (next(one for one in own.plans if one.plan == default.row.plan) for own in (nominal, planned))
    # Of each of four steps the fake's stages compute for 10 ms, and the last one samples for 2 ms.
    assert [stage.busy_s for stage in now.stages] == pytest.approx([0.040, 0.048], rel=0.1)
    assert was.stages[0].busy_s > 0.1
    assert json_of(planned)["plans"][0]["plan"]["engine"]["name"] == "vllm"
    screen = render_markdown(document_of(planned))
    assert "| budget/seqs | tok/s |" in screen
    assert re.search(r"nominal rates, corrected by \d+ earlier runs", screen), screen
    assert "last runs teach the cost model" in screen
    assert not re.search("micro-batch|prefilled", screen), screen
    planned.write(tmp_path / "plan.json")
    assert read_plan(tmp_path / "plan.json").plan == planned.plans[0].plan


def test_what_an_engines_plans_are_not_predicted_from_is_refused(start: Any) -> None:
    config = TuneConfig.model_validate(CONFIG)
    with pytest.raises(ConfigError, match="leave --device-file out"):
        Planned(config, Reporter(), described=read_devices(Path("2xH100")), start_fleet=start)
    with pytest.raises(ConfigError, match="leave --profile out"):
        Planned(config, Reporter(), profile_file=Path("p.json"), start_fleet=start)


def test_a_stopped_study_goes_on_with_its_space(tmp_path: Path, start: Any) -> None:
    short = TuneConfig.model_validate({**CONFIG, "n_trials": 2, "finalists": 0})
    stopped = run(tmp_path / "s", start, short)
    resumed = run(tmp_path / "s", start, TuneConfig.model_validate(CONFIG), resume=True)
    with StudyStore.resume(tmp_path / "s", TuneConfig.model_validate(CONFIG)) as store:
        assert rank_study(store).best is not None
    before, trials = (
        [one.effective.key for one in rows if one.role == "trial" and one.effective] for rows in (stopped, resumed)
    )
    assert trials[:2] == before
    assert len(trials) == 4
    assert len(set(trials)) == 4
