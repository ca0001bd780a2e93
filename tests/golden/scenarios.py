"""What is typed, on which files, and what of the outcome is kept."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.golden.command import ROOT, Forks, run
from tests.golden.text import content, masked, outline, shape

INPUTS = Path(__file__).parent / "inputs"
REFERENCE, BEFORE_REPLICAS = ROOT / "results/reference-smollm2-2cpu", ROOT / "tests/data/study-before-replicas"
DUMMY, DEVICE_FILE, PROMPTS = (
    ROOT / "examples/dummy-llama-12l",
    ROOT / "examples/devices-2xa100-2xa10.yaml",
    ROOT / "examples/prompts.jsonl",
)
LONGEST = "real"
STARTS_FLEETS = (LONGEST, "workers")
SUBCOMMANDS = (
    "demo",
    "join",
    "serve",
    "metrics",
    "doctor",
    "profile",
    "plan",
    "tune",
    "bench",
    "report",
    "export",
    "gate",
    "rollout",
    "collect",
    "compare",
    "history",
)


_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d+)?\+00:00")
_LONG = re.compile(r"\d+\.\d{12,}(?:e[-+]?\d+)?")
_TOOK = re.compile(
    r'(?<="took_s": )0\.\d|(?<=at different times; )0 s|(?<=tests="8" failures="0" errors="8" time=")[\d.]+'
)
_KEPT_PROCESSOR = "AMD EPYC"
_STARTED = datetime.now(UTC).replace(microsecond=0)


@dataclass(frozen=True)
class Step:
    """One command, and which of the files that it leaves are kept with what it says."""

    name: str
    args: tuple[str, ...]
    kept: bool = False
    """Everything derives from kept data: outputs are compared exactly."""
    files: tuple[str, ...] = ()
    verdicts: str = ""
    """Exit codes that are all as good."""
    prepare: Callable[[Path], None] | None = None


Sections = dict[str, str]
"""By title, which ends with how it is compared: `[exact]`, `[words]` or `[shape]`."""


def walk(chain: str, folder: Path) -> Iterator[tuple[str, Sections | Exception]]:
    """All steps of a chain, each by name with what it left; one that cannot be run does not keep the others from it."""
    (folder / "forks").mkdir()
    forks = Forks(folder / "forks")
    for step in CHAINS[chain]:
        try:
            yield step.name, sections(step, folder, forks.run if step.kept else run)
        except Exception as error:
            yield step.name, error
    forks.close()


def sections(step: Step, folder: Path, run: Callable[..., subprocess.CompletedProcess[str]]) -> Sections:
    """Runs a step and sorts what it left into sections."""
    if step.prepare:
        step.prepare(folder)
    done = run(step.args, folder)
    code = step.verdicts if str(done.returncode) in step.verdicts.split() else str(done.returncode)
    found = {"command [exact]": " ".join(("pipetune", *step.args)), "exit code [exact]": code}
    for name, text in (("stdout", done.stdout), ("stderr", done.stderr)):
        text = _local(text, folder)
        if step.kept:
            found[f"{name} [exact]"] = "\n".join(line.rstrip() for line in text.splitlines())
        elif "--json" in step.args and name == "stdout" and text:
            found[f"{name} [shape]"] = shape(json.loads(text))
        else:
            found[f"{name} [words]"] = masked(text)
    for given in step.files:
        place = folder / given
        paths = sorted(path for path in place.rglob("[!.]*") if path.is_file()) if place.is_dir() else [place]
        found[f"files of {given} [exact]"] = "\n".join(_file_names(place, paths))
        for path in paths:
            how, text = content(path) if step.kept else outline(path)
            title = _numberless(str(path.relative_to(folder)))
            found.setdefault(f"{title} [{how}]", _local(text, folder))
    return found


def _file_names(place: Path, paths: list[Path]) -> Iterator[str]:
    names = (str(path.relative_to(place)) if path != place else path.name for path in paths)
    yield from sorted({_numberless(name) for name in names})


def _numberless(name: str) -> str:
    """One name for all records."""
    return re.sub(r"records/\d+", "records/NNNN", name)


def _local(text: str, folder: Path) -> str:
    """Without what is this machine's alone: folders, interpreter, processor, the last digits of its sums."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text(encoding="utf-8")) if cpuinfo.exists() else None
    text = text.replace(str(folder), "FOLDER").replace(str(ROOT), "ROOT").replace(sys.executable, "PYTHON")
    text = _TOOK.sub("TOOK", text)
    text = _LONG.sub(lambda number: f"{float(number[0]):.10g}", text)
    text = _TIME.sub(lambda time: "NOW" if datetime.fromisoformat(time[0]) >= _STARTED else time[0], text)
    # Kept studies name theirs, which may be this machine's.
    for name in (*found.groups(), _KEPT_PROCESSOR) if found else (_KEPT_PROCESSOR,):
        text = re.sub(r"\s+".join(map(re.escape, name.split())), "PROCESSOR", text)
    return text


