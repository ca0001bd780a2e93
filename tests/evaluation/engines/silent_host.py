"""vLLM's host, but for passes that its probe does not record when it is told so."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "bench" / "engines" / "vllm_host"))

from pipetune_host import main
from pipetune_vllm_host import VllmHost


class SilentHost(VllmHost):  # type: ignore[misc]
    """Runs with or without a record."""

    def do_run(self, record: bool = True, **given: Any) -> Any:
        """As the host's, and without spans where they are not wanted."""
        if record:
            return super().do_run(**given)
        rpc = self._llm.collective_rpc
        try:
            self._llm.collective_rpc = lambda name, *args, **kwargs: []
            return super().do_run(**given)
        finally:
            self._llm.collective_rpc = rpc


if __name__ == "__main__":
    main(SilentHost)
