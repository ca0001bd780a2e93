"""A process of transformers' continuous batching: holds the model, serves requests at their times.

Started by `tests.evaluation.peers.group`, whose protocol it speaks. Times are those of the monotonic clock, which all
processes of a machine share.
"""

from __future__ import annotations

import argparse
import gc
import time
from typing import Any

from tests.evaluation.peers.worker import Peer, main

PAGE_SIZE = 16
"""Tokens of a block of the cache."""
RESULT_TIMEOUT_S = 120.0


class ContinuousPeer(Peer):
    """The model behind a `ContinuousBatchingManager`, which is made anew where other settings are asked for."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        self.model.requires_grad_(False)
        self._manager: Any = None
        self._settings: dict[str, Any] = {}
        self._passes = 0

    def do_serve(
        self, settings: dict[str, Any], requests: list[dict[str, Any]], begin_s: float, max_len: int
    ) -> dict[str, Any]:
        """Serves this process's share: every `size`-th request, from its own rank on.

        Args:
            settings: `attention`, `max_requests` and `max_batch_tokens`.
            requests: each with its `number`, `prompt`, `output_len` and `at_s`, in the order of their times.
            begin_s: time 0 of them.
            max_len: tokens of the longest request.
        """
        mine = requests[self.rank :: self.size]
        warms_up = self._settings != {**settings, "max_len": max_len}
        manager = self._open(settings, max_len)
        self._passes += 1
        served: dict[str, Any] = {}
        late_s = 0.0
        gc.collect()
        gc.disable()
        try:
            for one in mine:
                due_s = begin_s + one["at_s"]
                # Short naps leave the interpreter to the loop that generates.
                while (left_s := due_s - time.monotonic()) > 0:
                    time.sleep(left_s)
                late_s = max(late_s, time.monotonic() - due_s)
                manager.add_request(
                    one["prompt"],
                    request_id=f"{self._passes}/{one['number']}",
                    max_new_tokens=one["output_len"],
                    record_timestamps=True,
                )
            while len(served) < len(mine):
                output = manager.get_result(timeout=RESULT_TIMEOUT_S)
                if output is None or output.error is not None:
                    raise RuntimeError(f"continuous batching: {output.error if output else 'nothing came any more'}")
                served[output.request_id.partition("/")[2]] = {
                    "tokens": output.generated_tokens,
                    "times_s": [at - begin_s for at in output.timestamps],
                }
        finally:
            gc.enable()
        return {"served": served, "late_s": 0.0 if warms_up else late_s}

    def _open(self, settings: dict[str, Any], max_len: int) -> Any:
        from transformers import GenerationConfig
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        wanted = {**settings, "max_len": max_len}
        if self._settings != wanted:
            if self._manager is not None:
                self._manager.stop(block=True)
            self.model.set_attn_implementation(settings["attention"])
            blocks = settings["max_requests"] * (max_len // PAGE_SIZE + 2)
            self._manager = self.model.init_continuous_batching(
                generation_config=GenerationConfig(  # type: ignore[no-untyped-call]
                    do_sample=False, eos_token_id=-1, pad_token_id=self.pad_token_id
                ),
                continuous_batching_config=ContinuousBatchingConfig(
                    page_size=PAGE_SIZE,
                    num_blocks=blocks,
                    max_requests_per_batch=settings["max_requests"],
                    max_batch_tokens=settings["max_batch_tokens"],
                    # Prompts come again in every pass; ours keeps nothing of them either.
                    allow_block_sharing=False,
                    auto_switch_to_flash=False,
                ),
            )
            self._manager.start()
            self._settings = wanted
        return self._manager


if __name__ == "__main__":
    main(ContinuousPeer)
