"""A study on real workers, one of which dies whenever it works: it goes on without its device, or stops."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipetune.bench.record import Failure, FailureKind, Measurement
from pipetune.tuner.study.files import load_study
from tests.hooks import break_workers
from tests.tiny_models import save_tiny_model
from tests.tuner.test_end_to_end import SHORT, SIZE, here

pytestmark = pytest.mark.e2e

# A worker of cpu:2 dies in its first task.
DIES = """
    import os, signal, sys
    run = module.Stage.forward
    def forward(*args, **kwargs):
        options = dict(zip(sys.argv[1:], sys.argv[2:]))
        if options.get("--devices", "").split(",")[int(options.get("--rank", 0))] == "cpu:2":
            os.kill(os.getpid(), signal.SIGKILL)
        return run(*args, **kwargs)
    module.Stage.forward = forward
"""


def test_three_workers_become_two_where_one_dies_at_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_tiny_model(tmp_path / "model", "llama", 3)
    break_workers(tmp_path / "hook", monkeypatch, target="pipetune.bench.runtime.stage.stage", body=DIES)
    # All plans of the space, the one on three devices among them.
    space = ("--micro-batch-sizes", 4, "--replicas", 1, "--memory-fractions", 0.9, "--no-stop-early", "--no-profile")
    rounds = ("--max-finalist-rounds", 2)
    args = ("tune", "--model", model, "--devices", "cpu:0-2", *SIZE, *SHORT, *space, *rounds)

    stopped = here(capsys, *args, "--n-trials", 4, "-o", tmp_path / "stopped", "--on-device-loss", "stop")
    assert stopped.returncode == 4, stopped.stderr
    message = stopped.stderr.splitlines()[-1]
    assert message.startswith("pipetune: cpu:2 was lost twice: ")
    assert "on cpu:2 was killed by SIGKILL" in message
    assert "--resume --on-device-loss degrade" in message
    assert not (tmp_path / "stopped/losses.json").exists()

    folder = tmp_path / "s"
    result = here(capsys, *args, "--n-trials", 4, "-o", folder, "--json")
    assert result.returncode == 0, result.stderr
    contents = load_study(folder)
    (loss,) = contents.losses.losses
    assert (loss.device, loss.left) == ("cpu:2", ("cpu:0", "cpu:1"))
    assert f"degraded from cpu:0, cpu:1, cpu:2 to cpu:0, cpu:1 from record {loss.first_record:04} on" in result.stderr
    failures = [one for one in (*contents.earlier, *contents.records) if isinstance(one.result, Failure)]
    assert [one.number for one in failures] == [loss.first_record - 2, loss.first_record - 1]
    assert all(isinstance(one.result, Failure) and one.result.kind is FailureKind.WORKER_DIED for one in failures)
    assert {one.role for one in contents.records} == {"baseline", "single_stage", "trial", "finalist"}
    assert all(isinstance(one.result, Measurement) for one in contents.records)
    used = {device for one in contents.records if one.spec for device in one.spec.plan.devices}
    assert used == {"cpu:0", "cpu:1"}
    document = json.loads(result.stdout)
    assert document["devices"] == ["cpu:0", "cpu:1"]
    assert [one["device"] for one in document["losses"]] == ["cpu:2"]
    assert {stage["device"] for stage in document["best"]["plan"]["stages"]} <= {"cpu:0", "cpu:1"}
    assert document["best"]["speedup_over_baseline"] is not None
    ranking = (folder / "ranking.md").read_text(encoding="utf-8")
    assert "cpu:2 was lost twice: the study is degraded" in ranking
    more = ("--finalist-rounds", 3, "--max-finalist-rounds", 3)
    again = here(capsys, *args, "--n-trials", 4, *more, "-o", folder, "--resume", "--json")
    assert again.returncode == 0, again.stderr
    assert "cpu:2 was lost twice: the study is degraded" in again.stderr
    longer = load_study(folder)
    assert longer.earlier == contents.earlier
    assert longer.losses == contents.losses
    assert len(longer.records) > len(contents.records)
    assert {record.role for record in longer.records[len(contents.records) :]} == {"finalist"}
