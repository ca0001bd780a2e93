"""The suite from any folder: `python -m pipetune.bench.suite --plan best_plan.json --benchmark-json out.json`.

Its benchmarks are named alike wherever it is started, so that files of different places can be compared.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

SUITE = Path(__file__).parent

if __name__ == "__main__":
    if missing := [name for name in ("pytest", "pytest_benchmark") if find_spec(name) is None]:
        sys.exit(
            f"pipetune.bench.suite: {' and '.join(missing)} not found in {sys.prefix}: "
            "pip install pytest pytest-benchmark there"
        )
    import pytest

    sys.exit(pytest.main([str(SUITE), f"--rootdir={SUITE.parents[1]}", "-p", "no:cacheprovider", *sys.argv[1:]]))
