"""The command line from outside: exit codes, one clear message, nothing overwritten, nothing heavy loaded."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import typer
import typer.main

from pipetune.bench.metrics import HIGHER_IS_BETTER, metric_names
from pipetune.bench.record import FailureKind
from pipetune.tuner.cli import run
from pipetune.tuner.cli.app import app
from pipetune.tuner.cli.options import examples_of
from pipetune.tuner.study.plan_file import read_plan
from tests.disks import read_only, small_disk
from tests.record_factory import make_failure, make_measurement, make_plan, make_record
from tests.study_factory import write_study
from tests.tiny_models import save_tiny_model

MODEL = ("--model", "m", "--devices", "cpu:0-1")
COMMANDS = (
    *("demo", "tune", "plan", "bench", "serve", "gate", "rollout", "compare", "history", "report", "collect", "export"),
    *("doctor", "profile", "metrics"),
)
APP: Any = typer.main.get_command(app)


def process(*args: str, cwd: Path | None = None, **environ: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own: what depends on how one starts."""
    return subprocess.run(
        [sys.executable, "-m", "pipetune", *args],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=cwd,
        env={**os.environ, "COLUMNS": "80", "PYTHONPATH": str(Path.cwd()), **environ},
    )


def pipetune(*args: str, cwd: Path | None = None, **environ: str) -> subprocess.CompletedProcess[str]:
    """The same within this process, which has imported what a start takes seconds for."""
    with (
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
        contextlib.chdir(cwd or Path.cwd()),
        mock.patch.dict(os.environ, {"COLUMNS": "80", **environ}),
    ):
        code = run(args)
    return subprocess.CompletedProcess(args, code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("studies") / "s")


def test_help_loads_nothing_heavy() -> None:
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "pipetune", "--help"], capture_output=True, text=True, check=True
    )
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in result.stderr.splitlines()}
    assert "typer" in loaded
    assert not loaded & {"torch", "transformers", "optuna", "pandas", "matplotlib", "numpy", "pydantic", "sqlalchemy"}
    for command in COMMANDS:
        assert command in result.stdout


