"""vLLM's own HTTP server in place of an engine in the host's process: asked over loopback, requests one by one, and
probed by what the server has for developers.
"""

import asyncio
import http.client
import json
import os
import socket
import subprocess
import sys
import time
from typing import Any

HERE = "127.0.0.1"


class Server:
    """One server, which ends with the host's session."""

    def __init__(self, model: str, layers: list[int], settings: dict[str, Any]) -> None:
        with socket.create_server((HERE, 0)) as free:
            self._port: int = free.getsockname()[1]
        self._model = model
        settings = {"model": model, "host": HERE, "port": self._port, "pipeline_parallel_size": len(layers), **settings}
        flags = [f"--{name}" if value is True else f"--{name}={value}" for name, value in settings.items() if value]
        flags += ["--no-enable-prefix-caching", "--enable-per-request-metrics", "--uvicorn-log-level=warning"]
        flags += ["--distributed-executor-backend=mp", "--worker-extension-cls=pipetune_vllm_probe.StageProbe"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *flags],
            stdin=subprocess.DEVNULL,
            env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_SERVER_DEV_MODE": "1"},
        )
        while not self._is_up():
            if (code := self.process.poll()) is not None:
                raise RuntimeError(f"the server ended with exit code {code}")
            time.sleep(0.2)

    def rpc(self, method: str) -> list[Any]:
        """What each worker answers; what is no dictionary, as text."""
        return list(self._ask("/collective_rpc", {"method": method})["results"])

    def run(
        self, prompts: list[list[int]], output_lens: list[int], at_s: list[float], **how: Any
    ) -> list[dict[str, Any]]:
        """Sends each prompt when it is due, and notes when its tokens come."""

        async def all_of_them() -> list[dict[str, Any]]:
            rows = zip(prompts, output_lens, at_s, strict=True)
            return await asyncio.gather(*(self._request(*row, **how) for row in rows))

        return asyncio.run(all_of_them())

    def logprobs(self, prompt: list[int], tokens: list[int]) -> list[tuple[float, int]]:
        """Log-probability of each of the tokens that follow a prompt, and the likeliest token there."""
        question = {"prompt": [*prompt, *tokens], "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 1}
        (choice,) = self._ask("/v1/completions", {"model": self._model, **question})["choices"]
        rows = [
            {int(key): one["logprob"] for key, one in row.items()} for row in choice["prompt_logprobs"][len(prompt) :]
        ]
        return [(row[token], max(row, key=lambda key: row[key])) for row, token in zip(rows, tokens, strict=True)]

    async def _request(
        self, prompt: list[int], length: int, at_s: float, sampling: dict[str, Any], start_at: float
    ) -> dict[str, Any]:
        told = {"model": self._model, "prompt": prompt, "max_tokens": length, "ignore_eos": True, **sampling}
        how = {"stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True}
        body = json.dumps({**told, **how}).encode()
        await asyncio.sleep(max(start_at + at_s - time.monotonic(), 0.0))
        row: dict[str, Any] = {"token_ids": [], "token_times_s": [], "scheduled_s": time.monotonic() - start_at}
        # HTTP 1.0 has no chunks: a line is an event.
        reader, writer = await asyncio.open_connection(HERE, self._port, limit=2**24)
        head = f"POST /v1/completions HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        async for line in reader:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                if "error" in event:
                    raise RuntimeError(str(event["error"]))
                tokens = [token for choice in event["choices"] for token in choice.get("token_ids") or ()]
                row["token_ids"] += tokens
                row["token_times_s"] += [time.monotonic() - start_at] * len(tokens)
                row["scheduled_s"] += 1e-3 * ((event.get("metrics") or {}).get("queue_time_ms") or 0.0)
        writer.close()
        if len(row["token_ids"]) != length:
            raise RuntimeError(f"the server gave {len(row['token_ids'])} tokens of {length}, and then nothing")
        return row

    def _is_up(self) -> bool:
        try:
            self._ask("/health")
        except (OSError, http.client.HTTPException):
            return False
        return True

    def _ask(self, path: str, question: dict[str, Any] | None = None) -> Any:
        connection = http.client.HTTPConnection(HERE, self._port)
        try:
            verb, body = ("GET", None) if question is None else ("POST", json.dumps(question))
            connection.request(verb, path, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            text = answer.read()
            if answer.status != http.client.OK:
                raise RuntimeError(f"{path} answered {answer.status}: {text[:500].decode(errors='replace')}")
            return json.loads(text or b"{}")
        finally:
            connection.close()
