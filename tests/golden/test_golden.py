"""What people see and what files hold: the same as recorded, but for the changes that `renames.txt` lists."""

from __future__ import annotations

import ast
import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.golden.command import ROOT
from tests.golden.record import DATA, load
from tests.golden.scenarios import CHAINS, LONGEST, STARTS_FLEETS, SUBCOMMANDS, Sections, walk
from tests.golden.text import same_shape, words

ROOTS = {"bench": "pipetune", "tuner": "pipetune"}
"""Where each half of the library is imported from."""
PUBLIC = {
    "bench": (*("Pipeline", "Plan", "ModelSpec", "Sampling", "StagePlan", "GenerationResult", "ScoreResult"),),
    "tuner": ("auto_split_model",),
}
"""The names that README.md and docs/ show to users of Python."""
RENAMES = Path(__file__).parent / "renames.txt"

Outcomes = dict[str, Future[Sections]]
"""By the name of the step."""


def _keep(chain: str, folder: Path, kept: Outcomes) -> None:
    """Walks a chain and keeps what each of its steps left as soon as it is there."""
    for name, found in walk(chain, folder):
        if isinstance(found, Exception):
            kept[name].set_exception(found)
        else:
            kept[name].set_result(found)


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Iterator[Outcomes]:
    """Of every step of the chains that a chosen test asks for; chains run side by side.

    Their folders have names as long as those of the recordings: paths that are shown break lines.
    """
    chosen = [item.callspec.params.get("chain") for item in request.session.items if hasattr(item, "callspec")]
    chains = sorted((chain for chain in CHAINS if chain in chosen), key=lambda chain: chain != LONGEST)
    kept: Outcomes = {step.name: Future() for chain in chains for step in CHAINS[chain]}
    with contextlib.ExitStack() as stack:
        folders = [stack.enter_context(TemporaryDirectory(prefix="golden")) for _ in chains]
        pool = stack.enter_context(ThreadPoolExecutor(max_workers=os.cpu_count()))
        for chain, folder in zip(chains, folders, strict=True):
            pool.submit(_keep, chain, Path(folder).resolve(), kept)
        yield kept


STEPS = [
    pytest.param(chain, step.name, id=step.name, marks=[pytest.mark.e2e] if chain in STARTS_FLEETS else [])
    for chain, steps in CHAINS.items()
    for step in steps
]


@pytest.mark.parametrize(("chain", "name"), STEPS)
def test_what_is_seen_is_what_was_recorded(chain: str, name: str, outcomes: Outcomes) -> None:
    found = outcomes[name].result()
    recorded = load((DATA / f"{name}.txt").read_text(encoding="utf-8"))
    assert [*found] == [renamed(title) for title in recorded]
    for (title, old), new in zip(recorded.items(), found.values(), strict=True):
        assert_same(title, old, new)


def assert_same(title: str, old: str, new: str) -> None:
    """A section as it was recorded, looked at as its title says; chains beside each other keep the machine busy."""
    new = re.sub(r"(?m)^this machine is busy: .*\n", "", new)
    if title.endswith("[shape]"):
        old, new = same_shape(renamed(old), new)
    elif title.endswith("[words]") or renamed(words(old)) != words(old):
        old, new = renamed(words(old)), words(new)
    assert new == old, title


def renamed(text: str) -> str:
    """A recorded text with the wanted changes made."""
    for line in RENAMES.read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            before, arrow, after = line.partition(" → ")
            assert arrow, f"{RENAMES.name}: no arrow in {line!r}"
            text = text.replace(before, after)
    return text


def test_no_recording_is_left_over() -> None:
    assert {path.stem for path in DATA.glob("*.txt")} == {step.name for steps in CHAINS.values() for step in steps}


def test_every_command_is_recorded() -> None:
    seen = load((DATA / "help.txt").read_text(encoding="utf-8"))["stdout [exact]"]
    assert set(re.findall(r"(?m)^│ (\w+)", seen)) >= set(SUBCOMMANDS)


@pytest.mark.parametrize(("half", "name"), [(half, name) for half, names in PUBLIC.items() for name in names])
def test_public_names_are_imported_from_their_root(half: str, name: str) -> None:
    code = f"from {ROOTS[half]} import {name}"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, timeout=60).returncode == 0


def test_what_the_readme_imports_is_a_public_name() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = re.findall(r"(?m)^`?(from (?:bench|tuner|pipetune[\w.]*) import [\w, ]+)", text)
    names = {
        alias.name
        for line in lines
        for node in ast.walk(ast.parse(line))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert names
    assert names <= {name for group in PUBLIC.values() for name in group}
