"""How pipetune is started: the one place that knows its module."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
MODULE = "pipetune"

_FORKING = """
import contextlib, importlib, json, os, runpy, sys
module, outputs = sys.argv[1:]
for line in sys.stdin:
    task = json.loads(line)
    child = os.fork()
    if child == 0:
        os.chdir(task["folder"])
        for number, name in enumerate((os.devnull, "stdout", "stderr")):
            os.dup2(os.open(os.path.join(outputs, name), os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
        sys.argv, sys.path[0] = [module, *task["args"]], task["folder"]
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        finally:
            with open(os.path.join(outputs, "modules"), "w") as file:
                json.dump([name for name in sys.modules if not name.endswith("__main__")], file)
        sys.exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with open(os.path.join(outputs, "modules")) as file:
        for name in json.load(file):
            with contextlib.suppress(Exception):
                importlib.import_module(name)
    print(code, flush=True)
"""


def environment(folder: Path) -> dict[str, str]:
    """Of a plain terminal of 80 columns, with a cache of its own."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PIPETUNE_", "GITHUB_"))}
    screen = {"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb", "LC_ALL": "C.UTF-8", "MPLBACKEND": "Agg"}
    return kept | screen | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "PIPETUNE_CACHE": str(folder / "cache")}


def run(args: tuple[str, ...], folder: Path) -> subprocess.CompletedProcess[str]:
    """One command of this checkout, run in a folder."""
    command = [sys.executable, "-m", MODULE, *args]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=280, check=False, cwd=folder, env=environment(folder)
    )


class Forks:
    """Commands forked from one process that loads what each has loaded, before the next: it takes them longest."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process = subprocess.Popen(
            [sys.executable, "-c", _FORKING, MODULE, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(folder.parent),
        )

    def run(self, args: tuple[str, ...], folder: Path) -> subprocess.CompletedProcess[str]:
        """One command of this checkout, run in a folder."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps({"args": args, "folder": str(folder)}) + "\n")
        self._process.stdin.flush()
        code = int(self._process.stdout.readline())
        out, err = ((self._folder / name).read_text(encoding="utf-8") for name in ("stdout", "stderr"))
        return subprocess.CompletedProcess(args, code, out, err)

    def close(self) -> None:
        """Ends the process that forks."""
        self._process.communicate()
