"""The command behind `make gpu-check`: the sections in groups, one report, and a time limit that holds.

Exit code 0: all is well, aims of speed apart, or there is no GPU here. 1: something is broken. 2: a wrong argument.
"""

from __future__ import annotations

import argparse
import datetime as dt
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipetune.bench.files import write_durably
from pipetune.bench.machine.hardware import cpu_cores, read_machine
from pipetune.bench.record import Machine
from tests.evaluation.gpu.context import read_section, section_path
from tests.evaluation.gpu.report import aim_line, render
from tests.evaluation.gpu.section import SECTIONS
from tests.evaluation.gpu.values import Report, Section
from tests.evaluation.harness import ROOT, findable, module_command

LEAST_S = 8.0
"""A section with less time than this is not begun."""
CORES_OF_ONE, GIB_OF_ONE, MOST_AT_ONCE = 3, 15, 5
"""What one fleet of four workers takes while it starts."""


@dataclass(frozen=True, kw_only=True)
class _Group:
    """Sections that may run at the same time, and how long each may take."""

    names: tuple[str, ...]
    limit_s: float


GROUPS = (
    _Group(names=("machine",), limit_s=45.0),
    _Group(names=("memory", *(name for name in SECTIONS if name.startswith("equality"))), limit_s=240.0),
    _Group(names=("timing",), limit_s=45.0),
    _Group(names=("decode-small",), limit_s=80.0),
    _Group(names=("decode-large",), limit_s=170.0),
)
"""Speed is measured alone; what proves correctness only may share the machine with others of its kind, and goes first:
on an H200 host of 16 cores it took 3 minutes and a half."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the check."""
    args = _arguments(arguments)
    import torch

    if not torch.cuda.is_available():
        _say("gpu-check: skipped, since torch finds no NVIDIA GPU on this machine")
        return 0
    machine = read_machine()
    folder: Path = args.output or ROOT / "results" / "gpu" / machine_name(machine)
    return _Check(folder, machine, args.max_minutes * 60, args.only).run()


def machine_name(machine: Machine) -> str:
    """A folder's name for a machine: `nvidia-h200-x1`."""
    gpus = machine.hardware.gpus
    name = gpus[0].name if gpus else "no-gpu"
    return f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}-x{len(gpus)}"


def parallel_sections(cores: int, gpu_gib: float) -> int:
    """How many sections of fleets may run at once without starving one another."""
    return max(1, min(MOST_AT_ONCE, cores // CORES_OF_ONE, int(gpu_gib // GIB_OF_ONE)))


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.evaluation.gpu", description=__doc__)
    parser.add_argument("-o", "--output", type=Path, help="folder; results/gpu/<machine> by default")
    parser.add_argument("--max-minutes", type=float, default=8.0)
    parser.add_argument(
        "--only", action="append", metavar="SECTION", help=f"of {', '.join(SECTIONS)}, or beginnings of these names"
    )
    args = parser.parse_args(arguments)
    chosen = [name for name in SECTIONS if args.only is None or name.startswith(tuple(args.only))]
    if not chosen:
        parser.error(f"--only {', '.join(args.only)}: no such section; there are {', '.join(SECTIONS)}")
    args.only = chosen
    return args


@dataclass
class _Running:
    name: str
    process: subprocess.Popen[bytes]
    until: float
    log: Path = field(default=Path())


class _Check:
    """One check, written down after each section."""

    def __init__(self, folder: Path, machine: Machine, seconds: float, names: Sequence[str]) -> None:
        self._folder, self._machine, self._names = folder, machine, tuple(names)
        self._began = time.monotonic()
        self._deadline = self._began + seconds
        self._started_at = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
        self._sections: list[Section] = []
        memory = min((gpu.memory_bytes or 0 for gpu in machine.hardware.gpus), default=0)
        self._parallel = parallel_sections(cpu_cores(), memory / 2**30)

    def run(self) -> int:
        """Group by group; what is left of the time bounds each."""
        shutil.rmtree(self._folder / "work", ignore_errors=True)
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            for group in GROUPS:
                self._run_group([name for name in group.names if name in self._names], group.limit_s)
        finally:
            self._write()
            # Models of many gigabytes; logs stay.
            for weights in (self._folder / "work").rglob("*.safetensors"):
                weights.unlink()
        aims = [aim for section in self._sections for aim in section.aims]
        for aim in aims:
            _say(aim_line(aim))
        _say(f"gpu-check: {sum(aim.is_met for aim in aims)} of {len(aims)} aims met; {self._folder / 'report.md'}")
        return 1 if any(section.is_wrong for section in self._sections) else 0

    def _run_group(self, names: Sequence[str], limit_s: float) -> None:
        waiting, running = list(names), list[_Running]()
        group_ends = min(time.monotonic() + limit_s, self._deadline)
        while waiting or running:
            while waiting and len(running) < self._parallel:
                # Where not all can run at once, each leaves the later ones their part.
                rounds = math.ceil(len(waiting) / self._parallel)
                name, left = waiting.pop(0), (group_ends - time.monotonic()) / rounds
                if left < LEAST_S:
                    self._end(Section(name=name, status="out of time", error="not begun: the time was used up before"))
                else:
                    running.append(self._start(name, left))
            for one in list(running):
                if one.process.poll() is not None or time.monotonic() > one.until:
                    running.remove(one)
                    self._end(self._finish(one))
            time.sleep(0.2)

    def _start(self, name: str, seconds: float) -> _Running:
        section_path(self._folder, name).parent.mkdir(parents=True, exist_ok=True)
        log = self._folder / "work" / f"{name}.log"
        _say(f"gpu-check: {name} …")
        with log.open("wb") as file:
            process = subprocess.Popen(
                module_command(
                    "tests.evaluation.gpu.section",
                    *(name, "--folder", str(self._folder.absolute()), "--seconds", str(seconds)),
                ),
                env={**findable(os.environ), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return _Running(name=name, process=process, until=time.monotonic() + seconds, log=log)

    def _finish(self, one: _Running) -> Section:
        """What a section wrote, and what became of it if it did not end by itself."""
        in_time = one.process.poll() is not None
        if not in_time:
            os.killpg(one.process.pid, signal.SIGKILL)
            one.process.wait()
        section = read_section(self._folder, one.name) or Section(name=one.name)
        if section.status != "running":
            return section
        tail = one.log.read_text(errors="replace")[-2000:]
        status = "failed" if in_time else "out of time"
        return Section.model_validate({**section.model_dump(), "status": status, "error": tail or "no output"})

    def _end(self, section: Section) -> None:
        self._sections.append(section)
        _say(f"gpu-check: {section.name}: {section.status}, {section.seconds:.0f} s")
        if section.error:
            _say(section.error.rstrip().splitlines()[-1])
        self._write()

    def _write(self) -> None:
        report = Report(
            started_at=self._started_at,
            wall_s=round(time.monotonic() - self._began, 1),
            machine=self._machine,
            sections=tuple(self._sections),
        )
        write_durably(self._folder / "report.json", report.model_dump_json(indent=2) + "\n")
        write_durably(self._folder / "report.md", render(report))


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
