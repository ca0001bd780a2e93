"""How a side's processes are started: by which Python, with whose pipetune, in which environment.

A revision of pipetune's own repository is checked out into a worktree of its own. If it asks for the same packages as
the code that runs here, it runs in this environment, from there; else an environment is built for it. Both are kept in
the user's cache under the commit.
"""

import math
import os
import subprocess
import sys
import time
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from filelock import FileLock, Timeout
from pydantic import ValidationError

import pipetune
from pipetune.bench.errors import ConfigError
from pipetune.bench.files import cache_root
from pipetune.bench.record import Machine
from pipetune.tuner.config.sources import settings

ROOT = Path(pipetune.__file__).resolve().parents[1]
"""Root of the code that runs: a checkout, or where packages are installed."""
_PYPROJECT, _CONSTRAINTS = "pyproject.toml", "constraints.txt"
_MACHINE = """
try:
    from pipetune.bench.machine.hardware import read_machine
except ImportError:
    from bench.machine import read_machine  # before the packages lived in `pipetune`
print(read_machine().model_dump_json())
"""
_INSTALLED = """
from importlib.metadata import version
from importlib.util import find_spec
version("pipetune")
print("pipetune" if find_spec("pipetune") else "tuner")
"""
_TIMEOUT_S = 120.0
_BUILD_TIMEOUT_S = 3600.0


class OutOfTime(Exception):
    """The minutes that a gate was given are used up."""


@dataclass(frozen=True, kw_only=True)
class Interpreter:
    """A Python that has pipetune; by default both that run here."""

    python: str = sys.executable
    root: Path | None = ROOT
    """Put before all packages: whose pipetune runs; None takes the one that is installed there."""
    env: Mapping[str, str] = field(default_factory=dict)
    """On top of this process's environment; a PYTHONPATH among them comes after `root`."""
    module: str = "pipetune"
    """What `python -P -m` runs: `tuner` in revisions from before the packages lived in `pipetune`."""

    def run(self, code: str) -> subprocess.CompletedProcess[str]:
        """Some lines of Python, run to their end. OSError, SubprocessError: they cannot be, or take too long."""
        command = [self.python, "-P", "-c", code]
        return subprocess.run(
            command, capture_output=True, text=True, check=False, env=self.environment, timeout=_TIMEOUT_S
        )

    @property
    def environment(self) -> dict[str, str]:
        """Without pipetune's own variables that set what a config sets: what is to run is said by files alone."""
        variables = {setting.variable for setting in settings().values()}
        environment = {key: value for key, value in os.environ.items() if key not in variables} | dict(self.env)
        given = environment.pop("PYTHONPATH", "").split(os.pathsep)
        # Whoever runs this pipetune in place has it on the path, where it would hide the one of another environment.
        path = [*([str(self.root)] if self.root else []), *(one for one in given if one and one != str(ROOT))]
        return environment | ({"PYTHONPATH": os.pathsep.join(path)} if path else {})

    def machine(self) -> Machine | None:
        """Hardware and software as this side sees them; None where its pipetune does not say so in our words."""
        try:
            done = self.run(_MACHINE)
            done.check_returncode()
            return Machine.model_validate_json(done.stdout)
        except (OSError, subprocess.SubprocessError, ValidationError):
            return None


def of_python(python: str, env: Mapping[str, str]) -> Interpreter:
    """Another environment's Python: with the pipetune that is installed there, or with this one where none is.
    ConfigError: it is no Python that can be run."""
    here = Interpreter(python=python, root=None, env=env)
    try:
        done = here.run(_INSTALLED)
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(
            f"{python}: cannot be run: {error}; give the python of an environment, as in /path/to/env/bin/python"
        ) from None
    if done.returncode == 0:
        return replace(here, module=done.stdout.strip())
    if "PackageNotFoundError" in done.stderr:
        return Interpreter(python=python, env=env)
    why = done.stderr.strip()[-300:] or f"it ended with exit code {done.returncode} and said nothing"
    raise ConfigError(f"{python}: does not run Python code: {why}")


