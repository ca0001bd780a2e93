"""SGLang in processes below this one, commanded by JSON lines: start, run, logprobs. Knows nothing of pipetune.

Never run yet: written after the source of SGLang 0.5.23.
"""

import asyncio
import json
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pipetune_host import Host, main

_PLUGIN = "[sglang.srt.plugins]\npipetune = pipetune_sglang_probe:plugin\n"
"""What SGLang finds its plugins by, as if one were installed."""


class SglangHost(Host):  # type: ignore[misc]
    """SGLang's engine, whose schedulers, one a worker, are processes of their own."""

    packages = ("sglang", "torch", "transformers")

    def __init__(self) -> None:
        super().__init__()
        self._engine: Any = None
        self._workers: list[Any] = []
        self._told = Path(tempfile.gettempdir()) / "told"

    def do_start(self, layers: list[int], **settings: Any) -> dict[str, Any]:
        """Starts the engine; settings are SGLang's own."""
        os.environ["SGLANG_PP_LAYER_PARTITION"] = ",".join(map(str, layers))
        self._told.mkdir()
        plugin = self._told.with_name("pipetune_sglang_probe-0.dist-info")
        plugin.mkdir()
        (plugin / "METADATA").write_text("Metadata-Version: 2.1\nName: pipetune-sglang-probe\nVersion: 0\n")
        (plugin / "entry_points.txt").write_text(_PLUGIN)
        # Processes that are spawned get this path, too.
        sys.path.append(str(plugin.parent))
        from sglang.srt.entrypoints.engine import Engine

        self._engine = Engine(
            pp_size=len(layers), disable_radix_cache=True, enable_metrics=True, skip_tokenizer_init=True, **settings
        )
        # In the order of their starts: those of the first stage, of the next, and what is no worker.
        children = sorted(multiprocessing.active_children(), key=lambda one: one.pid or 0)
        self._workers = children[: len(layers) * settings["tp_size"]]
        names = {"max_num_batched_tokens": "chunked_prefill_size", "max_num_seqs": "max_running_requests"}
        return {"workers": self._rpc("pipetune_install"), **{ours: settings.get(own) for ours, own in names.items()}}

    def do_run(self, start_at: float, sampling: dict[str, Any], **given: list[Any]) -> dict[str, Any]:
        """Generates for prompts that come at their times after a moment of the monotonic clock; times count from it."""
        how = {"temperature": sampling["temperature"], "top_p": sampling.get("top_p", 1.0)}
        how |= {"top_k": sampling.get("top_k") or -1, "sampling_seed": sampling.get("seed")}

        async def all_of_them() -> list[dict[str, Any]]:
            rows = zip(*(given[name] for name in ("prompts", "output_lens", "at_s")), strict=True)
            return await asyncio.gather(*(self._request(start_at, how, *row) for row in rows))

        self._rpc("pipetune_begin")
        requests = self._engine.loop.run_until_complete(all_of_them())
        duration_s = time.monotonic() - start_at
        workers = self._rpc("pipetune_end")
        return {"duration_s": duration_s, "requests": requests, "workers": workers, "peak_was_reset": True}

    async def _request(
        self, start_at: float, sampling: dict[str, Any], prompt: list[int], length: int, at_s: float
    ) -> dict[str, Any]:
        await asyncio.sleep(max(start_at + at_s - time.monotonic(), 0.0))
        sent_s, times = time.monotonic() - start_at, list[float]()
        how = {"max_new_tokens": length, "ignore_eos": True, **sampling}
        chunk: dict[str, Any] = {"output_ids": [], "meta_info": {}}
        async for chunk in await self._engine.async_generate(input_ids=prompt, sampling_params=how, stream=True):
            self._steps += 1
            # Each has all tokens so far.
            times += [time.monotonic() - start_at] * (len(chunk["output_ids"]) - len(times))
        if len(times) != length:
            why = chunk["meta_info"].get("finish_reason")
            raise RuntimeError(f"SGLang gave {len(times)} tokens of {length}, and then ended: {why}")
        queued_s = chunk["meta_info"].get("queue_time") or 0.0
        return {"token_ids": [*chunk["output_ids"]], "token_times_s": times, "scheduled_s": sent_s + queued_s}

    def do_logprobs(self, prompts: list[list[int]], continuations: list[list[int]]) -> dict[str, Any]:
        """Log-probability of each token of the continuations under those before it, and the likeliest token there."""
        rows = []
        for prompt, tokens in zip(prompts, continuations, strict=True):
            answer = self._engine.generate(
                input_ids=[*prompt, *tokens],
                sampling_params={"max_new_tokens": 1, "ignore_eos": True, "temperature": 0.0},
                return_logprob=True,
                logprob_start_len=len(prompt) - 1,
                top_logprobs_num=1,
            )
            # Nothing is said of the first one, which is the prompt's last.
            given, best = (answer["meta_info"][f"input_{name}_logprobs"][1:] for name in ("token", "top"))
            rows.append([[one[0], top[0][1]] for one, top in zip(given, best, strict=True)])
        return {"rows": rows}

    def _rpc(self, method: str) -> list[Any]:
        """What each worker answers, by a file of its own, in the order of ranks."""
        for file in self._told.iterdir():
            file.unlink()
        self._engine.collective_rpc(method, folder=str(self._told))
        while len(files := sorted(self._told.glob("*.json"))) < len(self._workers):
            # Stages hear of it one after the other.
            time.sleep(0.01)
        return [json.loads(file.read_text()) for file in files]

    def _died(self) -> dict[str, Any] | None:
        codes = ((rank, worker.exitcode) for rank, worker in enumerate(self._workers))
        return next(({"rank": rank, "exit_code": code} for rank, code in codes if code is not None), None)


if __name__ == "__main__":
    main(SglangHost)
