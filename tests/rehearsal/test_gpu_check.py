"""Sections of the GPU check on stubbed GPUs: what they would say of a real one is said here."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.evaluation.gpu import equality
from tests.evaluation.gpu.context import Context, read_section
from tests.evaluation.gpu.models import TINY
from tests.rehearsal.conftest import UseMachine
from tests.rehearsal.stub.machine import StubMachine


@pytest.mark.timeout(240)
def test_equality_says_that_steps_were_captured(
    use_machine: UseMachine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_machine(StubMachine.alike(1))
    monkeypatch.setattr(equality, "TINY", {"llama": TINY["llama"]})
    monkeypatch.setattr(equality, "SPLITS", ((5, 3),))
    monkeypatch.setattr(equality, "_devices", lambda transport, hooks: ("cuda:0", "cuda:0"))
    context = Context("equality-staged-fp32", tmp_path / "gpu", 200.0)
    equality.run(context, "float32", "host staging")
    context.end()
    section = read_section(tmp_path / "gpu", "equality-staged-fp32")
    assert section is not None
    assert [aim.is_met for aim in section.aims] == [True, True], section.aims
    assert [row["captured"] for row in section.rows] == [True]
