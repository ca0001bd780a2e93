"""Flags over environment over file over defaults; and every mistake named with its key and place."""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path

import pytest
import yaml

from pipetune.bench.errors import ConfigError
from pipetune.bench.spec import Arrivals, Workload
from pipetune.tuner.config import sources
from pipetune.tuner.config.schema import TuneConfig
from pipetune.tuner.config.settings import KeyPath

MODEL = "model: {name: m}\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "tune.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_later_sources_win_and_are_named(tmp_path: Path) -> None:
    file = write(tmp_path, MODEL + "workload:\n  num_prompts: 4\n  input_len: 5\n  output_len: 6\n")
    resolved = sources.resolve(
        file=file,
        environ={"PIPETUNE_INPUT_LEN": "50", "PIPETUNE_OUTPUT_LEN": "60"},
        flags={"output_len": 600, "seed": None},
    )
    workload = resolved.config.workload
    assert (workload.num_prompts, workload.input_len, workload.output_len) == (4, 50, 600)
    assert resolved.source("workload", "num_prompts") == f"{file}:3"
    assert resolved.source("workload", "input_len") == "PIPETUNE_INPUT_LEN"
    assert resolved.source("workload", "output_len") == "--output-len"
    assert resolved.source("seed") == "default"


def test_defaults_are_those_of_the_model() -> None:
    resolved = sources.resolve(flags={"model": "m"}, environ={})
    assert resolved.config == TuneConfig.model_validate({"model": {"name": "m"}})


def test_a_seed_seeds_everything_that_has_one() -> None:
    config = sources.resolve(flags={"model": "m", "seed": 7}, environ={}).config
    assert (config.seed, config.workload.seed, config.model.seed) == (7, 7, 7)


def test_gpus_have_defaults_of_their_own_below_all_that_is_given(tmp_path: Path) -> None:
    def resolved(devices: str, **given: object) -> sources.Resolved:
        params = {"model": "m", "devices": devices, "prompts": None, **given}
        return sources.resolve_settings(params, recorded=recorded if given.pop("again", False) else None, warn=print)

    recorded = write(tmp_path, "model: {name: m, dtype: float16}\nworkload: {num_prompts: 3}\n")
    config = resolved("cuda:0-1").config
    workload = config.workload
    assert (config.model.dtype, workload.num_prompts, workload.input_len, workload.output_len) == ("auto", 64, 512, 128)
    assert resolved("cuda:0-1").source("model", "dtype") == "default on GPUs"
    given = resolved("cuda:0", dtype="float32", num_prompts=5, again=True).config
    assert (given.model.dtype, given.workload.num_prompts, given.workload.output_len) == ("float32", 5, 128)
    for devices in ("cpu:0-1", "cpu:0,cuda:0"):
        config = resolved(devices).config
        assert (config.model.dtype, config.workload) == ("float32", TuneConfig(model=config.model).workload)


def test_a_dtype_that_nobody_gave_stays_so_that_workers_can_say_it() -> None:
    config = sources.resolve_settings({"model": "m", "devices": "auto"}, warn=print).config
    assert "dtype" not in config.model.model_fields_set


@pytest.mark.parametrize(("given", "seconds"), [("90", 90), ("90s", 90), ("5m", 300), ("1.5min", 90), ("2h", 7200)])
def test_a_timeout_has_a_unit(given: str, seconds: float) -> None:
    assert sources.resolve(flags={"model": "m", "timeout": given}, environ={}).config.timeout_s == seconds
    with pytest.raises(ConfigError, match="--timeout: '5 days' is no time; write 90s, 5m or 2h"):
        sources.resolve(flags={"model": "m", "timeout": "5 days"}, environ={})


