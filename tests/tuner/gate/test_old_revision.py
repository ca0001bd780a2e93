"""A revision from before the packages lived in `pipetune`, as the baseline of a gate: a real run of its own code."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipetune.bench.errors import ConfigError
from pipetune.tuner.gate import python_env
from pipetune.tuner.gate.runners import run_fresh
from tests.tuner.gate.test_runners import make_case, model  # noqa: F401 (a fixture)

OLD = "35b534615e097b85cf0ac830b1e2060d8e3cd3a8"
"""The last commit whose packages were `bench` and `tuner`."""


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[python_env.Interpreter]:
    """The old revision in a worktree of its own, which goes again; skipped where the history ends before it."""
    monkeypatch.setattr(python_env, "cache_root", lambda: tmp_path)
    try:
        commit = python_env.commit_of(OLD)
    except ConfigError as error:
        pytest.skip(f"no history here: {error}")
    # Built from the same packages, or it would take minutes and a package index.
    monkeypatch.setattr(python_env, "_requirements", lambda tree: None)
    yield python_env.of_ref(OLD, {})
    tree = tmp_path / "revisions" / commit / "tree"
    subprocess.run(["git", "-C", str(python_env.ROOT), "worktree", "remove", "--force", str(tree)], check=True)


@pytest.mark.slow
def test_it_runs_its_own_code_under_its_old_name(
    old: python_env.Interpreter,
    model: object,  # noqa: F811
) -> None:
    assert old.module == "tuner"
    assert old.run("import bench.launch, sys; print(bench.launch.__file__)").stdout.startswith(str(old.root))
    machine = old.machine()
    assert machine is not None
    case = make_case(model)  # type: ignore[arg-type]
    sample = run_fresh(case, "baseline", old, check=False)
    assert sample.failure is None, sample.failure
    assert sample.not_comparable is None
    assert sample.metrics["output_throughput"] > 0
