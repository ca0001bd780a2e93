"""What is installed: the wheel and the sdist hold `pipetune` whole and nothing beside it, and work anywhere."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DUMMY = ROOT / "examples/dummy-llama-12l"
pytestmark = pytest.mark.slow

BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


def run_python(*arguments: str, cwd: Path, path: Path | None = None, extra: Mapping[str, str] | None = None) -> str:
    """What a Python says that sees installed packages, and of pipetune only what `path` holds."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=environment | ({"PYTHONPATH": str(path)} if path else {}) | dict(extra or {}),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(kind: str, tree: Path, folder: Path) -> Path:
    """The file that the build backend makes of a tree: `kind` is `build_wheel` or `build_sdist`."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder / run_python("-c", BUILD, kind, str(folder), cwd=tree).splitlines()[-1]


def contents(wheel: Path) -> dict[str, bytes]:
    """Files of a wheel, but the list of them all."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/RECORD")}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a checkout holds; building writes into it."""
    tree = tmp_path_factory.mktemp("source") / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, tree)
    for name in ("bench", "tuner", "pipetune"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "tests", tree / "tests", ignore=shutil.ignore_patterns("__pycache__", "data"))
    return tree


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("build_wheel", tree, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the wheel's packages, as site-packages would."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_the_wheel_holds_the_whole_package_and_nothing_else(wheel: Path) -> None:
    names = set(contents(wheel))
    sources = {
        f"{prefix}{path.relative_to(ROOT).as_posix()}"
        for prefix, folder in (("pipetune/", "bench"), ("pipetune/", "tuner"), ("", "pipetune"))
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".typed", ".css", ".j2", ".yaml", ".jsonl", ".txt", ".md")
        and not path.is_relative_to(ROOT / "pipetune" / "bench")
        if not path.is_relative_to(ROOT / "pipetune" / "tuner")
    }
    assert sources <= names, f"missing: {sorted(sources - names)}"
    assert any("/templates/" in name for name in names)
    assert "pipetune/py.typed" in names
    others = {name for name in names if not re.match(r"pipetune/|pipetune-[\d.]+\.dist-info/", name)}
    assert not others
    assert not [name for name in names if "tests" in name.split("/")]


def test_the_sdist_makes_the_same_wheel(tree: Path, wheel: Path, tmp_path: Path) -> None:
    sdist = build("build_sdist", tree, tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        assert not [member.name for member in archive if "evaluation" in member.name.split("/")]
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    again = build("build_wheel", unpacked, tmp_path / "again")
    assert contents(again) == contents(wheel)


def test_a_users_own_bench_does_no_harm(installed: Path, tmp_path: Path) -> None:
    for name in ("bench", "tuner", "tests"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("OWN = True\n")
    code = (
        "import bench, tuner, pipetune, pipetune.tuner.cli, pipetune.bench.fleet.fleet; "
        "assert bench.OWN and tuner.OWN; print(pipetune.Plan.__module__, pipetune.__file__)"
    )
    assert run_python("-c", code, cwd=tmp_path, path=installed).split() == [
        "pipetune.bench.spec",
        str(installed / "pipetune" / "__init__.py"),
    ]
    assert "Usage" in run_python("-m", "pipetune", "--help", cwd=tmp_path, path=installed)


def serves_until_it_is_told_to_end(arguments: list[str], *, cwd: Path, path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(path)}
    command = [sys.executable, "-m", "pipetune", *arguments]
    with subprocess.Popen(command, cwd=cwd, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = ""
        for line in process.stderr:
            said += line
            if "http://127.0.0.1:" in line:
                break
        process.terminate()
        assert "http://127.0.0.1:" in said, said
        assert process.wait(timeout=60) == 0


@pytest.mark.e2e
@pytest.mark.timeout(900)
def test_every_line_of_the_readme_works_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in re.findall(r"(?m)^pipetune .*$", text)]
    assert lines[0] == ["pipetune", "demo"]
    (tmp_path / "prompts.jsonl").write_text('{"prompt_token_ids": [5, 6, 7, 8]}\n' * 8, encoding="utf-8")
    (tmp_path / "work/bench").mkdir(parents=True)
    # A model without weights in place of those that must be fetched.
    model = {"smollm2-135m": str(DUMMY), "meta-llama/Llama-3.1-8B": str(DUMMY), "cuda:0-3": "cpu:0-3"}
    smaller = {
        "MODEL": DUMMY,
        "LOAD_FORMAT": "dummy",
        "PROMPTS": "../prompts.jsonl",
        "OUTPUT_LEN": 4,
        "PROFILE": "false",
    }
    fewer = {"MAX_MEMORY_PER_DEVICE": "75MiB", "N_TRIALS": 1, "FINALISTS": 1, "FINALIST_ROUNDS": 1}
    environment = {f"PIPETUNE_{name}": str(value) for name, value in (smaller | fewer).items()}
    few = {"PIPETUNE_NUM_PROMPTS": "4", "PIPETUNE_NUM_ITERS": "1"}
    for line in lines:
        arguments = [model.get(word, word) for word in line[1:]]
        if arguments[0] == "tune":
            # One study will do; the other lines must be understood, and find their files.
            shown = run_python("-m", "pipetune", *arguments, "--show-config", cwd=tmp_path / "work", path=installed)
            assert "# --model" in shown
            shutil.copytree(tmp_path / "work/results/demo", tmp_path / "work" / line[line.index("-o") + 1])
        elif arguments[0] == "gate":
            run_python("-m", "pipetune", *arguments, "--show-config", cwd=tmp_path / "work", path=installed)
        elif arguments[0] == "serve":
            serves_until_it_is_told_to_end(
                [*arguments, "--port", "0", "--max-model-len", "16"], cwd=tmp_path / "work", path=installed
            )
        else:
            extra = environment if arguments == ["demo"] else few if "--sweep" in arguments else {}
            run_python("-m", "pipetune", *arguments, cwd=tmp_path / "work", path=installed, extra=extra)
    assert (tmp_path / "work/comparison/compare.html").exists()


def test_no_module_is_named_bench_once_it_is_installed(installed: Path, tmp_path: Path) -> None:
    code = "import importlib.util as util; print(util.find_spec('bench'), util.find_spec('tuner'))"
    # -I: neither the current directory nor a path of the environment; what is installed in place does not count.
    assert run_python("-S", "-c", code, cwd=tmp_path, path=installed).split() == ["None", "None"]


@pytest.mark.parametrize("name", ["bench", "tuner"])
def test_a_checkouts_old_names_say_the_new_one(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert f"pipetune.{name}" in done.stderr
