"""Studies compared: the same plan apart from the best plan, prices, caps, and work that does not compare."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path

import pytest

from pipetune.bench.errors import ConfigError, StudyError
from pipetune.bench.record import GpuInfo, Machine
from pipetune.bench.spec import Workload
from pipetune.tuner.cli import run
from pipetune.tuner.report.compare.files import read_reports, write_comparison
from pipetune.tuner.report.compare.join import compare_studies, plan_key
from pipetune.tuner.report.compare.values import StudyComparison
from pipetune.tuner.report.compare.wording import remarks_of
from pipetune.tuner.study.files import load_records
from tests.record_factory import make_machine
from tests.study_factory import write_study
from tests.tuner.report.compare.studies import EVEN, UNEVEN, write_night


def compared(*folders: Path, **options: dict[str, float]) -> StudyComparison:
    reports, names = read_reports(folders)
    return compare_studies(reports, names, **options)


def write_to(found: StudyComparison, folder: Path) -> Path:
    write_comparison(found, folder)
    return folder


def read_csv(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((folder / "compare.csv").read_text(encoding="utf-8"))))


def test_the_same_plan_slower_is_not_another_plan_that_is_best_now(tmp_path: Path) -> None:
    first = write_night(tmp_path / "monday", {UNEVEN: 1.0, EVEN: 1.3})
    slower = write_night(tmp_path / "tuesday", {UNEVEN: 1.1, EVEN: 1.43}, seed=50)
    moved = write_night(tmp_path / "wednesday", {UNEVEN: 1.0, EVEN: 0.7}, seed=90)
    tuesday, wednesday = compared(first, slower, moved).changes
    assert tuesday.same_plan is not None
    assert tuesday.own_best is not None
    assert tuesday.same_plan.value == pytest.approx(1 / 1.1, rel=0.03)
    assert tuesday.same_plan.is_told
    assert tuesday.moved is None
    assert "slower" in tuesday.text
    assert "with the same plan" in tuesday.text
    assert wednesday.same_plan is not None
    assert wednesday.same_plan.value == pytest.approx(1.0, rel=0.03)
    assert wednesday.moved is not None
    assert wednesday.moved.startswith("17+13")
    assert "another plan is best: 17+13" in wednesday.text


def test_a_plan_is_the_same_wherever_its_stages_lie() -> None:
    elsewhere = EVEN.model_copy(
        update={
            "stages": tuple(
                stage.model_copy(update={"device": f"cuda:{index + 2}"}) for index, stage in enumerate(EVEN.stages)
            )
        }
    )
    cpus = ("cpu:0", "cpu:1")
    assert plan_key(elsewhere, ("cuda:2", "cuda:3")) == plan_key(EVEN, cpus)
    assert plan_key(elsewhere, ("cuda:0", "cuda:1", "cuda:2", "cuda:3")) != plan_key(EVEN, cpus)
    assert plan_key(EVEN, cpus) != plan_key(UNEVEN, cpus)
    turned = EVEN.model_copy(
        update={
            "stages": tuple(
                stage.model_copy(update={"device": f"cpu:{1 - index}"}) for index, stage in enumerate(EVEN.stages)
            )
        }
    )
    assert plan_key(turned, cpus) != plan_key(EVEN, cpus)


def test_ratios_are_over_the_first_study_or_there_are_none(tmp_path: Path) -> None:
    first = write_night(tmp_path / "a", {UNEVEN: 1.0})
    others = [
        write_night(tmp_path / name, {UNEVEN: 1.0, EVEN: 1.3}, seed=seed) for name, seed in (("b", 50), ("c", 90))
    ]
    found = compared(first, *others)
    by_text = {plan.text: plan for plan in found.plans}
    assert set(by_text[UNEVEN.describe()].ratios) == {"b", "c"}
    assert set(by_text[EVEN.describe()].figures) == {"b", "c"}
    assert by_text[EVEN.describe()].ratios == {}


def test_other_hardware_is_named_and_money_counts_by_device(tmp_path: Path) -> None:
    machine = make_machine()
    hardware = machine.hardware.model_copy(update={"cpu_model": "Faster CPU"})
    other = machine.model_copy(update={"hardware": hardware, "hardware_id": hardware.hardware_id})
    found = compared(
        write_night(tmp_path / "a"),
        write_night(tmp_path / "b", machine=other, seed=9),
        prices={"cpu": 0.5, "cpu:1": 1.5},
    )
    assert any("cpu_model" in line and "Faster CPU" in line for line in found.changes[0].hardware)
    one = found.contestants[0]
    assert one.price_per_hour == 2.0
    assert one.best is not None
    assert one.tokens_per_price == pytest.approx(3600 * one.best.throughput / 2.0)
    assert one.tokens_per_device == pytest.approx(one.best.throughput / 2)
    assert one.best.tokens_per_joule is None
    assert len(one.best.cap_bytes) == len(one.best.peak_bytes) == 2


def test_a_device_without_a_price_leaves_the_sum_open_and_a_price_of_no_device_is_refused(tmp_path: Path) -> None:
    first, second = write_night(tmp_path / "a"), write_night(tmp_path / "b")
    assert compared(first, second, prices={"cpu:0": 2.0}).contestants[0].tokens_per_price is None
    with pytest.raises(ConfigError, match="--price cuda: no study has such a device; there are cpu:0, cpu:1"):
        compared(first, second, prices={"cuda": 2.0})


def test_a_file_of_records_stands_beside_a_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = write_night(tmp_path / "a")
    records = [record for record in load_records(write_night(tmp_path / "b", seed=9)) if record.spec is not None]
    file = tmp_path / "bench.jsonl"
    file.write_text("".join(f"{record.model_dump_json()}\n" for record in records))
    found = compared(study, file)
    assert found.contestants[1].machine is None
    assert found.changes[0].hardware == ()
    assert found.changes[0].same_plan is not None
    assert found.changes[0].same_plan.value == pytest.approx(1.0, rel=0.05)
    assert run(["compare", str(study), str(file)]) == 0
    other = records[0].model_copy(update={"hardware_id": "0" * 64})
    (tmp_path / "else.jsonl").write_text(f"{other.model_dump_json()}\n")
    assert "hardware_id" in compared(study, tmp_path / "else.jsonl").changes[0].hardware[0]
    file.write_text(f"{records[0].model_dump_json()}\n{other.model_dump_json()}\n")
    with pytest.raises(StudyError, match="several models, workloads or machines"):
        compared(study, file)
    file.write_text(records[0].model_dump_json()[:-40])
    assert run(["compare", str(study), str(file)]) == 2


def test_other_gpus_of_the_same_kind_are_the_same_hardware_and_said(tmp_path: Path) -> None:
    def machine(name: str, *uuids: str) -> Machine:
        gpus = tuple(GpuInfo(name=name, memory_bytes=80 * 2**30, uuid=uuid) for uuid in uuids)
        hardware = make_machine().hardware.model_copy(update={"gpus": gpus})
        return make_machine().model_copy(update={"hardware": hardware, "hardware_id": hardware.hardware_id})

    one, twin, better = machine("H100", "x", "y"), machine("H100", "z", "w"), machine("H200", "x", "y", "z")
    folders = [write_night(tmp_path / name, machine=own) for name, own in (("a", one), ("b", twin), ("c", better))]
    found = compared(*folders).changes
    assert found[0].hardware == ("gpus: others of the same kind, by their UUIDs",)
    assert found[1].hardware == ("gpus: 2 × H100 of 80 GiB → 3 × H200 of 80 GiB",)


def test_a_study_and_its_copy_are_as_fast(tmp_path: Path) -> None:
    first = write_night(tmp_path / "a")
    shutil.copytree(first, tmp_path / "b")
    change = compared(first, tmp_path / "b").changes[0]
    assert "as fast" in change.text
    assert "not told apart from equal" in change.text
    assert (change.hardware, change.protocol, change.software, change.moved) == ((), (), (), None)


def test_single_runs_have_no_interval_and_it_is_said(tmp_path: Path) -> None:
    found = compared(write_night(tmp_path / "a", rounds=1), write_night(tmp_path / "b", rounds=1, seed=9))
    assert "a single run: that tells nothing" in found.changes[0].text
    assert not any("Intervals" in text for text in remarks_of(found))


def test_a_study_without_a_best_plan_still_compares_the_same_plan(tmp_path: Path) -> None:
    first = write_night(tmp_path / "a")
    strict = write_study(
        tmp_path / "b", load_records(write_night(tmp_path / "c", seed=9)), constraints=["mean_ttft_ms<=0.001"]
    )
    change = compared(first, strict).changes[0]
    assert change.same_plan is not None
    assert change.own_best is None
    assert "b has no best plan" in change.text
    assert any("mean_ttft_ms<=0.001" in line for line in change.protocol)


def test_intervals_say_what_they_do_not_cover(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = write_night(tmp_path / "a"), write_night(tmp_path / "b", seed=9)
    assert run(["compare", str(first), str(second)]) == 0
    assert "nothing of how much nights or sessions do" in " ".join(capsys.readouterr().out.split())


def test_a_cell_is_never_a_formula(tmp_path: Path) -> None:
    found = compared(write_night(tmp_path / "=1+1"), write_night(tmp_path / "@b", seed=9))
    names = {row["study"] for row in read_csv(write_to(found, tmp_path / "out"))}
    assert names == {"'=1+1", "'@b"}


def test_studies_of_other_work_do_not_compare(tmp_path: Path) -> None:
    other = write_study(tmp_path / "b", workload=Workload(num_prompts=32, input_len=64, output_len=16, seed=7))
    found = compared(write_night(tmp_path / "a"), other)
    assert found.plans == ()
    assert found.changes[0].own_best is None
    assert "does not compare" in found.changes[0].text
    assert "seed" in found.changes[0].text


def test_tables_hold_every_shared_plan(tmp_path: Path) -> None:
    found = compared(write_night(tmp_path / "a"), write_night(tmp_path / "b", seed=9))
    folder = write_to(found, tmp_path / "out")
    rows = read_csv(folder)
    assert {(row["plan"], row["study"]) for row in rows} == {
        (plan.describe(), name) for plan in (EVEN, UNEVEN) for name in "ab"
    }
    assert float(next(row["ratio"] for row in rows if row["study"] == "b")) > 0
    text = (folder / "compare.md").read_text(encoding="utf-8")
    assert text.count("| 17+13") >= 1
    assert "## The same plans" in text


def test_the_command_prints_writes_and_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = write_night(tmp_path / "a"), write_night(tmp_path / "b", seed=9)
    assert run(["compare", str(first), str(second), "--json"]) == 0
    assert StudyComparison.model_validate(json.loads(capsys.readouterr().out)).contestants[1].name == "b"
    assert run(["compare", str(first), str(second), "-o", str(tmp_path / "out"), "--price", "cpu=0.1"]) == 0
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"compare.json", "compare.csv", "compare.md", "compare.html", "own_best.png", "same_plans.png"}
    assert max(len(line) for line in capsys.readouterr().out.splitlines()) <= 80
    assert run(["compare", str(first), str(first)]) == 2
    assert run(["compare", str(first)]) == 2
    assert run(["compare", str(first), str(tmp_path / "nowhere")]) == 2
    assert run(["compare", str(first), str(second), "--price", "cpu=free"]) == 2


@pytest.mark.slow
def test_a_report_can_hold_the_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = write_night(tmp_path / "a"), write_night(tmp_path / "b", seed=9)
    assert run(["report", str(second), "--compare", str(first)]) == 0
    assert "Compared: a, b" in (second / "report.html").read_text()
    assert run(["report", str(second)]) == 0
    assert "Compared:" not in (second / "report.html").read_text()


def test_what_cannot_be_read_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="given twice"):
        read_reports([tmp_path, tmp_path])
    with pytest.raises(StudyError, match="holds no study"):
        read_reports([write_night(tmp_path / "a"), tmp_path])


def test_names_that_are_alike_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    folders = [write_night(tmp_path / machine / "nightly") for machine in ("h100", "a100")]
    assert read_reports(folders)[1] == ["h100/nightly", "a100/nightly"]


def test_a_comparison_written_twice_replaces_the_first(tmp_path: Path) -> None:
    found = compared(write_night(tmp_path / "a"), write_night(tmp_path / "b", seed=9))
    write_comparison(found, tmp_path / "out")
    write_comparison(found, tmp_path / "out")
    assert StudyComparison.model_validate_json((tmp_path / "out" / "compare.json").read_bytes()) == found


def test_a_machine_file_drives_no_terminal_and_no_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("html", "plot"):
        monkeypatch.setattr(f"pipetune.tuner.report.render.{module}.render_png", lambda *_: b"")
    machine, evil = make_machine(), "\x1b[31mTorch\x9b2J\nfine: no change\u202e"
    software = machine.software.model_copy(update={"packages": {**machine.software.packages, "torch": evil}})
    hardware = machine.hardware.model_copy(update={"cpu_model": f"{evil}2"})
    update = {"software": software, "hardware": hardware}
    write_study(tmp_path / "a", machine=machine)
    write_study(tmp_path / "b", machine=machine.model_copy(update=update))
    for command in (["compare", str(tmp_path / "a"), str(tmp_path / "b")], ["history", str(tmp_path)]):
        assert run([*command, "-o", str(tmp_path / command[0])]) == 0
        out = capsys.readouterr().out
        pages = [path.read_text(encoding="utf-8") for path in (tmp_path / command[0]).glob("*.[mhc][dts]*")]
        assert "Torch" in out
        assert len(pages) >= 2
        for text in (out, *pages):
            assert not {"\x1b", "\x9b", "\u202e"} & set(text)
            assert not any(line.lstrip().startswith("fine:") for line in text.splitlines())
