"""The demo: a real model that is cut since it fits on no device; its settings and prompts come with the package."""

import json
import shutil
import sys
from pathlib import Path

from pipetune.bench.fleet.fleet import available_devices
from pipetune.bench.spec import device_kind
from pipetune.tuner.config.schema import TuneConfig
from pipetune.tuner.config.settings import KeyPath
from pipetune.tuner.config.sources import Below
from pipetune.tuner.planning.partition.device_map import ranges_map, stage_names
from pipetune.tuner.report.data import Report
from pipetune.tuner.report.document import GAP, Code, Document, Figure, Figures, Text
from pipetune.tuner.report.study_charts import timeline_chart
from pipetune.tuner.study.files import StudyFile
from pipetune.tuner.study.plan_file import DEVICE_MAP_FILE, PLAN_FILE

DATA = Path(__file__).with_name("demo_data")
CONFIG = DATA / "demo.yaml"


def below() -> tuple[Below, str | None]:
    """Settings below those of the demo's file, and what must be said of the devices: a pipeline takes two."""
    values: dict[KeyPath, object] = {("workload", "prompts_file"): str(DATA / "prompts.jsonl")}
    there, why = available_devices(), None
    if device_kind(there[0]) == "cpu" or len(there) == 1:
        values[("devices",)] = ["cpu:0", "cpu:1"]
    if len(there) == 1:
        why = f"nothing can be pipelined over {there[0]} alone: the demo shows two stages on two CPU workers"
    return (values, "pipetune demo"), why


def named(config: TuneConfig) -> TuneConfig:
    """The settings with names for CPU workers, which would all be `cpu` in the device map."""
    devices = config.concrete_devices
    names = tuple(f"cuda:{place}" if device_kind(device) == "cpu" else device for place, device in enumerate(devices))
    return config if config.device_names else config.model_copy(update={"device_names": names})


def is_finished(report: Report) -> bool:
    """Whether nothing is left to run."""
    searched = report.log is not None and report.log.stop is not None
    rounds = report.ranking.separation.rounds
    return searched and rounds >= report.config.finalist_rounds and (report.folder / PLAN_FILE).exists()


def ending_of(report: Report) -> Document:
    """What a demo ends with: one iteration of the best plan, its device map, and what to type next."""
    best, chart, folder = report.ranking.best, timeline_chart(report), report.folder
    assert best is not None, "only a demo that found a plan ends so"
    assert report.shape is not None, "a study that was loaded has one"
    names = ", ".join(stage_names(best.plan, report.config.device_names))
    commands = {
        "what it generates": f"bench --plan {folder / PLAN_FILE} --save-outputs demo.jsonl",
        "without the cap, where copies of the model may win": f"tune --model {report.config.model.name} "
        f"--devices {','.join(report.config.devices)} \\\n    --prompts {folder / StudyFile.PROMPTS} -o results/copies",
        "the split for another engine": f"export {folder} --format vllm",
    }
    return Document(
        parts=(
            *((GAP, Figures((Figure("Timeline of the stages", chart),))) if chart is not None else ()),
            GAP,
            Text(f"Device map of the best plan, layers as ranges; {DEVICE_MAP_FILE} calls them {names}", "strong"),
            Code(json.dumps(ranges_map(report.shape, best.plan), indent=1)),
            GAP,
            Text("What to type next", "strong"),
            Code("\n".join(f"# {why}\n{program()} {command}" for why, command in commands.items())),
        )
    )


def program() -> str:
    """What the command is called here: it may lie in a virtual environment that is not on the path."""
    if shutil.which("pipetune"):
        return "pipetune"
    return sys.argv[0] if Path(sys.argv[0]).name == "pipetune" else f"{Path(sys.executable).name} -m pipetune"
