"""vLLM in one process, commanded by JSON lines: start, limits, repartition, run, logprobs."""

import os
import signal
import time
from typing import Any

from pipetune_host import Host, main
from pipetune_vllm_probe import need


class VllmHost(Host):  # type: ignore[misc]
    """vLLM, in this process or as a server."""

    packages = ("vllm", "torch", "transformers")

    def __init__(self) -> None:
        super().__init__()
        self._llm: Any = None
        self._server: Any = None

    def do_start(self, layers: list[int], served: bool = False, **settings: Any) -> dict[str, Any]:
        """Starts the engine, here or as a server; settings are vLLM's own."""
        os.environ["VLLM_PP_LAYER_PARTITION"] = ",".join(map(str, layers))
        if served:
            from pipetune_vllm_served import Server

            self._server = Server(settings.pop("model"), layers, settings)
            limits = {name: settings.get(name) for name in ("max_num_batched_tokens", "max_num_seqs")}
            return {"workers": self._rpc("pipetune_install"), **limits}
        from vllm import LLM

        self._llm = LLM(
            pipeline_parallel_size=len(layers),
            worker_extension_cls="pipetune_vllm_probe.StageProbe",
            distributed_executor_backend="mp",
            enable_prefix_caching=False,
            disable_log_stats=False,
            skip_tokenizer_init=True,
            **settings,
        )
        workers = self._rpc("pipetune_install")
        config = need(self._llm, "llm_engine", "vllm_config", "scheduler_config")
        return {"workers": workers, **{name: need(config, name) for name in ("max_num_batched_tokens", "max_num_seqs")}}

    def do_limits(self, max_num_batched_tokens: int, max_num_seqs: int) -> dict[str, Any]:
        """Other limits of the scheduler, no larger than those that the engine was started with."""
        scheduler = need(self._core, "scheduler")
        limits = dict.fromkeys(("max_num_running_reqs", "max_num_active_reqs"), max_num_seqs)
        for name, most in {**limits, "max_num_scheduled_tokens": max_num_batched_tokens}.items():
            need(scheduler, name)
            setattr(scheduler, name, most)
        return {}

    def do_repartition(self, layers: list[int]) -> dict[str, Any]:
        """Another split over as many stages, in the running processes."""
        import vllm.envs
        from vllm.v1.core.kv_cache_utils import resolve_kv_cache_block_sizes

        os.environ["VLLM_PP_LAYER_PARTITION"] = ",".join(map(str, layers))
        need(vllm.envs, "disable_envs_cache")()
        core = self._core
        config = need(core, "vllm_config")
        core.collective_rpc("pipetune_repartition", args=(layers,))
        cache = need(core, "_initialize_kv_caches")(config)
        block_size, hash_block_size = resolve_kv_cache_block_sizes(cache, config)
        core.scheduler = need(config, "scheduler_config", "get_scheduler_cls")()(
            vllm_config=config,
            kv_cache_config=cache,
            structured_output_manager=need(core, "structured_output_manager"),
            include_finished_set=False,
            log_stats=need(core, "log_stats"),
            block_size=block_size,
            hash_block_size=hash_block_size,
        )
        need(core, "_initialize_effective_attention_block_size")()
        return {"workers": self._rpc("pipetune_install")}

    def do_run(self, start_at: float, **given: Any) -> dict[str, Any]:
        """Generates for prompts that come at their times after a moment of the monotonic clock; times count from it."""
        reset = all(str(one) == "True" for one in self._rpc("pipetune_begin"))
        generate = self._generate if self._server is None else self._server.run
        rows = generate(start_at=start_at, **given)
        duration_s = time.monotonic() - start_at
        workers = self._rpc("pipetune_end")
        return {"duration_s": duration_s, "requests": rows, "workers": workers, "peak_was_reset": reset}

    def _generate(
        self,
        prompts: list[list[int]],
        output_lens: list[int],
        sampling: dict[str, Any],
        start_at: float,
        at_s: list[float],
    ) -> list[dict[str, Any]]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine = need(self._llm, "llm_engine")
        numbers: dict[str, int] = {}
        rows: list[dict[str, Any]] = [{"token_ids": [], "token_times_s": []} for _ in prompts]
        params = [
            SamplingParams(
                max_tokens=length, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA, **sampling
            )
            for length in output_lens
        ]
        given = 0
        while given < len(prompts) or engine.has_unfinished_requests():
            if not engine.has_unfinished_requests():
                time.sleep(max(start_at + at_s[given] - time.monotonic(), 0.0))
            while given < len(prompts) and start_at + at_s[given] <= time.monotonic():
                numbers[str(given)] = given
                numbers[engine.add_request(str(given), {"prompt_token_ids": prompts[given]}, params[given])] = given
                given += 1
            outputs = engine.step()
            now_s = time.monotonic() - start_at
            self._steps += 1
            for output in outputs:
                row, token_ids = rows[numbers[output.request_id]], output.outputs[0].token_ids
                row["token_ids"] += token_ids
                row["token_times_s"] += [now_s] * len(token_ids)
                if output.finished:
                    row["scheduled_s"] = need(output, "metrics", "scheduled_ts") - start_at
        return rows

    def do_logprobs(self, prompts: list[list[int]], continuations: list[list[int]]) -> dict[str, Any]:
        """Log-probability of each token of the continuations under those before it, and the likeliest token there."""
        if self._server is not None:
            return {"rows": [self._server.logprobs(*pair) for pair in zip(prompts, continuations, strict=True)]}
        from vllm import SamplingParams

        given = [{"prompt_token_ids": [*one, *more]} for one, more in zip(prompts, continuations, strict=True)]
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1, detokenize=False)
        rows = []
        outputs = self._llm.generate(given, params, use_tqdm=False)
        for output, prompt, tokens in zip(outputs, prompts, continuations, strict=True):
            found = need(output, "prompt_logprobs")[len(prompt) :]
            likeliest = [max((one.logprob, token) for token, one in row.items())[1] for row in found]
            rows.append([[row[token].logprob, best] for token, row, best in zip(tokens, found, likeliest, strict=True)])
        return {"rows": rows}

    def _rpc(self, method: str) -> list[Any]:
        return list(self._llm.collective_rpc(method) if self._server is None else self._server.rpc(method))

    @property
    def _core(self) -> Any:
        return need(self._llm, "llm_engine", "engine_core", "engine_core")

    def _died(self) -> dict[str, Any] | None:
        """The first worker to have ended, not one that vLLM itself ended for its sake."""
        if self._server is not None and (code := self._server.process.poll()) is not None:
            return {"rank": None, "exit_code": code}
        if self._llm is None:
            return None
        workers = need(self._core, "model_executor", "workers")
        codes = ((rank, worker.proc.exitcode) for rank, worker in enumerate(workers))
        ended = [{"rank": rank, "exit_code": code} for rank, code in codes if code is not None]
        return min(ended, key=lambda one: (one["exit_code"] in (0, -signal.SIGTERM), one["rank"]), default=None)


if __name__ == "__main__":
    main(VllmHost)