def test_lists_may_come_from_the_environment() -> None:
    environ = {"PIPETUNE_CONSTRAINT": "p90_ttft_ms<=5, bubble_ratio<=0.2", "PIPETUNE_MICRO_BATCH_SIZES": "4,8"}
    config = sources.resolve(flags={"model": "m"}, environ=environ).config
    assert [str(constraint) for constraint in config.constraints] == ["p90_ttft_ms<=5", "bubble_ratio<=0.2"]
    assert config.space.micro_batch_sizes == (4, 8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("workload:\n  num_prompt: 4\n", r"tune\.yaml:3: unknown key 'workload\.num_prompt'; did you mean num_prompts"),
        ("workloads: {}\n", r"tune\.yaml:2: unknown key 'workloads'; did you mean workload\?"),
        ("num_prompts: 4\n", r"tune\.yaml:2: unknown key 'num_prompts'; did you mean workload\.num_prompts\?"),
        ("zzz: 4\n", r"unknown key 'zzz'; there are .*n_trials"),
        ("seed: 1\nseed: 2\n", r"tune\.yaml:3: seed is given twice"),
        ("workload: 3\n", r"tune\.yaml:2: workload must be a mapping"),
        ("workload: {num_prompts: 0}\n", r"tune\.yaml:2: workload\.num_prompts: .*greater than or equal to 1"),
        ("workload: {num_prompts: many}\n", r"tune\.yaml:2: workload\.num_prompts: .*many"),
        ("devices: gpu:0\n", r"tune\.yaml:2: devices: 'gpu:0' is not a device"),
        (
            "workload:\n  sampling: {temprature: 1}\n",
            r"tune\.yaml:3: unknown key 'workload\.sampling\.temprature'; did you mean temperature\?",
        ),
        ("workload: {sampling: {top_p: 2}}\n", r"tune\.yaml:2: workload\.sampling\.top_p: .*less than or equal to 1"),
        ("workload: {kind: score, sampling: {top_k: 2}}\n", r"workload\.sampling: nothing is sampled"),
        ("space: {compile: often}\n", r"tune\.yaml:2: space\.compile: neither true nor false nor search"),
        ("constraints: [fast]\n", r"tune\.yaml:2: constraints: 'fast' is no constraint"),
        ("seed: [1\n", r"tune\.yaml:3:1: malformed YAML"),
        ("seed: !!python/object/apply:os.getcwd []\n", "malformed YAML: could not determine a constructor"),
    ],
)
def test_a_mistake_in_a_file_is_named_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sources.resolve(file=write(tmp_path, MODEL + text), environ={})


@pytest.mark.parametrize("text", ["- a\n", "just text\n"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="must be a mapping"):
        sources.resolve(file=write(tmp_path, text), environ={})


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot read the config"):
        sources.resolve(file=tmp_path / "none.yaml", environ={})


def test_a_mistake_in_flag_or_environment_is_named() -> None:
    with pytest.raises(ConfigError, match="--num-prompts: Input should be greater than or equal to 1"):
        sources.resolve(flags={"model": "m", "num_prompts": 0}, environ={})
    with pytest.raises(ConfigError, match="PIPETUNE_N_TRIALS: Input should be"):
        sources.resolve(flags={"model": "m"}, environ={"PIPETUNE_N_TRIALS": "0"})


def test_a_misspelt_variable_is_said() -> None:
    resolved = sources.resolve(flags={"model": "m"}, environ={"PIPETUNE_NUM_PROMPT": "3", "PIPETUNE_CACHE": "x"})
    assert resolved.warnings == ("PIPETUNE_NUM_PROMPT is not read; did you mean PIPETUNE_NUM_PROMPTS?",)


def test_sampling_may_be_given_in_parts_and_over_nothing(tmp_path: Path) -> None:
    file = write(tmp_path, MODEL + "workload:\n  sampling:\n    temperature: 0.5\n    top_k: 7\n")
    resolved = sources.resolve(file=file, environ={"PIPETUNE_TOP_P": "0.9"}, flags={"top_k": 3})
    sampling = resolved.config.workload.sampling
    assert sampling is not None
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.seed) == (0.5, 3, 0.9, 0)
    assert resolved.source("workload", "sampling", "temperature") == f"{file}:4"
    assert resolved.source("workload", "sampling", "top_k") == "--top-k"
    nothing: dict[KeyPath, object] = {("workload", "sampling"): None}
    over = sources.resolve(flags={"model": "m", "sampling_seed": 4}, environ={}, below=(nothing, "plan.json"))
    assert over.config.workload.sampling is not None
    assert over.config.workload.sampling.seed == 4


def test_a_model_must_be_given() -> None:
    with pytest.raises(ConfigError, match="--model"):
        sources.resolve(environ={})


def test_remote_code_is_trusted_on_the_command_line_alone(tmp_path: Path) -> None:
    file = write(tmp_path, "model: {name: m, trust_remote_code: true}\n")
    with pytest.raises(ConfigError, match="--trust-remote-code"):
        sources.resolve(file=file, environ={})
    with pytest.raises(ConfigError, match="--trust-remote-code"):
        sources.resolve(flags={"model": "m"}, environ={"PIPETUNE_TRUST_REMOTE_CODE": "1"})
    resolved = sources.resolve(file=file, environ={}, flags={"trust_remote_code": True})
    assert resolved.config.model.trust_remote_code


