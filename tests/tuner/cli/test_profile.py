"""`pipetune profile` from outside: a table for people, a profile for machines, kept for the next time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipetune.bench.profile import Profile
from tests.tiny_models import tiny_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    tiny_config("llama").save_pretrained(folder)
    return folder


def profile(folder: Path, cache: Path, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipetune", "profile", "--model", str(folder), "--load-format", "dummy"]
    return subprocess.run(
        [*command, "--devices", "cpu:0-1", *args],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "COLUMNS": "80", "PYTHONPATH": str(Path.cwd()), "PIPETUNE_CACHE": str(cache)},
    )


def test_a_profile_is_measured_shown_and_kept(folder: Path, tmp_path: Path) -> None:
    grid = ("--rows", "1,2", "--lengths", "4,8", "--pasts", "6")
    first = profile(folder, tmp_path, *grid)
    assert first.returncode == 0, first.stderr
    lines = first.stdout.splitlines()
    # The first line names a folder, which may be as long as it likes.
    assert max(map(len, lines[1:])) <= 80
    text = first.stdout
    assert "measured in" in text
    for word in ("cpu:0 (", "cpu:1 (", "layer of 0-5", "embedding", "head", "overhead", "2 × 8", "2 @ 6"):
        assert word in text
    assert "cpu:0 → cpu:1" in text
    assert "cpu:1 → cpu:0" in text
    assert "B of KV a token" in text
    second = profile(folder, tmp_path, *grid, "--json")
    kept = Profile.model_validate_json(second.stdout)
    if kept.disturbances:
        pytest.skip(f"what something disturbed is not kept: {kept.disturbances[0]}")
    assert f"kept since {kept.measured_at}" in profile(folder, tmp_path, *grid).stdout
    anew = Profile.model_validate_json(profile(folder, tmp_path, *grid, "--json", "--refresh").stdout)
    assert anew.devices != kept.devices
    assert len(list((tmp_path / "profiles").iterdir())) == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--rows", "1,x"), "--rows: 'x' is no number above 0"),
        (("--pasts", "0"), "--pasts: '0' is no number above 0"),
        (("--max-tokens", "0"), "Input should be greater than or equal to 1"),
    ],
)
def test_bad_input_exits_2_with_one_message(folder: Path, tmp_path: Path, args: tuple[str, ...], message: str) -> None:
    result = profile(folder, tmp_path, *args)
    assert result.returncode == 2
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert result.stdout == ""
