"""Studies with a damaged file: every reader names it, goes on with the rest where it can, and shows no Python error."""

from __future__ import annotations

import copy
import json
import math
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipetune.bench.errors import PipetuneError
from pipetune.bench.record import Record
from pipetune.bench.spec import Workload
from pipetune.bench.suite.case import PlanCase
from pipetune.tuner.cli import run
from pipetune.tuner.commands.conclude import plan_file
from pipetune.tuner.config.gate import GateConfig
from pipetune.tuner.config.sources import load
from pipetune.tuner.gate.cases import SideRequest
from pipetune.tuner.gate.outputs.wording import screen_of as gate_screen
from pipetune.tuner.gate.stored.run import compare_files, compare_stored
from pipetune.tuner.gate.values import Case, Reason, Sample, Side, SideName
from pipetune.tuner.planning.calibration.observation import observe
from pipetune.tuner.planning.costs.described import read_devices
from pipetune.tuner.planning.costs.profile_cache import read_profile
from pipetune.tuner.planning.partition.device_map import plan_from_map, read_device_map
from pipetune.tuner.progress import Reporter
from pipetune.tuner.report.compare import wording as comparison
from pipetune.tuner.report.compare.files import read_reports
from pipetune.tuner.report.compare.join import compare_studies
from pipetune.tuner.report.data import Report
from pipetune.tuner.report.history import wording as history
from pipetune.tuner.report.history.files import read_history
from pipetune.tuner.report.page import page_of
from pipetune.tuner.report.ranking import whole_of
from pipetune.tuner.report.render.csv import render_csv
from pipetune.tuner.report.render.markdown import render_markdown
from pipetune.tuner.report.spreadsheet import columns_of, entries_of
from pipetune.tuner.report.study_charts import study_figures
from pipetune.tuner.report.trace import render_trace
from pipetune.tuner.study.files import StudyFile, load_study
from pipetune.tuner.study.plan_file import FORMATS, read_plan, render
from pipetune.tuner.study.search_log import SearchLogWriter
from pipetune.tuner.study.store import StudyStore
from tests.record_factory import (
    NUM_LAYERS,
    make_baseline_measurement,
    make_failure,
    make_machine,
    make_measurement,
    make_plan,
    make_record,
    make_shape,
)
from tests.study_factory import make_log, make_profile, write_study
from tests.tuner.gate.fakes import FakeRunner, equal
from tests.tuner.gate.stored.test_stored import write_benchmarks

MUTATIONS = 500
BY_COMMAND = 100
"""One in so many is read by the commands themselves, which draw pictures."""
GENERATE = Workload(num_prompts=4, input_len=8, output_len=3)
SCORE = Workload(kind="score", num_prompts=4, input_len=8)
ONES_OWN = {"seed", "temperature_c", "params", "point", "packages", "replicate_of", "workload", "protocol"}
"""Where any number or any key is as good as another."""
BY_KEY = {"prices", "params", "point", "packages", "predicted", "predicted_sd", "device_bytes"}


