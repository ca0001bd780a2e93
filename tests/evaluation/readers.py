"""How long readers of finished studies take, and how much memory: `python -m tests.evaluation.readers` prints a table.

`history` reads many studies of the record factory's, `report` one of very many records, `--help` nothing.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.record_factory import make_study_records
from tests.study_factory import write_study


def main() -> None:
    """Writes the studies, then times each command as a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", type=int, default=200, help="that history reads")
    parser.add_argument("--records", type=int, default=2000, help="of the study that report reads")
    asked = parser.parse_args()
    records = make_study_records()
    with tempfile.TemporaryDirectory(prefix="readers") as name:
        folder = Path(name)
        for number in range(asked.studies):
            night = [record.model_copy(update={"started_at": f"2026-01-{1 + number % 28:02}"}) for record in records]
            write_study(folder / "nights" / f"{number:04}", night)
        trials = [record for record in records if record.role != "finalist"]
        many = itertools.islice(itertools.cycle(trials), asked.records)
        write_study(folder / "one", [one.model_copy(update={"number": number}) for number, one in enumerate(many)])
        for args in (["history", str(folder / "nights")], ["report", str(folder / "one")], ["--help"]):
            began = time.monotonic()
            process = subprocess.Popen([sys.executable, "-m", "pipetune", *args], stdout=subprocess.DEVNULL)
            _, status, usage = os.wait4(process.pid, 0)
            took_s = time.monotonic() - began
            print(f"{args[0]:8} {took_s:6.2f} s, {usage.ru_utime + usage.ru_stime:6.2f} s of processor,", end=" ")
            print(f"{usage.ru_maxrss / 1024:.0f} MiB, exit code {os.waitstatus_to_exitcode(status)}", flush=True)


if __name__ == "__main__":
    main()
