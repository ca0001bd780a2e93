"""The suite from any folder: `python -m bench.suite --plan best_plan.json --benchmark-json out.json`.

Its benchmarks are named alike wherever it is started, so that files of different places can be compared.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

SUITE = Path(__file__).parent

if __name__ == "__main__":
    sys.exit(pytest.main([str(SUITE), f"--rootdir={SUITE.parents[1]}", "-p", "no:cacheprovider", *sys.argv[1:]]))