@pytest.mark.parametrize("columns", [80, 60])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_flag_whole_in_any_width(
    command: str, columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert run([command, "--help"]) == 0
    shown = capsys.readouterr().out
    parameters = APP.commands[command].get_params(typer.Context(APP.commands[command]))
    flags = {flag for one in parameters if one.param_type_name == "option" for flag in one.opts + one.secondary_opts}
    assert flags <= set(re.split(r"[\s,]+", shown))
    assert {line for line in shown.splitlines() if len(line) > columns} <= {
        f"  {line}" for line in examples_of(command)
    }
    assert columns < 80 or max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shows_three_examples_that_it_understands(command: str) -> None:
    lines = examples_of(command)
    assert len(lines) == 3
    for line in lines:
        with APP.commands[command].make_context(command, shlex.split(line)[2:]) as context:
            assert context.params


def test_help_shows_defaults_and_what_they_are_on_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["tune", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for told in (
        "--num-prompts INT Prompts in the workload. [32; on GPUs 64]",
        "--check / --no-check Compare output with the unsplit model. [on]",
        "[0.5,0.7,0.9]",
    ):
        assert told in shown
    assert shown.index("Common options") < shown.index("--n-trials INT") < shown.index("Search, advanced")


def test_completion_is_offered(capsys: pytest.CaptureFixture[str]) -> None:
    completed = process(_PIPETUNE_COMPLETE="complete_bash", COMP_WORDS="pipetune tune --max-mem", COMP_CWORD="2")
    assert completed.stdout.strip() == "--max-memory-per-device"


def test_metrics_are_those_that_are_derived_and_the_readme_defines(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["metrics", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    higher = {
        "output_throughput",
        "request_goodput",
        "max_request_rate",
        "slo_attainment",
        "total_token_throughput",
        "request_throughput",
        "steady_utilization",
        "gpu_utilization",
        "output_tokens_per_joule",
    }
    assert {name for row in rows for name in row["names"] if row["better"] == "higher"} == higher
    assert higher == HIGHER_IS_BETTER
    assert {name for row in rows for name in row["names"]} == set(
        metric_names(1000, 1000, gpu=True, goodput=True, arrivals=True, rates=True)
    )
    assert Path("bench/metrics.md").read_text(encoding="utf-8") in Path("results/README.md").read_text(encoding="utf-8")
    assert run(["metrics", "ttft"]) == 0
    assert "p99_ttft_ms" in (shown := capsys.readouterr().out)
    assert "bubble" not in shown


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("tune",), "model.name: no model is given"),
        (("tune", *MODEL, "--num-prompts", "0"), "--num-prompts: Input should be greater"),
        (("tune", *MODEL, "--num-prompts", "many"), "valid integer"),
        (("tune", *MODEL, "--devices", "gpu:0"), "--devices: 'gpu:0' is not a device"),
        (("tune", *MODEL, "--objective", "speed"), "objectives: speed: speed is no metric"),
        (("tune", *MODEL, "--constraint", "p99_ttft_ms<=5"), "p99_ttft_ms needs at least 100 prompts"),
        (("tune", *MODEL, "--constraint", "fast"), "'fast' is no constraint"),
        (("tune", *MODEL, "--max-stages", "3"), "needs as many devices"),
        (("tune", *MODEL, "--dtype", "int3"), "--dtype: Input should be 'float32'"),
        (("tune", *MODEL, "--storage-dtype", "float16"), "weights are kept in float32 or in the dtype itself"),
        (("tune", *MODEL, "--attention", "flash"), "or 'flash_attention_3'"),
        (("tune", *MODEL, "--workload-kind", "chat"), "--workload-kind: Input should be 'generate' or 'score'"),
        (
            ("tune", *MODEL, "--workload-kind", "score", "--objective", "output_throughput"),
            "counts generated tokens, and where texts are scored there are none; take total_token_throughput",
        ),
        (("tune", *MODEL, "--workload-kind", "score", "--top-k", "5"), "nothing is sampled where texts are scored"),
        (("tune", *MODEL, "--top-p", "2"), "--top-p: Input should be less than or equal to 1"),
        (("tune", *MODEL, "--compile", "often"), "--compile: neither true nor false nor search"),
        (("tune", *MODEL, "--replicas", "4"), "space.replicas=4 needs as many devices"),
        (("tune", *MODEL, "--prefill-chunk-sizes", "a"), "'a' is neither a number of tokens nor whole"),
        (("tune", *MODEL, "--study-name", "../x"), "no study name"),
        (("tune", *MODEL, "--config", "none.yaml"), "none.yaml: cannot read the config"),
        (("tune", *MODEL, "--resume"), "--resume: which study?"),
        (("tune", *MODEL, "--resume=no", "-o", "none"), "--resume=no: give it alone, or as --resume auto"),
        (("tune", *MODEL, "-o", "s-{task}"), "no task of a job runs this; of SLURM_ARRAY_TASK_ID"),
        (("tune", *MODEL, "--resume", "-o", "s-{task}"), "output_dir: 's-{task}': no task of a job runs this"),
        (("tune", *MODEL, "--resume", "-o", "none"), "none holds no study to resume"),
        (("tune", *MODEL, "--prompts", "none.jsonl", "-o", "x"), "none.jsonl: cannot read the prompts"),
        (("tune", *MODEL, "--no-such-flag"), "No such option"),
        (("nonsense",), "No such command"),
        (("report", "none"), "none holds no study"),
        (("export", "none"), "none holds no study"),
        (("bench", *MODEL), "which plan?"),
        (("bench", *MODEL, "--layers", "1", "--plan", "p"), "not --plan and --layers"),
        (("bench", *MODEL, "--plan", "p"), "p: cannot read the plan"),
        (("bench", *MODEL, "--layers", "a,b"), "write a count of layers for each stage"),
        (("bench", *MODEL, "--layers", "0,3"), "one layer at least"),
        (
            ("bench", *MODEL, "--layers", "3", "--replicas", "0"),
            "'--replicas': Input should be greater than or equal to 1",
        ),
        (("bench", *MODEL, "--layers", "3", "-o", "."), "exists; name a new file"),
        (("bench", *MODEL, "--device-map", "none.json"), "none.json: cannot read the device map"),
    ],
)
def test_bad_input_exits_2_with_one_message_and_leaves_nothing(
    args: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    result = pipetune(*args, cwd=tmp_path)
    said = " ".join(result.stderr.replace("│", " ").split())
    assert result.returncode == 2, said
    assert message in said
    assert "Traceback" not in said
    assert result.stdout == ""
    assert [path for path in tmp_path.rglob("*") if path.is_file() and not path.name.startswith(".lock")] == []


WHATEVER_IS_GIVEN = {
    "report": ("report", "{}"),
    "report, compared": ("report", "good", "--compare", "{}"),
    "export": ("export", "{}"),
    "compare": ("compare", "good", "{}"),
    "history": ("history", "{}"),
    "history, as JSON": ("history", "{}", "--json"),
    "tune, resumed": ("tune", "--resume", "-o", "{}"),
    "tune, config": ("tune", *MODEL, "--config", "{}"),
    "tune, prompts": ("tune", *MODEL, "--prompts", "{}", "-o", "new"),
    "plan, devices": ("plan", *MODEL, "--device-file", "{}"),
    "bench, plan": ("bench", *MODEL, "--plan", "{}"),
    "bench, map": ("bench", *MODEL, "--device-map", "{}"),
    "bench, records": ("bench", *MODEL, "--layers", "3,3", "-o", "{}/below/records.jsonl"),
    "gate": ("gate", "{}", "good.json"),
    "gate, plans": ("gate", "--baseline-plan", "{}"),
    "gate, stored": ("gate", "--stored", "{}"),
    "doctor": ("doctor", *MODEL, "--device-file", "{}"),
    "profile": ("profile", *MODEL, "--config", "{}"),
    "demo": ("demo", "-o", "{}/below"),
}
"""Commands, and where in them something can be given that is not what they want."""


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study, an empty folder, a study whose files are all damaged, and another tool's file."""
    folder = tmp_path_factory.mktemp("odd")
    write_study(folder / "good")
    (folder / "empty").mkdir()
    for path in write_study(folder / "damaged").rglob("*.*"):
        path.write_bytes(b"\x00\xff{")
    (folder / "foreign.json").write_text(json.dumps({"results": [{"command": "a", "mean": 1.0, "stddev": 0.1}]}))
    return folder


@pytest.mark.parametrize("given", ["empty", "damaged", "missing", "foreign.json"])
@pytest.mark.parametrize("command", WHATEVER_IS_GIVEN)
def test_no_command_fails_in_silence(
    command: str, given: str, odd: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(odd)
    # Below a folder a new place is as good as any.
    given = "foreign.json" if command in ("demo", "bench, records") else given
    code = run([part.format(given) for part in WHATEVER_IS_GIVEN[command]])
    out, err = capsys.readouterr()
    # A gate's verdict on what is stored is its result.
    said = (out if command.startswith("gate") and code == 3 else err).replace("\n", "")
    assert code in (2, 3), said
    assert given in said
    assert "foresaw" not in said


def test_a_misspelt_key_is_named_with_file_place_and_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text("model: {name: m}\nworkload:\n  num_promts: 3\n", encoding="utf-8")
    result = pipetune("tune", "-c", "t.yaml", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr == "pipetune: t.yaml:3: unknown key 'workload.num_promts'; did you mean num_prompts?\n"


def test_malformed_yaml_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text("model: {name: m\nseed: 3\n", encoding="utf-8")
    result = pipetune("tune", "-c", "t.yaml", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("pipetune: t.yaml:2:5: malformed YAML")


def test_the_config_is_shown_with_sources(tmp_path: Path) -> None:
    result = pipetune("tune", *MODEL, "--show-config", "--seed", "5", PIPETUNE_INPUT_LEN="7")
    assert result.returncode == 0
    lines = {line.split(":")[0].strip(): line for line in result.stdout.splitlines()}
    assert lines["input_len"].endswith("# PIPETUNE_INPUT_LEN")
    assert lines["seed"].endswith("# --seed")
    as_json = json.loads(pipetune("tune", *MODEL, "--show-config", "--json").stdout)
    assert as_json["config"]["devices"] == ["cpu:0", "cpu:1"]
    assert as_json["sources"]["devices"] == "--devices"


def test_every_new_setting_has_a_flag_and_a_variable() -> None:
    flags = ("--temperature", "0.5", "--top-k", "4", "--replicas", "1,2", "--compile", "search", "--no-cuda-graphs")
    shown = pipetune("tune", *MODEL, *flags, "--show-config", "--json", PIPETUNE_PREFILL_CHUNK_SIZES="32,whole")
    document = json.loads(shown.stdout)
    assert document["config"]["workload"]["sampling"] == {"temperature": 0.5, "top_k": 4, "top_p": 1.0, "seed": 0}
    space = document["config"]["space"]
    assert (space["replicas"], space["compile"], space["cuda_graphs"]) == ([1, 2], "search", False)
    assert space["prefill_chunk_sizes"] == [32, None]
    assert document["sources"]["space.prefill_chunk_sizes"] == "PIPETUNE_PREFILL_CHUNK_SIZES"
    assert document["sources"]["workload.sampling.top_k"] == "--top-k"
    # A plan's own switches are no settings of the search.
    bench = pipetune("bench", *MODEL, "--layers", "3", "--compile", "--replicas", "2", "--show-config")
    assert "  compile: false" in bench.stdout
    assert "# --compile" not in bench.stdout


def test_scored_texts_have_an_objective_of_their_own() -> None:
    shown = pipetune("tune", *MODEL, "--workload-kind", "score", "--show-config")
    assert "objectives: [total_token_throughput]" in shown.stdout


def test_a_map_of_a_plan_with_replicas_comes_with_a_note(tmp_path: Path) -> None:
    plan = make_plan((30,), 16, replicas=2)
    folder = write_study(tmp_path / "s", [make_record(0, "trial", plan, make_measurement(plan), trial_number=0)])
    result = pipetune("export", str(folder))
    assert result.returncode == 0
    assert json.loads(result.stdout)["lm_head"] == "cpu"
    assert "it holds the first of 2 replicas" in result.stderr
    assert "--data-parallel-size 2" in pipetune("export", str(folder), "-f", "vllm").stdout
    assert pipetune("export", str(folder), "-f", "plan").stderr == ""


def test_a_file_with_few_prompts_is_used_whole(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n\n{"prompt": "b"}\n', encoding="utf-8")
    result = pipetune("tune", *MODEL, "--prompts", "p.jsonl", "--show-config", "--json", cwd=tmp_path)
    assert json.loads(result.stdout)["config"]["workload"]["num_prompts"] == 2


def test_a_task_of_a_job_has_a_folder_of_its_own_and_begins_or_goes_on(study: Path, tmp_path: Path) -> None:
    asked = ("tune", *MODEL, "--resume", "auto", "--show-config", "--json", "-o", "s-{task}")
    fresh = json.loads(pipetune(*asked, cwd=tmp_path, SLURM_ARRAY_TASK_ID="3", SLURM_PROCID="0").stdout)["config"]
    assert (fresh["output_dir"], fresh["n_trials"]) == ("s-3", 20)
    shutil.copytree(study, tmp_path / "s-7")
    begun = json.loads(pipetune(*asked, cwd=tmp_path, JOB_COMPLETION_INDEX="7").stdout)
    assert begun["config"]["output_dir"] == "s-7"
    assert any("study.yaml" in source for source in begun["sources"].values())


def test_a_folder_that_holds_another_study_is_left_alone(study: Path) -> None:
    before = {path: path.read_bytes() for path in study.rglob("*.json")}
    result = pipetune("tune", *MODEL, "-o", str(study))
    assert result.returncode == 2
    assert "holds a study already" in result.stderr
    assert {path: path.read_bytes() for path in study.rglob("*.json")} == before


def test_a_report_is_printed_and_written(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s")
    result = pipetune("report", str(folder))
    assert result.returncode == 0
    assert max(map(len, result.stdout.splitlines())) <= 80
    for name in ("ranking.csv", "ranking.md", "report.html", "trace.json.gz", "best_plan.json", "best_device_map.json"):
        assert (folder / name).stat().st_size > 0
    assert read_plan(folder / "best_plan.json").devices == ("cpu:0", "cpu:1")


def test_a_study_is_found_by_its_name(tmp_path: Path) -> None:
    write_study(tmp_path / "results/mine")
    assert pipetune("export", "mine", cwd=tmp_path).returncode == 0


def test_json_is_one_document(study: Path) -> None:
    document = json.loads(pipetune("report", str(study), "--json").stdout)
    assert document["exit_code"] == 0
    assert document["best"]["rank"] == 1
    assert document["best"]["speedup_over_baseline"]["value"] > 1
    assert document["baseline"]["batch_size"] == 32
    assert len(document["failures"]) == 2


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("hf", '"lm_head": "cpu"'),
        ("ranges", "model.layers.0-"),
        ("plan", '"micro_batch_size"'),
        ("vllm", "VLLM_PP_"),
        ("sglang", "SGLANG_PP_LAYER_PARTITION="),
        ("trtllm", "pp_partition: ["),
        ("llama.cpp", "--tensor-split "),
    ],
)
def test_every_form_is_exported(study: Path, form: str, expected: str, tmp_path: Path) -> None:
    printed = pipetune("export", str(study), "--format", form)
    assert printed.returncode == 0
    assert expected in printed.stdout
    path = tmp_path / "out"
    assert pipetune("export", str(study), "--format", form, "-o", str(path)).returncode == 0
    assert path.read_text(encoding="utf-8") == printed.stdout
    assert pipetune("export", str(study), "--format", form, "-o", str(path)).returncode == 2


def test_lines_for_engines_say_that_they_were_not_measured_there(study: Path) -> None:
    assert pipetune("export", str(study), "-f", "vllm").stdout.startswith("# Not measured on vLLM")
    assert pipetune("export", str(study), "-f", "sglang").stdout.startswith("# Not measured on SGLang")


def test_export_knows_its_bounds(study: Path) -> None:
    assert "is none of hf, ranges" in pipetune("export", str(study), "-f", "xml").stderr
    assert "ranked plans" in pipetune("export", str(study), "--rank", "99").stderr
    named = pipetune("export", str(study), "--device-names", "cuda:4,cuda:5")
    assert set(json.loads(named.stdout).values()) == {"cuda:4", "cuda:5"}
    for form, names in (("hf", "cuda:4"), ("ranges", "cuda:4,cuda:5,cuda:6"), ("vllm", "cuda:4,cuda:5")):
        refused = pipetune("export", str(study), "-f", form, "--device-names", names)
        assert refused.returncode == 2
        assert "one for each of the plan's 2 stages, cpu:0, cpu:1" in refused.stderr


def test_without_a_feasible_plan_the_exit_code_is_3(tmp_path: Path) -> None:
    records = [
        make_record(index, "trial", make_plan(), make_failure(FailureKind.OUT_OF_MEMORY), trial_number=index)
        for index in range(3)
    ]
    folder = write_study(tmp_path / "s", records)
    result = pipetune("report", str(folder))
    assert result.returncode == 3
    assert "no plan ran: 3 of 3 failed with out_of_memory" in result.stderr
    assert pipetune("export", str(folder)).returncode == 3


def test_constraints_that_nothing_keeps_exit_3(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s", constraints=["mean_ttft_ms<=1"])
    result = pipetune("report", str(folder))
    assert result.returncode == 3
    assert "break a constraint, most often on mean_ttft_ms" in result.stderr


def test_a_machine_that_failed_every_trial_exits_4(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s", [make_record(0, "trial", make_plan(), make_failure(), trial_number=0)])
    assert pipetune("report", str(folder)).returncode == 4


def test_what_nobody_foresaw_exits_4_with_a_traceback_in_a_file(
    study: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: Any) -> Any:
        raise RuntimeError("[bold]what[/bold] is this")

    monkeypatch.setattr("pipetune.tuner.commands.conclude.conclude", fail)
    assert run(["report", str(study)]) == 4
    said = capsys.readouterr().err
    assert "RuntimeError: [bold]what[/bold] is this" in said
    path = Path(said.rpartition(" in ")[2].strip().removesuffix("."))
    assert "RuntimeError" in path.read_text(encoding="utf-8")
    path.unlink()


NARROW = "cores: 2 workers may use 1 of the machine's "


def narrow(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A command that has one core of this machine."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        return process(*args, "--no-progress", cwd=cwd)
    finally:
        os.sched_setaffinity(0, allowed)


def test_workers_without_a_core_each_are_said_before_the_run_and_noted(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "llama", "llama", 4)
    job = ("--model", "llama", "--devices", "cpu:0-1", "--num-prompts", "2", "--input-len", "4", "--output-len", "2")
    bench = narrow("bench", *job, "--layers", "2,2", "-o", "records.jsonl", "--num-iters", "1", cwd=tmp_path)
    assert bench.returncode == 0, bench.stderr
    assert bench.stderr.startswith(f"pipetune: {NARROW}")
    record = json.loads((tmp_path / "records.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert [note for note in record["result"]["notes"] if note.startswith(NARROW)]
    profile = narrow("profile", *job[:4], "--rows", "1", "--lengths", "4", "--pasts", "4", "--json", cwd=tmp_path)
    assert profile.stderr.startswith(f"pipetune: {NARROW}")
    assert [note for note in json.loads(profile.stdout)["notes"] if note.startswith(NARROW)]
    (tmp_path / "plan.json").write_text(make_plan((2, 2)).model_dump_json(), encoding="utf-8")
    gate = narrow("gate", *job, "--baseline-plan", "plan.json", "--max-minutes", "0", "--json", cwd=tmp_path)
    assert gate.stderr.count(NARROW) == 1
    assert [note for note in json.loads(gate.stdout)["notes"] if note.startswith(NARROW)]


def test_a_reader_who_leaves_early_is_no_error(study: Path) -> None:
    command = f"{sys.executable} -m pipetune report {study} --json | head -c 10"
    result = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(
    ("closed", "mode", "args", "named"),
    [
        ("s", 0o500, ("report", "s"), "s/best_plan.json: Permission denied"),
        ("s", 0o500, ("tune", "--resume", "-o", "s"), "s/.lock: Permission denied"),
        ("s", 0o500, ("tune", *MODEL, "-o", "s/new"), "s/new: Permission denied"),
        ("s/study.yaml", 0o000, ("report", "s"), "s/study.yaml: cannot read the config: Permission denied"),
        ("s", 0o000, ("export", "s"), "s/records: Permission denied"),
    ],
)
def test_what_a_user_has_no_rights_to_is_named(
    closed: str, mode: int, args: tuple[str, ...], named: str, study: Path, tmp_path: Path
) -> None:
    shutil.copytree(study, tmp_path / "s")
    (tmp_path / closed).chmod(mode)
    try:
        # Root without what lets it read and write all.
        prefix = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
        result = subprocess.run(
            [*prefix, sys.executable, "-P", "-m", "pipetune", *args],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(Path.cwd())},
        )
    finally:
        (tmp_path / closed).chmod(0o700)
    assert result.returncode == 2
    assert result.stderr.startswith("pipetune: ")
    assert result.stderr.endswith(f"{named}\n")


def test_a_study_that_cannot_be_written_to_is_shown_all_the_same(study: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "20m") as disk:
        shutil.copytree(study, disk / "s")
        read_only(disk)
        result = process("report", str(disk / "s"), COLUMNS="0", PYTHONIOENCODING="ascii")
    assert result.returncode == 2
    assert "tok/s" in result.stdout
    assert result.stderr == f"pipetune: {disk}/s/best_plan.json: Read-only file system\n"