# What steps work on.


def _study(name: str, source: Path, **changes: Any) -> Callable[[Path], None]:
    """A copy of a kept study under a name, with lines of its study.yaml replaced."""

    def prepare(folder: Path) -> None:
        shutil.copytree(source, folder / name)
        config = folder / name / "study.yaml"
        text = config.read_text(encoding="utf-8")
        for old, new in changes.items():
            text, count = re.subn(rf"(?m)^{old}:.*(\n- .*)*$", f"{old}: {new}", text)
            assert count == 1, old
        config.write_text(text, encoding="utf-8")

    return prepare


def _with_failures(folder: Path) -> None:
    """A study whose first trials failed in several ways."""
    _study("failed", REFERENCE)(folder)
    failures: dict[str, dict[str, Any]] = {
        "0004": {
            "kind": "out_of_memory",
            "message": "stage 1 wants 2 GiB and had 1 GiB",
            "stage": 1,
            "device": "cpu:1",
        },
        "0005": {"kind": "worker_died", "message": "the worker of cpu:0 died", "stage": 0, "phase": "decode"},
        "0006": {"kind": "wrong_output", "message": "tokens differ", "detail": "row 3"},
    }
    for number, failure in failures.items():
        path = folder / "failed/records" / f"{number}.json"
        record = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(record | {"result": {"outcome": "failure", **failure}}), encoding="utf-8")