def records_of(workload: Workload) -> list[Record]:
    """A baseline, a single stage, trials with replicas, chunks and failures, and two rounds of finals."""
    cut, single = make_plan((16, 14), 2, prefill=1), make_plan((NUM_LAYERS,), 4)
    copies = make_plan((NUM_LAYERS,), 2, replicas=2, chunk=4 if workload.kind == "generate" else None)
    runs: list[tuple[Any, ...]] = [("baseline", None), ("single_stage", single), ("trial", cut), ("trial", copies)]
    runs += [("trial", make_plan((10, 20), 2))]
    runs += [("finalist", plan, round_) for round_ in range(2) for plan in (cut, copies, None)]
    found = []
    for number, (role, plan, *round_) in enumerate(runs):
        result: Any = make_baseline_measurement(4, workload, num_iters=2, seed=number)
        if plan is not None:
            failed = plan.layer_counts == (10, 20)
            result = make_failure() if failed else make_measurement(plan, workload, num_iters=2, seed=number)
        trial = number - 2 if role == "trial" else None
        record = make_record(number, role, plan, result, workload=workload, trial_number=trial)
        found.append(record.model_copy(update={"round": round_[0] if round_ else None}))
    return found


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Studies of texts that are generated and that are scored, with few settings, so that YAML is read quickly."""
    folder, found = tmp_path_factory.mktemp("sound"), []
    for workload, goal, limits in ((GENERATE, "mean_ttft_ms", ["peak_memory_bytes<=4e9"]), (SCORE, "duration_s", [])):
        records = records_of(workload)
        study = write_study(
            folder / workload.kind, records, workload=workload, log=make_log(records), profile=make_profile()
        )
        values: dict[str, Any] = {"model": {"name": "smollm2-135m", "dtype": "float32"}, "devices": ["cpu:0", "cpu:1"]}
        values |= {"workload": workload.model_dump(exclude_defaults=True), "objectives": [goal], "constraints": limits}
        values |= {"protocol": {"num_iters": 2, "timeout_s": 600.0}, "prices": {"cpu": 2.5}, "seed": 0, "n_trials": 3}
        (study / StudyFile.CONFIG).write_text(yaml.safe_dump(values))
        found.append(study)
    return found


def nodes(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The place of every value within a document, but for itself."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from nodes(inner, (*path, key))


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


VALUES: dict[str, Any] = {
    "negative": -3,
    "not a number": math.nan,
    "infinite": math.inf,
    "huge": 1e300,
    "tiny": 5e-324,
    "zero": 0,
    "text": "many",
    "true": True,
    "null": None,
    "a list": [],
    "an object": {"a": 1},
}
WHOLE: dict[str, Callable[[str], str]] = {
    "cut off": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "another document": lambda text: "[1, 2]",
    "nested": lambda text: "[" * 100_000,
    "no text": lambda text: "\ud800" + text,
}
SURELY_DAMAGE = {"negative", "not a number", "infinite", "huge", "text", "true", "renamed", *WHOLE} - {"empty"}


def damage(rng: random.Random, path: Path) -> tuple[str, bool]:
    """Damages a file of a study; what was done to it, and whether it can surely no longer be what it was."""
    text, in_yaml = path.read_text(), path.suffix == ".yaml"
    if rng.random() < 0.06:
        kind = rng.choice(list(WHOLE))
        path.write_bytes(WHOLE[kind](text).encode("utf-8", "surrogatepass"))
        return kind, kind in SURELY_DAMAGE
    document = yaml.safe_load(text) if in_yaml else json.loads(text)
    places: dict[tuple[Any, ...], list[tuple[Any, ...]]] = {}
    for place in nodes(document):
        places.setdefault(tuple("*" if isinstance(key, int) else key for key in place), []).append(place)
    *above, key = rng.choice(places[rng.choice(list(places))])
    parent = document
    for one in above:
        parent = parent[one]
    kinds = ["missing", "null", "a list", "an object", "text"]
    kinds += list(VALUES) * 2 if is_number(parent[key]) else []
    kinds += ["renamed"] * 2 if isinstance(parent, dict) else ["doubled"]
    kind = rng.choice(kinds)
    old = parent[key]
    free = bool(ONES_OWN & {key, *above}) or (in_yaml and kind in ("true", "huge", "negative"))
    if kind == "renamed":
        free = bool(BY_KEY & set(above))
        parent[f"{key}_of"] = parent.pop(key)
    elif kind == "missing":
        del parent[key]
    elif kind == "doubled":
        parent.insert(key, copy.deepcopy(parent[key]))
    else:
        value = VALUES[kind]
        parent[key] = 10**40 if kind == "huge" and isinstance(parent[key], int) else value
    path.write_text(yaml.safe_dump(document) if in_yaml else json.dumps(document))
    surely = kind == "renamed" or (kind in SURELY_DAMAGE and is_number(old))
    surely |= kind in ("a list", "an object") and isinstance(old, int | float | str) and not in_yaml
    return f"{'.'.join(map(str, (*above, key)))} {kind}", surely and not free


def read_report(study: Path, other: Path) -> str:
    report = Report.of(load_study(study))
    study_figures(report)
    render_trace(report)
    render_csv(columns_of(report), entries_of(report))
    render_markdown(page_of(report))
    return render_markdown(whole_of(report)) + "\n".join(report.unread)


def read_comparison(study: Path, other: Path) -> str:
    reports, names = read_reports([other, study])
    found = compare_studies(reports, names)
    render_markdown(comparison.whole_of(found))
    comparison.comparison_figures(found)
    return "\n".join(text for report in reports for text in report.unread)


def read_nights(study: Path, other: Path) -> str:
    found = read_history([study])
    for question in found.questions:
        history.history_figures(question)
    return render_markdown(history.whole_of(found))


def answer(case: Case, name: SideName, number: int) -> Sample:
    return equal(case, name, number).model_copy(update={"hardware_id": make_machine().hardware_id})


def read_gate(study: Path, other: Path) -> str:
    config, plan = load(other / StudyFile.CONFIG), make_plan((16, 14), 2, prefill=1)
    side = Side(name="candidate", model=config.model, plan=plan, devices=("cpu:0", "cpu:1"))
    runner = FakeRunner(answer)
    result = compare_stored((study,), SideRequest(side, config), Reporter(), start=lambda cases: runner)
    gate_screen(result)
    return "\n".join(finding.text for finding in result.findings)


def read_export(study: Path, other: Path) -> str:
    contents = load_study(study)
    report = Report.of(contents)
    for row in report.ranking.rows if contents.shape is not None else ():
        for form in FORMATS:
            assert contents.shape is not None
            render(plan_file(contents, row), contents.shape, form)
    return "\n".join(report.unread)


def read_lessons(study: Path, other: Path) -> str:
    contents = load_study(study)
    for record in contents.records:
        observe(record)
    return "\n".join(Report.of(contents).unread)


def read_resumed(study: Path, other: Path) -> str:
    with StudyStore.resume(study, load(study / StudyFile.CONFIG)) as store:
        store.set_machine(make_machine(), make_shape())
        SearchLogWriter(study / StudyFile.SEARCH)
    return ""


UNREAD = {(read_gate, "search.json"), (read_gate, "profile.json"), (read_resumed, "profile.json")}
"""Files that a reader has no need of."""
READERS = (read_report, read_comparison, read_nights, read_gate, read_export, read_lessons, read_resumed)


@pytest.mark.slow
def test_readers_name_whatever_is_damaged_in_a_study_and_go_on(
    sound: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong: list[str] = []
    counts: Counter[str] = Counter()
    for number in range(MUTATIONS):
        rng = random.Random(f"mutation {number}")
        other, study = rng.choice(sound), tmp_path / str(number)
        shutil.copytree(other, study)
        files = [study / name for name in (StudyFile.CONFIG, *StudyFile) if (study / name).exists()]
        path = rng.choice(files + sorted((study / "records").iterdir()))
        what, is_damage = damage(rng, path)
        counts["damage" if is_damage else "perhaps none"] += 1
        name = str(path.relative_to(study))
        mutation = f"{number}: {other.name}/{name}: {what}"
        for read in READERS:
            try:
                said = read(study, other)
            except PipetuneError as error:
                said = str(error)
                if error.exit_code not in (2, 3):
                    wrong.append(f"{read.__name__}, {mutation}: exit code {error.exit_code}: {said}")
            except Exception as error:
                wrong.append(f"{read.__name__}, {mutation}: {error!r}")
                continue
            if is_damage and name not in said.replace("\\", "") and (read, name) not in UNREAD:
                wrong.append(f"{read.__name__}, {mutation}: not named: {said}")
        if number % BY_COMMAND == 0:
            for args in (["report"], ["compare", str(other)], ["history"], ["export"]):
                code = run([*args, str(study)])
                out, err = capsys.readouterr()
                text = (out + err).replace("\n", "")
                counts["commands"] += 1
                if code not in (0, 2, 3) or (is_damage and name not in text):
                    wrong.append(f"{args[0]}, {mutation}: exit code {code}: {text[-300:]}")
        shutil.rmtree(study)
    print(f"{MUTATIONS} mutations, {dict(counts)}")
    assert not wrong, f"{len(wrong)} wrong:\n" + "\n".join(wrong[:40])


def read_benchmark_file(path: Path) -> str:
    result = compare_files([path.with_name("old.json")], path, GateConfig())
    gate_screen(result)
    return "\n".join(finding.text for finding in result.findings if finding.reason is Reason.UNREADABLE)


def read_lines_of_records(path: Path) -> None:
    reports, names = read_reports([path.with_name("generate"), path])
    compare_studies(reports, names)


ALONE: dict[str, Callable[[Path], object]] = {
    "best_plan.json": read_plan,
    "profile.json": read_profile,
    "benchmarks.json": read_benchmark_file,
    "map.json": lambda path: plan_from_map(read_device_map(path), make_shape(), micro_batch_size=2, place=str(path)),
    "devices.yaml": read_devices,
    "records.json": read_lines_of_records,
    "case.json": PlanCase.read,
}
"""Files that are named on the command line, and who reads them."""
DEVICES_FILE = """
devices:
  - {name: cpu:0, like: {profile: profile.json, device: cpu:0}, speed: 1.5}
  - {name: cuda:0-1, memory_gib: 80, tflops: 312, memory_gb_per_s: 2039, layer_overhead_us: 150}
