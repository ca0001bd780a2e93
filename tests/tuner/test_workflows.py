"""The example workflows: GitHub's schema, and flags that pipetune has."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import typer.main
import yaml

from pipetune.tuner.cli.app import app

FOLDER = Path(__file__).parents[2] / "examples" / "github"
WORKFLOWS = sorted(FOLDER.glob("*.yml"))
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_keeps_the_schema(workflow: Path) -> None:
    # The schema comes with check-jsonschema: nothing is fetched.
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", str(workflow)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def calls_in(workflow: Path) -> list[tuple[str, list[str]]]:
    """Every pipetune command in its steps, with the flags."""
    document = yaml.safe_load(workflow.read_text(encoding="utf-8"))
    steps = [step for job in document["jobs"].values() for step in job["steps"]]
    lines = "\n".join(step.get("run", "") for step in steps).replace("\\\n", " ").splitlines()
    found = [re.search(r"pipetune\"? ([a-z]+) (.*)", line) for line in lines]
    return [(match[1], re.findall(r"(?<![\w-])--[a-z-]+", match[2])) for match in found if match]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_every_flag_of_a_workflow_exists(workflow: Path) -> None:
    calls = calls_in(workflow)
    assert calls
    for name, flags in calls:
        parameters = COMMANDS[name].get_params(typer.Context(COMMANDS[name]))
        known = {option for parameter in parameters for option in parameter.opts + parameter.secondary_opts}
        assert flags
        assert set(flags) <= known