def _inputs(folder: Path) -> None:
    """Models without weights, prompts, plans, benchmark files, and configs that are wrong."""
    for name, layers in {"llama": 12, "two": 2}.items():
        (folder / name).mkdir()
        config = json.loads((DUMMY / "config.json").read_text(encoding="utf-8")) | {"num_hidden_layers": layers}
        (folder / name / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shutil.copy(DEVICE_FILE, folder / "devices.yaml")
    shutil.copy(PROMPTS, folder / "prompts.jsonl")
    for path in INPUTS.iterdir():
        shutil.copy(path, folder)
    shutil.copytree(REFERENCE, folder / "kept")
    for name, text in {
        "unknown.yaml": "model: {name: m}\nworkload:\n  num_promts: 3\n",
        "malformed.yaml": "model: {name: m\nseed: 3\n",
        "metric.yaml": "gate: {metrics: {speed: {}}}\n",
        "plan.json": '{"stages": [{"device": "cpu:0"}]}',
        "gap.json": '{"model.layers.0-1": "cpu:0", "model.layers.3-4": "cpu:1"}',
    }.items():
        (folder / name).write_text(text, encoding="utf-8")


def _two_nights(folder: Path) -> None:
    _study("nights/first", BEFORE_REPLICAS)(folder)
    _study("nights/second", REFERENCE)(folder)


def _both(folder: Path) -> None:
    _study("ref", REFERENCE)(folder)
    _study("before", BEFORE_REPLICAS)(folder)


MODEL = ("--model", "m", "--devices", "cpu:0-1")
DUMMY_TWO = ("--model", "two", "--load-format", "dummy", "--devices", "cpu:0-1")
WORK = ("--num-prompts", "8", "--input-len", "8", "--output-len", "4")
RUNS = ("--num-iters", "1", "--num-iters-warmup", "1")
TUNE = (
    *("tune", *DUMMY_TWO, *WORK, *RUNS, "--baseline-batch-sizes", "8", "--finalists", "1", "--finalist-rounds", "1"),
    *("--min-stages", "2", "--micro-batch-sizes", "4", "--prefill-micro-batch-sizes", "4", "--memory-fractions", "0.9"),
    *("--replicas", "1", "--device-order", "given", "--n-trials", "1", "-o", "study"),
)
PLAN = ("plan", "--model", "llama", "--load-format", "dummy", "--device-file", "devices.yaml", *WORK)
GRID = ("--rows", "1,4", "--lengths", "8", "--pasts", "8")
BENCH = ("bench", *DUMMY_TWO, "--layers", "1,1", "--micro-batch-size", "4", *WORK, *RUNS, "--no-progress")
BESIDE = ("--compare-baseline", "--rounds", "1", "--baseline-batch-sizes", "8")
GATE = (
    "gate",
    "--baseline-plan",
    "study/best_plan.json",
    *WORK,
    *RUNS,
    "--rounds-in-process",
    "--no-progress",
    "--json",
)
DOCTOR = ("doctor", "--model", "llama", "--load-format", "dummy", "--devices", "cpu:0-1", *WORK)
BAD: Mapping[str, tuple[str, ...]] = {
    "no-model": ("tune",),
    "no-prompts": ("tune", *MODEL, "--num-prompts", "0"),
    "no-number": ("tune", *MODEL, "--num-prompts", "many"),
    "bad-device": ("tune", *MODEL, "--devices", "gpu:0"),
    "bad-objective": ("tune", *MODEL, "--objective", "speed"),
    "bad-constraint": ("tune", *MODEL, "--constraint", "fast"),
    "few-samples": ("tune", *MODEL, "--constraint", "p99_ttft_ms<=5"),
    "many-stages": ("tune", *MODEL, "--max-stages", "3"),
    "bad-dtype": ("tune", *MODEL, "--dtype", "int3"),
    "bad-chunks": ("tune", *MODEL, "--prefill-chunk-sizes", "a"),
    "score-throughput": ("tune", *MODEL, "--workload-kind", "score", "--objective", "output_throughput"),
    "unknown-key": ("tune", "-c", "unknown.yaml"),
    "malformed-yaml": ("tune", "-c", "malformed.yaml"),
    "no-config": ("tune", *MODEL, "--config", "none.yaml"),
    "no-study": ("tune", *MODEL, "--resume", "-o", "none"),
    "study-there": ("tune", *MODEL, "-o", "kept"),
    "other-settings": ("tune", *MODEL, "--resume", "-o", "kept"),
    "no-such-flag": ("tune", *MODEL, "--no-such-flag"),
    "no-such-command": ("nonsense",),
    "which-plan": ("bench", *MODEL),
    "bad-plan": ("bench", *MODEL, "--plan", "plan.json"),
    "no-layers": ("bench", *MODEL, "--layers", "0,3"),
    "gate-what": ("gate",),
    "gate-metric": ("gate", "--baseline-plan", "kept/best_plan.json", "--config", "metric.yaml"),
    "gate-flags": ("gate", "old.json", "new.json", "--order-seed", "0"),
    "export-format": ("export", "kept", "-f", "xml"),
    "export-rank": ("export", "kept", "--rank", "99"),
    "compare-one": ("compare", "kept"),
    "history-none": ("history", "none"),
}
FORMS = ("hf", "ranges", "plan", "vllm", "sglang", "trtllm", "llama.cpp")
DERIVED = (
    "ranking.md",
    "ranking.csv",
    "report.html",
    "trace.json.gz",
    "best_device_map.json",
    "best_plan.json",
    "plots",
)


def _derived(study: str) -> tuple[str, ...]:
    return tuple(f"{study}/{name}" for name in DERIVED)


CHAINS: Mapping[str, tuple[Step, ...]] = {
    "help": (
        Step("help", ("--help",), kept=True),
        *(Step(f"help-{name}", (name, "--help"), kept=True) for name in SUBCOMMANDS),
    ),
    "bad": tuple(
        Step(f"bad-{name}", args, kept=True, prepare=None if index else _inputs)
        for index, (name, args) in enumerate(BAD.items())
    ),
    "kept": (
        Step("report", ("report", "ref"), kept=True, files=_derived("ref"), prepare=_both),
        Step("report-json", ("report", "ref", "--json"), kept=True),
        Step("report-before", ("report", "before"), kept=True, files=_derived("before")),
        Step(
            "report-front", ("report", "front"), kept=True, files=("front/ranking.md", "front/report.html"),
            prepare=_study("front", REFERENCE, objectives="[output_throughput, mean_ttft_ms]"),
        ),
        Step(
            "report-broken", ("report", "broken"), kept=True,
            prepare=_study("broken", REFERENCE, constraints="[mean_ttft_ms<=1]"),
        ),
        Step(
            "report-failed", ("report", "failed"), kept=True, files=("failed/ranking.csv", "failed/report.html"),
            prepare=_with_failures,
        ),
        *(Step(f"export-{form}", ("export", "ref", "-f", form), kept=True) for form in FORMS),
        Step("compare", ("compare", "ref", "before", "-o", "compared"), kept=True, files=("compared",)),
        Step("compare-json", ("compare", "ref", "before", "--json"), kept=True),
        Step("history", ("history", "nights", "-o", "trend"), kept=True, files=("trend",), prepare=_two_nights),
        Step("history-json", ("history", "nights", "--json"), kept=True),
    ),
    "still": (
        Step("show-config", ("tune", *MODEL, "--seed", "5", "--show-config"), kept=True, prepare=_inputs),
        Step("gate-files", ("gate", "old.json", "new.json", "-o", "gated"), kept=True, files=("gated",)),
        Step("gate-files-json", ("gate", "old.json", "new.json", "--json"), kept=True),
    ),
    "workers": (
        Step("plan", (*PLAN, "-o", "best.json"), kept=True, files=("best.json",), prepare=_inputs),
        Step("plan-json", (*PLAN, "--json"), kept=True),
        Step("bad-missing-model", ("tune", "--model", "/nowhere/model", "--devices", "cpu:0", "-o", "none"), kept=True),
        Step("bad-map-with-gap", ("bench", *DUMMY_TWO, "--device-map", "gap.json"), kept=True),
    ),
    "real": (
        Step("tune", TUNE, files=("study",), prepare=_inputs),
        Step("tune-again", (*TUNE, "--resume", "--json")),
        Step("tune-dry", ("tune", *DUMMY_TWO, *WORK, "-o", "none", "--dry-run", "--json")),
        Step("profile", ("profile", *DUMMY_TWO, *GRID, "--refresh")),
        Step("profile-json", ("profile", *DUMMY_TWO, *GRID, "--refresh", "--json")),
        Step("bench", (*BENCH, *BESIDE, "-o", "runs.jsonl"), files=("runs.jsonl",)),
        Step("bench-json", (*BENCH, "--json", "--ignore-eos", "--save-outputs", "out.jsonl"), files=("out.jsonl",)),
        Step("bench-compared", (*BENCH, *BESIDE, "--json")),
        Step("doctor", ("doctor", "--devices", "cpu:0-1")),
        Step("doctor-json", ("doctor", "--devices", "cpu:0-1", "--json")),
        Step("doctor-model", DOCTOR),
        Step("doctor-model-json", (*DOCTOR, "--json")),
        Step("gate", (*GATE, "-o", "gated"), files=("gated",), verdicts="0 1 3"),
    ),
}  # fmt: skip
