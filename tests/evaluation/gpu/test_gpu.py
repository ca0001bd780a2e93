"""What only an NVIDIA GPU can show to be right: `pytest -m gpu`, section by section as `make gpu-check` reports it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.evaluation.gpu.context import read_section
from tests.evaluation.gpu.section import SECTIONS
from tests.evaluation.harness import findable, module_command

LIMIT_S = 240.0
SHOWN = tuple(name for name in SECTIONS if name == "memory" or name.startswith("equality"))
"""Sections that prove correctness; the others tell speeds, which no test can miss."""


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("name", SHOWN)
def test_a_gpu_gives_what_the_unsplit_model_gives_and_survives_its_limits(name: str, tmp_path: Path) -> None:
    subprocess.run(
        module_command("tests.evaluation.gpu.section", name, "--folder", str(tmp_path), "--seconds", str(LIMIT_S)),
        env={**findable(os.environ), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        timeout=LIMIT_S + 30,
        check=False,
    )
    section = read_section(tmp_path, name)
    assert section is not None, "it did not begin"
    if section.status == "skipped":
        pytest.skip(str(section.error))
    assert section.status == "done", section.error
    assert section.aims, "nothing was examined"
    assert not section.is_wrong, "; ".join(f"{aim.text}: {aim.seen}" for aim in section.aims if not aim.is_met)
