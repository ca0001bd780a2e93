"""A setting is stated once, on its field; options, variables, YAML, the shown config and the page follow from it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import Field

from pipetune.bench.spec import Flag, Value
from pipetune.tuner.cli import options, run
from pipetune.tuner.config import sources
from pipetune.tuner.config.schema import TuneConfig
from pipetune.tuner.config.settings import leaves_of, settings_of
from tests.tuner.cli import reference

PAGE = Path("docs/cli.md")


class Cooling(Value):
    """A section that only the toy has."""

    pause_s: Annotated[float | None, Flag("Workload", "Rest between runs.", name="pause", metavar="SECONDS")] = None


class Toy(TuneConfig):
    """The config with a setting, and a section with another, that no other place knows of."""

    tries: Annotated[int, Flag("Search", "How often a plan is tried.")] = Field(default=2, ge=1)
    cooling: Cooling = Cooling()


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A YAML file of the toy, which is the config meanwhile; options are built anew for it."""
    monkeypatch.setattr(sources, "TuneConfig", Toy)
    path = tmp_path / "toy.yaml"
    path.write_text("model: {name: m}\ndevices: cpu:0-1\ntries: 3\ncooling:\n  pause_s: 1.5\n", encoding="utf-8")
    return path


def shown(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, str]:
    """Lines of `--show-config` by their keys."""
    assert run(["tune", *args, "--show-config"]) == 0
    return {line.partition(":")[0].strip(): line for line in capsys.readouterr().out.splitlines()}


def test_a_field_is_found_everywhere(
    toy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = ("--config", str(toy))
    lines = shown(capsys, *file)
    assert lines["tries"].split() == ["tries:", "3", "#", f"{toy}:3"]
    assert lines["pause_s"].split() == ["pause_s:", "1.5", "#", f"{toy}:5"]
    monkeypatch.setenv("PIPETUNE_TRIES", "4")
    monkeypatch.setenv("PIPETUNE_PAUSE", "2.5")
    lines = shown(capsys, *file)
    assert lines["tries"].split() == ["tries:", "4", "#", "PIPETUNE_TRIES"]
    assert lines["pause_s"].split() == ["pause_s:", "2.5", "#", "PIPETUNE_PAUSE"]
    lines = shown(capsys, *file, "--tries", "5", "--pause", "3")
    assert lines["tries"].split() == ["tries:", "5", "#", "--tries"]
    assert lines["pause_s"].split() == ["pause_s:", "3.0", "#", "--pause"]
    assert run(["tune", *file, "--tries", "0"]) == 2
    assert "--tries: Input should be greater than or equal to 1" in capsys.readouterr().err
    assert run(["tune", "--help"]) == 0
    assert "--tries" in capsys.readouterr().out
    page = reference.page()
    assert "- `--tries INT`, `PIPETUNE_TRIES`, `tries` (`2`): How often a plan is tried." in page
    assert "- `--pause SECONDS`, `PIPETUNE_PAUSE`, `cooling.pause_s`: Rest between runs." in page


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference.page(), (
        f"write it anew: python -m tests.tuner.cli.reference --write {PAGE}"
    )
    assert max(map(len, reference.page().splitlines())) <= reference.WIDTH


def test_groups_are_panels_single_settings_and_sections() -> None:
    def names(*wanted: str, without: tuple[str, ...] = ()) -> list[str]:
        return [setting.name for setting in options.chosen(wanted, without)]

    assert names("Study") == ["output_dir", "study_name", "on_device_loss", "storage", "shared_study", "device_names"]
    assert names("seed", "protocol") == ["seed", "num_iters", "num_iters_warmup", "check"]
    assert names("Workload", without=("workload", "seed")) == ["num_iters", "num_iters_warmup", "check", "devices"]
    assert names("device_order", "space").count("device_order") == 1
    with pytest.raises(AssertionError, match="nothing is no panel"):
        names("nothing")


def test_a_setting_has_the_type_of_its_field() -> None:
    settings = settings_of(TuneConfig)
    kinds = {name: settings[name].kind for name in ("n_trials", "max_stages", "temperature", "timeout", "profile")}
    assert kinds == {"n_trials": int, "max_stages": int, "temperature": float, "timeout": str, "profile": bool}
    assert settings["seed"].paths == (("seed",), ("workload", "seed"), ("model", "seed"))
    assert (settings["check"].option, settings["check"].variable) == ("--check", "PIPETUNE_CHECK")


def test_what_a_flag_also_sets_are_fields() -> None:
    config = TuneConfig.model_validate(
        {
            "model": {"name": "m"},
            "workload": {"sampling": {}, "arrivals": {"request_rate": 1}},
            "engine": {"python": "python"},
        }
    )
    fields = leaves_of(config.model_dump(mode="json"))
    assert {path for setting in settings_of(TuneConfig).values() for path in setting.paths} <= fields.keys()


@pytest.mark.parametrize("option", ["--max-memory-per-device", "--kv-cache-memory-bytes"])
def test_an_amount_of_memory_has_a_unit(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("--model", "m", "--devices", "cpu:0-1", "--engine-python", "python", option, "600MiB")
    lines = shown(capsys, *given)
    line = lines[settings_of(TuneConfig)[option[2:].replace("-", "_")].path[-1]]
    # Of the engine's KV cache there may be several sizes.
    assert re.search(rf": \[?{600 * 2**20}\]? +# {option}", line)


def test_an_engine_without_its_python_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    given = ("--model", "m", "--devices", "cuda:0-1", "--layers", "16,14", "--engine", "sglang")
    assert run(["bench", *given]) == 2
    assert "--engine sglang: which Python has it? Give it by --engine-python" in capsys.readouterr().err
