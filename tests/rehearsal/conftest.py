"""Machines with GPUs that are not there, for fleets and commands that a test starts."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pynvml
import pytest

from tests.hooks import write_hooks
from tests.rehearsal.stub import nvml
from tests.rehearsal.stub.machine import VARIABLE, StubMachine

ROOT = Path(__file__).resolve().parents[2]
INSTALL = "from tests.rehearsal.stub import {module}\n{module}.install(module)"

IS_WHOLE = os.environ.get("PIPETUNE_REHEARSAL") == "all"
"""Whether every family and case is gone through, as `make gpu-rehearsal` wants it, or a share of them."""

UseMachine = Callable[..., Path]


@pytest.fixture
def use_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> UseMachine:
    """Gives this process and all that it starts some GPUs: `use_machine(StubMachine.alike(2))`.

    The second argument changes further modules in processes that start, as `tests.hooks.write_hooks` takes them.
    """
    return _user(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def use_machine_of_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[UseMachine]:
    """The same for all tests of a module: machines that share a fleet; the file may be written anew."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield _user(tmp_path_factory.mktemp("machine"), monkeypatch)


def _user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> UseMachine:
    def use(machine: StubMachine, patches: Mapping[str, str] | None = None) -> Path:
        path = tmp_path / "gpus.json"
        machine.write(path)
        stubs = {"torch": INSTALL.format(module="cuda"), "pynvml": INSTALL.format(module="nvml")}
        write_hooks(tmp_path / "hooks", {**stubs, **(patches or {})})
        monkeypatch.setenv(VARIABLE, str(path))
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'hooks'}:{ROOT}")
        for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
            monkeypatch.delenv(name, raising=False)
        for name, function in nvml.functions(pynvml).items():
            monkeypatch.setattr(pynvml, name, function)
        return path

    return use