def test_a_shown_config_is_yaml_that_says_the_same() -> None:
    resolved = sources.resolve(flags={"model": "a: b # c", "constraint": ["p90_ttft_ms<=5"]}, environ={})
    shown = sources.show(resolved)
    assert TuneConfig.model_validate(yaml.safe_load(shown)) == resolved.config
    assert next(line for line in shown.splitlines() if "p90" in line).endswith("# --constraint")


def test_sections_within_sections_are_shown_once() -> None:
    resolved = sources.resolve(flags={"model": "m", "temperature": 0.5}, environ={})
    shown = sources.show(resolved)
    assert shown.count("workload:") == 1
    assert "    temperature: 0.5" in shown
    assert TuneConfig.model_validate(yaml.safe_load(shown)) == resolved.config


def test_a_recorded_config_of_before_has_the_defaults_of_what_it_lacks() -> None:
    recorded = sources.load(Path("tests/data/study-before-replicas/study.yaml"))
    assert recorded.space.replicas is None
    assert recorded.workload.kind == "generate"
    assert recorded.workload.sampling is None


def test_a_recorded_config_without_a_model_is_named(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text("seed: 1\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=f"^{re.escape(str(path))}: model: Field required$"):
        sources.load(path)


def test_a_dumped_config_reads_back_without_places(tmp_path: Path) -> None:
    given = sources.resolve(
        flags={"model": "m", "study_name": "x", "output_dir": "y", "storage": "postgresql://u:secret@h/d"}, environ={}
    ).config
    path = tmp_path / "study.yaml"
    path.write_text(sources.dump(given), encoding="utf-8")
    assert "secret" not in path.read_text(encoding="utf-8")
    assert sources.load(path) == given.model_copy(update={"name": None, "output_dir": None, "storage": None})


def test_values_of_a_plan_file_lie_below_and_go_with_its_model_only() -> None:
    below: dict[KeyPath, object] = {
        ("model", "name"): "a",
        ("model", "revision"): "abc",
        ("workload", "num_prompts"): 5,
    }
    kept = sources.resolve(environ={}, below=(below, "best.json"))
    assert (kept.config.model.revision, kept.source("model", "name")) == ("abc", "best.json")
    other = sources.resolve(environ={}, flags={"model": "b"}, below=(below, "best.json"))
    assert other.config.model.revision is None
    assert other.config.workload.num_prompts == 5


def workload(prompts: Path, **params: object) -> Workload:
    given = {"model": "m", "devices": "cpu:0", "prompts": str(prompts), **params}
    return sources.resolve_settings(given, warn=pytest.fail).config.workload


def test_few_prompts_are_all_used(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a\xe2\x80\xa8b"}\r\n\r\n{"prompt": ["c", "d"]}\r\n')
    assert (workload(path).num_prompts, workload(path).prompts_file) == (3, str(path))
    assert workload(path, num_prompts=2).num_prompts == 2


def test_prompts_of_a_pipe_are_named_by_their_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPETUNE_CACHE", str(tmp_path / "cache"))
    os.mkfifo(pipe := tmp_path / "pipe")
    writer = threading.Thread(target=pipe.write_text, args=('{"prompt": "a"}\n',))
    writer.start()
    found = workload(pipe)
    writer.join()
    assert found.num_prompts == 1
    assert Path(found.prompts_file or "").parent == tmp_path / "cache/prompts"


def test_what_is_wrong_with_prompts_is_said_at_once(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a", "min_tokens": 4}\n')
    with pytest.raises(ConfigError, match=r"p.jsonl:1: min_tokens=4: no length of an output"):
        workload(path, num_prompts=1)


def test_output_lengths_of_lines_are_part_of_the_workload(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a", "max_tokens": 4}\n{"prompt": "b"}\n')
    found = workload(path)
    assert (found.num_prompts, found.output_lens) == (2, (4, 16))
    assert workload(path, num_prompts=1, output_len=4).output_lens is None


def test_a_folder_is_named_by_its_full_path_and_an_id_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("model", "smollm2-135m", "elsewhere"):
        (tmp_path / name).mkdir()
    (tmp_path / "latest").symlink_to("model")
    monkeypatch.chdir(tmp_path / "elsewhere")
    asked = {"../model": "model", "..": "", "../latest": "latest"}
    for name, found in asked.items():
        assert sources.resolve(flags={"model": name}, environ={}).config.model.name == str(tmp_path / found)
    monkeypatch.chdir(tmp_path)
    for name in ("smollm2-135m", "someone/model", str(tmp_path / "x" / ".." / "model")):
        assert sources.resolve(flags={"model": name}, environ={}).config.model.name == name


def test_limits_of_good_requests_are_read_as_they_are_dumped(tmp_path: Path) -> None:
    config = sources.resolve(flags={"model": "m", "goodput": ["ttft:500", "tpot:50"]}, environ={}).config
    text = yaml.safe_dump(config.model_dump(mode="json"))
    assert "ttft:500 tpot:50" in text
    assert sources.resolve(file=write(tmp_path, text), environ={}).config == config
    long = write(tmp_path, MODEL + "workload:\n  goodput:\n    ttft: 500.0\n    tpot: 50.0\n")
    assert sources.resolve(file=long, environ={}).config.workload.goodput == config.workload.goodput


def traced(path: Path, **given: object) -> TuneConfig:
    params = {"model": "m", "devices": "cpu:0", "request_rate": None, "trace": str(path), **given}
    return sources.resolve_settings(params, reads_trace=True, warn=print).config


def test_a_trace_says_what_the_workload_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = ("0,5,7", "3,6,0", "4,8,9", "6,2,1")
    path = tmp_path / "burst.csv"
    path.write_text("\n".join(("Timestamp,Request tokens,Response tokens", *rows)))
    workload = traced(path, time_scale=0.5).workload
    assert workload.arrivals is not None
    assert workload.arrivals.times_s == (0.0, 2.0, 3.0)
    assert (workload.num_prompts, workload.input_lens, workload.output_lens) == (3, (5, 8, 2), (7, 9, 1))
    assert "1 requests had failed" in capsys.readouterr().out
    assert traced(path, num_prompts=2).workload.input_lens == (5, 8)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"timestamp": 0, "prompt": "a", "output_length": 3}\n{"timestamp": 9, "prompt": "b"}\n')
    workload = traced(prompts, output_len=11).workload
    assert (workload.prompts_file, workload.output_lens, workload.input_lens) == (str(prompts), (3, 11), None)
    prompts.write_text('{"timestamp": 0, "prompt": "a"}\n{"timestamp": 9, "input_length": 4, "output_length": 2}\n')
    with pytest.raises(ConfigError, match=r"prompts.jsonl:2: has no prompt, and .*:1 has one"):
        traced(prompts)


def test_what_cannot_be_under_arrivals_is_refused(tmp_path: Path) -> None:
    base = {"model": "m", "devices": "cpu:0-1", "request_rate": 3.0}

    def refused(**given: object) -> str:
        with pytest.raises(ConfigError) as error:
            sources.resolve_settings({**base, **given}, reads_trace=True, warn=print)
        return str(error.value)

    assert "space.compile" in refused(compile=True)
    rated = {"objective": ["max_request_rate"], "goodput": ["ttft:5"]}
    assert "max_concurrency: it hides what rate" in refused(**rated, max_concurrency=3)
    assert "give --goodput" in refused(objective=["max_request_rate"])
    ramp = {"ramp_up_strategy": "linear", "ramp_up_start_rps": 1.0, "ramp_up_end_rps": 2.0, "request_rate": None}
    assert "ramp_up_strategy: a search for the highest rate begins with one" in refused(**rated, **ramp)
    looking = sources.resolve_settings({**base, **rated, "slo_attainment": 0.8}, reads_trace=True, warn=print)
    assert looking.config.workload.arrivals == Arrivals(request_rate=3.0, slo_attainment=0.8)
    with pytest.raises(ConfigError, match="max_concurrency: it hides what rate"):
        sources.resolve_settings(
            {**base, "objective": ["max_request_rate"], "goodput": ["ttft:5"], "max_concurrency": 3}, warn=print
        )
    with pytest.raises(ConfigError, match="mean_itl_ms needs requests that come over time"):
        sources.resolve_settings({"model": "m", "devices": "cpu:0", "objective": ["mean_itl_ms"]}, warn=print)
    # A command that gives all prompts at once says who does not.
    file = write(tmp_path, MODEL + "devices: [cpu:0]\nworkload: {arrivals: {request_rate: 3.0}}\n")
    with pytest.raises(ConfigError, match="`pipetune bench` measures under arrivals"):
        sources.resolve_settings({"config": file}, warn=print)