links: [{between: any, gb_per_s: 25, latency_us: 15}]
"""


@pytest.mark.parametrize("name", ALONE)
def test_a_damaged_file_is_refused_by_its_name_and_never_by_a_python_error(
    sound: list[Path], tmp_path: Path, name: str
) -> None:
    contents = load_study(sound[0])
    assert contents.shape is not None
    best = Report.of(contents).ranking.best
    assert best is not None
    shutil.copytree(sound[0], tmp_path / "generate")
    plan = plan_file(contents, best).model_copy(update={"metrics": {}})
    whole = {
        "best_plan.json": plan.model_dump_json(),
        "case.json": plan.model_dump_json(exclude={"schema_version", "in_flight", "metrics"}, exclude_defaults=True),
        "profile.json": (sound[0] / "profile.json").read_text(),
        "benchmarks.json": write_benchmarks(tmp_path / "old.json", 100).read_text(),
        "map.json": render(plan, contents.shape, "hf"),
        "devices.yaml": DEVICES_FILE,
        "records.json": next(iter(contents.records[1:])).model_dump_json(),
    }
    wrong = []
    for number in range(25):
        for file, text in whole.items():
            (tmp_path / file).write_text(text)
        what, is_damage = damage(random.Random(f"{name} {number}"), tmp_path / name)
        try:
            said = ALONE[name](tmp_path / name)
        except PipetuneError as error:
            said = str(error)
            if error.exit_code != 2 or name not in said or "Error" in said:
                wrong.append(f"{number}: {what}: exit code {error.exit_code}: {said}")
        except Exception as error:
            wrong.append(f"{number}: {what}: {error!r}")
            continue
        # What is read as settings are takes a truth for a number; the suite's file may say more than it needs.
        accepted = (" true", "huge", *([" renamed"] if name == "case.json" else []))
        if is_damage and not isinstance(said, str) and not what.endswith(accepted):
            wrong.append(f"{number}: {what}: not refused")
    assert not wrong, f"{len(wrong)} wrong:\n" + "\n".join(wrong)
