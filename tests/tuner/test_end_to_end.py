"""Whole studies on real workers, in processes of their own: what a user types, sees, and finds on disk."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from pipetune.bench.record import FailureKind, Measurement
from pipetune.tuner.cli import run
from pipetune.tuner.study.files import load_records, load_study, was_interrupted
from tests.disks import fill, small_disk
from tests.tiny_models import save_tiny_model, tiny_prompts, unsplit_tokens

pytestmark = pytest.mark.e2e

SIZE = ("--num-prompts", "8", "--output-len", "4", "--num-iters", "1", "--num-iters-warmup", "1")
SHORT = ("--baseline-batch-sizes", "8", "--finalists", "1", "--finalist-rounds", "1", "--max-finalist-rounds", "1")
FILES = {
    *("study.yaml", "machine.json", "shape.json", "prompts.jsonl", "reference.safetensors", "study.db"),
    *("logs", "records", "ranking.csv", "ranking.md", "report.html", "plots", "trace.json.gz"),
    *("best_plan.json", "best_device_map.json"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "qwen3", "qwen3", 5)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [json.dumps({"prompt_token_ids": list(ids)}) for ids in tiny_prompts(8)]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def start(*args: object, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pipetune", *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "COLUMNS": "80"},
        **options,
    )


def pipetune(*args: object) -> subprocess.CompletedProcess[str]:
    process = start(*args)
    out, err = process.communicate(timeout=280)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def here(capsys: pytest.CaptureFixture[str], *args: object) -> subprocess.CompletedProcess[str]:
    """The same within this process, which has imported what a start takes seconds for; its workers are as real."""
    given = [*map(str, args)]
    code = run(given)
    return subprocess.CompletedProcess(given, code, *capsys.readouterr())


def wait_for(condition: Callable[[], Any], timeout_s: float = 120.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError("waited in vain")


def workers_of(pid: int) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            command = process.cmdline()
        except psutil.Error:
            continue
        if "pipetune.bench.worker" in command and str(pid) in command:
            found.append(process)
    return found


@pytest.fixture(scope="module")
def study(model: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("studies") / "s"
    result = pipetune(
        "tune", "--model", model, "--devices", "cpu:0-1", *SIZE, *SHORT, "--prompts", prompts, "--min-stages", 2,
        "--n-trials", 3, "-o", folder, "--json",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return folder, json.loads(result.stdout)


def test_a_study_leaves_every_file_it_promises(study: tuple[Path, dict[str, Any]]) -> None:
    folder, document = study
    assert {path.name for path in folder.iterdir()} >= FILES
    assert document["exit_code"] == 0
    assert document["best"]["measured_in"] == "finals"
    assert not document["best"]["confirmed"], "one round confirms nothing"
    contents = load_study(folder)
    assert all(isinstance(record.result, Measurement) for record in contents.records)
    trials = [record for record in contents.records if record.role == "trial"]
    assert len(trials) == 3
    for record in trials:
        assert isinstance(record.result, Measurement)
        assert record.result.check is not None
        assert record.result.check.tokens_equal
    assert json.loads(gzip.decompress((folder / "trace.json.gz").read_bytes()))["traceEvents"]
    assert sorted(path.name for path in (folder / "logs").iterdir()) == ["rank-0.log", "rank-1.log"]


def test_the_best_plan_serves_and_its_map_loads_with_the_same_tokens(
    study: tuple[Path, dict[str, Any]], model: Path, prompts: Path, tmp_path: Path
) -> None:
    folder, document = study
    outputs = tmp_path / "out.jsonl"
    result = pipetune("bench", "--plan", folder / "best_plan.json", "--save-outputs", outputs, "--ignore-eos", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["plan"] == document["best"]["plan"]
    served = [json.loads(line)["token_ids"] for line in outputs.read_text(encoding="utf-8").splitlines()]
    device_map = json.loads((folder / "best_device_map.json").read_text(encoding="utf-8"))
    loaded = AutoModelForCausalLM.from_pretrained(model, device_map=device_map, dtype=torch.float32)
    assert served == unsplit_tokens(loaded, tiny_prompts(8), output_len=4)


def test_a_ranges_map_of_the_study_comes_back_as_the_plan(
    study: tuple[Path, dict[str, Any]], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, document = study
    path = tmp_path / "map.json"
    assert here(capsys, "export", folder, "-f", "ranges", "-o", path).returncode == 0
    result = here(
        capsys, "bench", "--model", model, "--device-map", path, "--micro-batch-size", 4, *SIZE, "--no-check", "--json",
        "--compare-baseline", "--rounds", 2, "--baseline-batch-sizes", 8, "-o", tmp_path / "records.jsonl",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    values = json.loads(result.stdout)
    assert values["plan"]["stages"] == document["best"]["plan"]["stages"]
    rows = {row["name"]: row for row in values["comparison"]["contenders"]}
    assert list(rows) == ["baseline", "single stage", "plan"]
    assert all(len(row["throughputs"]) == 2 for row in rows.values())
    assert rows["baseline"]["ratio"] == 1
    assert len(rows["plan"]["stage_busy_ms"]) == 2
    assert len((tmp_path / "records.jsonl").read_text(encoding="utf-8").splitlines()) == 1 + 3 * 2


def test_a_study_survives_a_killed_worker_a_killed_driver_and_an_interrupt(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "s"
    job = ("--model", model, "--devices", "cpu:0-1", *SIZE, *SHORT, "--no-profile")
    args = ("tune", *job, "--n-trials", 4, "-o", folder)

    def trials() -> int:
        return sum(record.role == "trial" for record in load_records(folder))

    def running(process: subprocess.Popen[str], count: int) -> list[psutil.Process]:
        """The workers, once a trial runs that has no record yet."""
        assert process.poll() is None, process.communicate()
        asked = folder / "study.db"
        return workers_of(process.pid) if asked.exists() and trials() >= count else []

    first = start(*args, "--num-iters", 100)
    victims = wait_for(lambda: running(first, 0))
    wait_for(lambda: _trial_is_running(folder))
    victims[-1].send_signal(signal.SIGKILL)
    wait_for(lambda: trials() >= 1)
    workers = wait_for(lambda: running(first, 1))
    wait_for(lambda: _trial_is_running(folder))
    first.kill()
    first.communicate()
    # What is dead and not yet collected by its new parent counts as gone.
    with contextlib.suppress(AssertionError):
        wait_for(lambda: not any(alive(worker) for worker in workers), timeout_s=2.0)
    assert [(worker.pid, worker.status(), worker.cmdline()) for worker in workers if alive(worker)] == []
    before = load_records(folder)
    lost = [record for record in before if record.role == "trial"]
    assert [record.result.kind for record in lost if not isinstance(record.result, Measurement)] == [
        FailureKind.WORKER_DIED
    ]

    second = start(*args, "--num-iters", 100, "--resume")
    wait_for(lambda: trials() > len(lost))
    wait_for(lambda: _trial_is_running(folder))
    second.send_signal(signal.SIGINT)
    _, err = second.communicate(timeout=60)
    assert second.returncode == 130, err
    assert "Traceback" not in err
    assert (folder / "report.html").exists()
    assert not workers_of(second.pid)

    result = pipetune(*args, "--num-iters", 100, "--resume", "--json")
    assert result.returncode == 0, result.stderr
    records = load_records(folder)
    assert records[: len(before)] == before
    done = [record for record in records if record.role == "trial"]
    assert sum(isinstance(record.result, Measurement) for record in done) == 4
    assert sum(was_interrupted(record) for record in done) == 2
    assert len({record.trial_number for record in done}) == len(done)

    refused = here(capsys, *args, "--resume", "--num-iters", 100, "--input-len", 9)
    assert refused.returncode == 2
    assert "workload.input_len: 64 → 9" in refused.stderr


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _trial_is_running(folder: Path) -> bool:
    """Whether a trial runs that has no record yet: what has one is marked as ended a moment later."""
    import sqlite3

    try:
        with sqlite3.connect(f"file:{folder / 'study.db'}?mode=ro", uri=True) as connection:
            rows = connection.execute("select number from trials where state = 'RUNNING'").fetchall()
        connection.close()
    except sqlite3.Error:
        return False
    return bool({number for (number,) in rows} - {record.trial_number for record in load_records(folder)})


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--model", "/nowhere/model"), "model.name"),
        (("--prompts", "BAD"), "not JSON"),
        (("--prompts", "TEXT"), "no tokenizer"),
        (("--model", "generation_config.json"), "generation_config.json: cannot be read"),
        (("--model", "tokenizer_config.json"), "tokenizer_config.json: cannot be read"),
        (("--model", "tokenizer.json"), "its tokenizer (tokenizer.json) does not load"),
        (("--devices", "cuda:7"), "cuda:7 is not on this machine"),
        (("--input-len", "100000"), "positions"),
    ],
)
def test_what_only_the_workers_can_know_exits_2_and_leaves_no_study(
    model: Path, tmp_path: Path, args: tuple[str, str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bad, text = tmp_path / "bad.jsonl", tmp_path / "text.jsonl"
    bad.write_text("{\n", encoding="utf-8")
    text.write_text('{"prompt": "Hello"}\n', encoding="utf-8")
    flag, value = args[0], {"BAD": str(bad), "TEXT": str(text)}.get(args[1], args[1])
    given = {"--model": str(model), "--devices": "cpu:0"} | {flag: value}
    if value.endswith(".json"):
        shutil.copytree(model, tmp_path / "model")
        (tmp_path / "model" / value).write_text('{"version": "1.0"' + "}" * value.startswith("tokenizer.j"))
        given |= {"--model": str(tmp_path / "model"), "--prompts": str(text)}
    result = here(capsys, "tune", *(part for pair in given.items() for part in pair), "-o", tmp_path / "s")
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert result.stderr.splitlines()[-1].startswith("pipetune: ")
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_study_stopped_before_its_first_record_leaves_nothing_and_says_so(
    model: Path, tmp_path: Path, number: signal.Signals
) -> None:
    folder = tmp_path / "s"
    process = start("tune", "--model", model, "--devices", "cpu:0-1", *SIZE, *SHORT, "-o", folder)
    wait_for(lambda: workers_of(process.pid))
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "nothing was measured" in err
    assert "--resume" not in err
    assert not folder.exists()


def test_a_study_whose_disk_fills_keeps_its_records_and_goes_on(model: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "20m") as disk:
        folder = disk / "s"
        job = ("--model", model, "--devices", "cpu:0-1", *SIZE, *SHORT, "--no-profile")
        args = ("tune", *job, "--n-trials", 2, "-o", folder)
        process = start(*args)
        wait_for(lambda: list(folder.glob("records/*.json")) or process.poll() is not None)
        filler = fill(disk)
        _, err = process.communicate(timeout=280)
        before = load_records(folder)
        assert process.returncode == 2, err
        assert before
        assert f"pipetune: {folder}/" in err
        assert f"what was measured is kept; go on by `pipetune tune --resume -o {folder}`" in err
        filler.unlink()
        result = pipetune(*args, "--resume")
        assert result.returncode == 0, result.stderr
        assert load_records(folder)[: len(before)] == before


def test_plans_that_do_not_describe_the_model_exit_2(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "map.json"
    path.write_text('{"model.layers.0-1": "cpu:0", "model.layers.3-4": "cpu:1"}', encoding="utf-8")
    missing = here(capsys, "bench", "--model", model, "--device-map", path, *SIZE)
    assert (missing.returncode, "layer 2 is missing" in missing.stderr) == (2, True)
    many = here(capsys, "bench", "--model", model, "--devices", "cpu:0-1", "--layers", "2,2", *SIZE)
    assert (many.returncode, "layer 4 is missing" in many.stderr) == (2, True)


def test_a_dry_run_shows_the_queue_and_writes_nothing(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "s"
    size = (*SIZE, "-o", folder)
    result = here(capsys, "tune", "--model", model, "--devices", "cpu:0-1", *size, "--dry-run", "--json")
    assert result.returncode == 0, result.stderr
    values = json.loads(result.stdout)
    assert values["layers"] == 5
    assert values["queue"]
    assert values["space"]["partitions"] == 6, "one stage, four cuts, and two copies"
    assert not folder.exists()


def test_the_doctor_passes_tokens_through_real_workers(capsys: pytest.CaptureFixture[str]) -> None:
    result = here(capsys, "doctor", "--devices", "cpu:0-1", "--json")
    assert result.returncode == 0, result.stdout + result.stderr
    checks = {check["name"]: check for check in json.loads(result.stdout)["checks"]}
    assert checks["pipeline"]["text"] == "tokens went through 2 stages and back"


def test_the_doctor_names_what_fails(capsys: pytest.CaptureFixture[str]) -> None:
    result = here(capsys, "doctor", "--model", "/nowhere", "--devices", "cpu:0")
    assert result.returncode == 2
    assert "failed" in result.stdout