def of_ref(ref: str, env: Mapping[str, str], *, repository: Path = ROOT, deadline: float = math.inf) -> Interpreter:
    """A revision of pipetune's own repository, built if it is not there yet; that may take minutes. ConfigError: there
    is no such revision, as `commit_of` says, or it cannot be built; OutOfTime: it is not built by the deadline."""
    commit = commit_of(ref, repository=repository)
    folder = cache_root() / "revisions" / commit
    tree = folder / "tree"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        held = FileLock(folder / ".lock").acquire(
            timeout=-1 if math.isinf(deadline) else max(0.0, deadline - time.monotonic())
        )
    except Timeout:
        raise OutOfTime from None
    with held:
        if not (tree / _PYPROJECT).exists():
            _git(repository, ref, "worktree", "prune")
            _git(repository, ref, "worktree", "add", "--force", "--detach", str(tree), commit)
        module = "pipetune" if (tree / "pipetune").is_dir() else "tuner"
        if _requirements(tree) == _requirements(repository):
            return Interpreter(root=tree, env=env, module=module)
        python, ready = folder / "environment" / "bin" / "python", folder / ".installed"
        if not ready.exists():
            install = [str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check", "-c", _CONSTRAINTS]
            _build(tree, ref, [sys.executable, "-m", "venv", "--clear", str(python.parents[1])], deadline)
            _build(tree, ref, [*install, "setuptools"], deadline)
            _build(tree, ref, [*install, "--no-build-isolation", "-e", "."], deadline)
            ready.touch()
    return Interpreter(python=str(python), root=tree, env=env, module=module)


def commit_of(ref: str, *, repository: Path = ROOT) -> str:
    """The full hash of the commit that a revision of pipetune's own repository stands for.
    ConfigError: this pipetune is no git checkout, or there is no such revision."""
    if not (repository / ".git").exists():
        raise ConfigError(
            f"--baseline-ref {ref}: {repository} is no git checkout of pipetune; install that version into an "
            "environment of its own and name its python by --baseline-python"
        )
    return _git(repository, ref, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{ref}^{{commit}}")


def _requirements(tree: Path) -> tuple[object, object, bytes]:
    """What an environment for that pipetune is built from."""
    try:
        project = tomllib.loads((tree / _PYPROJECT).read_text(encoding="utf-8"))["project"]
        return project["requires-python"], project["dependencies"], (tree / _CONSTRAINTS).read_bytes()
    except (OSError, KeyError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(
            f"--baseline-ref: {tree} says not what pipetune needs: {error}; take a later revision"
        ) from None


def _git(repository: Path, ref: str, *arguments: str) -> str:
    command = ["git", "-C", str(repository), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise ConfigError(f"--baseline-ref {ref}: git cannot be run: {error}; install it") from None
    if done.returncode:
        why = done.stderr.strip() or f"{repository} has no such revision"
        raise ConfigError(
            f"--baseline-ref {ref}: {why}; `git log --oneline` lists those that are there, and a shallow checkout has "
            "few (`git fetch --unshallow`; in GitHub's actions/checkout, fetch-depth: 0)"
        )
    return done.stdout.strip()


def _build(tree: Path, ref: str, command: list[str], deadline: float) -> None:
    timeout_s = min(_BUILD_TIMEOUT_S, max(0.0, deadline - time.monotonic()))
    try:
        subprocess.run(command, cwd=tree, capture_output=True, text=True, check=True, timeout=timeout_s)
    except subprocess.CalledProcessError as error:
        raise ConfigError(
            f"--baseline-ref {ref}: its environment cannot be built: {error.stderr.strip()[-500:]}"
        ) from None
    except subprocess.TimeoutExpired:
        if timeout_s < _BUILD_TIMEOUT_S:
            raise OutOfTime from None
        raise ConfigError(
            f"--baseline-ref {ref}: its environment was not built within {_BUILD_TIMEOUT_S / 60:.0f} minutes"
        ) from None
