"""`pipetune profile` from outside: a table for people, a profile for machines, kept for the next time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from pipetune.bench.profile import Profile
from pipetune.tuner.cli import run
from tests.tiny_models import tiny_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    tiny_config("llama").save_pretrained(folder)
    return folder


class Said(NamedTuple):
    """What a command left."""

    code: int
    out: str
    err: str


@pytest.fixture
def profile(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Said]:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("PIPETUNE_CACHE", str(tmp_path))

    def call(*args: str) -> Said:
        capsys.readouterr()
        code = run(["profile", "--model", str(folder), "--load-format", "dummy", "--devices", "cpu:0-1", *args])
        return Said(code, *capsys.readouterr())

    return call


def test_a_profile_is_measured_shown_and_kept(profile: Callable[..., Said], tmp_path: Path) -> None:
    grid = ("--rows", "1,2", "--lengths", "4,8", "--pasts", "6")
    first = profile(*grid)
    assert first.code == 0, first.err
    lines = first.out.splitlines()
    # The first line names a folder, which may be as long as it likes.
    assert max(map(len, lines[1:])) <= 80
    text = first.out
    assert "measured in" in text
    for word in ("cpu:0 (", "cpu:1 (", "layer of 0-5", "embedding", "head", "overhead", "2 × 8", "2 @ 6"):
        assert word in text
    assert "cpu:0 → cpu:1" in text
    assert "cpu:1 → cpu:0" in text
    assert "B of KV a token" in text
    second = profile(*grid, "--json")
    kept = Profile.model_validate_json(second.out)
    if kept.disturbances:
        pytest.skip(f"what something disturbed is not kept: {kept.disturbances[0]}")
    assert f"kept since {kept.measured_at}" in profile(*grid).out
    anew = Profile.model_validate_json(profile(*grid, "--json", "--refresh").out)
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
def test_bad_input_exits_2_with_one_message(profile: Callable[..., Said], args: tuple[str, ...], message: str) -> None:
    result = profile(*args)
    assert result.code == 2
    assert message in " ".join(result.err.replace("│", " ").split())
    assert result.out == ""
