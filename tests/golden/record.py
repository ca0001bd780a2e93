"""`python -m tests.golden.record [CHAIN …]`: recordings made anew, only when a change of what people see is wanted."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.golden.scenarios import CHAINS, Sections, walk

DATA = Path(__file__).parent / "data"
MARK = "=== "


def dump(found: Sections) -> str:
    """Sections as one text, told apart by their titles."""
    return "".join(f"{MARK}{title}\n{text}\n" for title, text in found.items())


def load(text: str) -> Sections:
    """The sections of a recorded text."""
    found: Sections = {}
    for part in f"\n{text}".removesuffix("\n").split(f"\n{MARK}")[1:]:
        title, _, body = part.partition("\n")
        found[title] = body
    return found


def main(chains: list[str]) -> None:
    """Records the chains named, or all."""
    began = time.monotonic()
    for chain in chains or CHAINS:
        with TemporaryDirectory(prefix="golden") as folder:
            for name, found in walk(chain, Path(folder).resolve()):
                if isinstance(found, Exception):
                    raise found
                print(f"{time.monotonic() - began:5.1f} s  {chain}  {name}", flush=True)
                (DATA / f"{name}.txt").write_text(dump(found), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
