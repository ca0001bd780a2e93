"""Standard output and error whatever they lead to: any text comes out, and the command's own exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SAYS = """
import os, sys
from pipetune.tuner.cli.streams import prepare_streams
prepare_streams()
sys.stdout.write("95 tok/s · 17–13 \\udc80\\n" * 2000)
sys.stderr.write("· said\\n")
print(os.environ.get("COLUMNS"))
sys.exit(3)
"""


def says(shell: str, **environ: str) -> subprocess.CompletedProcess[bytes]:
    script = shell.replace("SAYS", f"{sys.executable} -c '{SAYS}'")
    values = {**os.environ, "PYTHONPATH": str(Path.cwd()), **environ}
    return subprocess.run(["bash", "-c", script], capture_output=True, env=values, timeout=60, check=False)


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [("ascii", "95 tok/s ? 17?13 ?"), ("latin-1", "95 tok/s · 17?13 ?"), ("utf-8", "95 tok/s · 17–13 ?")],
)
def test_signs_that_an_encoding_lacks_are_replaced(encoding: str, shown: str) -> None:
    result = says("SAYS", PYTHONIOENCODING=encoding)
    assert result.returncode == 3
    assert result.stdout.decode(encoding).splitlines()[0] == shown
    assert result.stderr.decode(encoding).endswith(" said\n")


@pytest.mark.parametrize(
    ("given", "kept"),
    [("0", None), ("1", None), ("-80", None), ("many", None), ("9" * 5000, None), ("80", "80"), ("132", "132")],
)
def test_a_width_that_nothing_fits_in_does_not_count(given: str, kept: str | None) -> None:
    assert says("SAYS", COLUMNS=given).stdout.split()[-1] == str(kept).encode()


@pytest.mark.parametrize(
    ("shell", "code"),
    [
        ("SAYS | head -1; exit ${PIPESTATUS[0]}", 3),
        ("SAYS 2>&1 | true; exit ${PIPESTATUS[0]}", 3),
        ("SAYS 2>/dev/full", 3),
        ("SAYS >&-", 3),
        ("SAYS <&- >&- 2>&-", 3),
    ],
)
def test_a_reader_who_left_changes_no_exit_code(shell: str, code: int) -> None:
    result = says(shell)
    assert result.returncode == code
    assert b"Error" not in result.stderr
    assert b"ignored" not in result.stderr


def test_a_result_that_cannot_be_written_is_a_fault_once() -> None:
    result = says("SAYS >/dev/full")
    assert result.returncode == 1
    assert result.stderr.count(b"No space left on device: 'standard output'") == 1
    assert b"ignored" not in result.stderr
