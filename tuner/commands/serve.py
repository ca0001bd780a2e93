"""A pipeline behind OpenAI's HTTP API: completions and chats, whole or streamed; one request of it is one of the queue.

What the runtime cannot do is refused in words, never left out: other settings of sampling than the server's, several
answers to a prompt, log-probabilities, tools.
"""

import asyncio
import contextlib
import json
import signal
import socket
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import uvicorn
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from pipetune.bench.errors import ConfigError, PipetuneError, explain
from pipetune.bench.fleet.fleet import GenerationResult, RequestHandle, RequestQueue
from pipetune.bench.prompts.forms import requests_of
from pipetune.bench.spec import Sampling

DEFAULT_MAX_TOKENS = 16
"""Length of a completion, as OpenAI has it; a chat's answer may fill what is left of the positions."""
_ONLY = {
    "n": 1,
    "best_of": 1,
    "echo": False,
    "logprobs": False,
    "top_logprobs": 0,
    "suffix": "",
    "logit_bias": {},
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "tools": [],
    "response_format": {"type": "text"},
}
"""Parameters that change the answer, and the one value of each that is served."""


class Refused(Exception):
    """A request that is answered with an error."""

    def __init__(self, message: str, *, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Body(BaseModel):
    """What is read of a request; other keys are looked at by name, or mean nothing here."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    ignore_eos: bool = False


_Pieces = asyncio.Queue[tuple[int, str | None]]
"""Text of a choice as it comes, by the choice's number; None once its result is there."""


@dataclass
class _Choice:
    """One prompt's answer as it grows."""

    handle: RequestHandle
    limit: int
    stops: Sequence[str]
    text: str = ""
    sent: int = 0
    """Characters that the client has."""
    finish_reason: str | None = None
    result: GenerationResult | None = None

    def take(self, piece: str) -> None:
        """Takes text in; what follows a stop text is cut off."""
        if self.finish_reason is None:
            self.text += piece
            found = [place for stop in self.stops if (place := self.text.find(stop)) >= 0]
            if found:
                self.text, self.finish_reason = self.text[: min(found)], "stop"
                self.handle.cancel()

    def end(self) -> None:
        """Takes the result in."""
        self.result = self.handle.future.result()
        count = len(self.result.token_ids)
        self.finish_reason = self.finish_reason or ("length" if count >= self.limit else "stop")

    def ready(self) -> str:
        """Text that may be sent now: no end of it may still become a stop text."""
        begun = (stop[:size] for stop in self.stops for size in range(1, len(stop)) if self.finish_reason is None)
        held = max((len(part) for part in begun if self.text.endswith(part)), default=0)
        piece = self.text[self.sent : len(self.text) - held]
        self.sent += len(piece)
        return piece


@dataclass(frozen=True, kw_only=True)
class Api:
    """Answers requests from a queue."""

    queue: RequestQueue
    model: str
    sampling: Sampling | None
    created: int = field(default_factory=lambda: int(time.time()))

    def app(self) -> Starlette:
        """The application."""
        return Starlette(
            routes=[
                Route("/v1/completions", partial(self._answer, is_chat=False), methods=["POST"]),
                Route("/v1/chat/completions", partial(self._answer, is_chat=True), methods=["POST"]),
                Route("/v1/models", self._models),
                Route("/health", self._health),
            ],
            exception_handlers={Refused: _refuse},
        )

    async def _models(self, request: Request) -> Response:
        card = {"id": self.model, "object": "model", "created": self.created, "owned_by": "pipetune"}
        return JSONResponse({"object": "list", "data": [{**card, "max_model_len": self.queue.max_len}]})

    async def _health(self, request: Request) -> Response:
        return Response(status_code=200 if self.queue.is_open else 503)

    async def _answer(self, request: Request, *, is_chat: bool) -> Response:
        body, given = await self._read(request, "messages" if is_chat else "prompt")
        pieces: _Pieces = asyncio.Queue()
        choices = self._submit(body, given, pieces, is_chat=is_chat)
        kind = ("chat.completion" if is_chat else "text_completion") + ".chunk" * (is_chat and body.stream)
        prefix = "chatcmpl" if is_chat else "cmpl"
        head = {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": self.model}
        if body.stream:
            wants_usage = bool((body.stream_options or {}).get("include_usage"))
            events = _events(choices, pieces, head, is_chat=is_chat, wants_usage=wants_usage)
            return StreamingResponse(events, media_type="text/event-stream")
        work = asyncio.create_task(_collect(choices, pieces))
        gone = asyncio.create_task(_disconnected(request))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                return Response(status_code=499)
            await work
        finally:
            gone.cancel()
            work.cancel()
            _cancel(choices)
        answers = []
        for index, one in enumerate(choices):
            said = {"message": {"role": "assistant", "content": one.text}} if is_chat else {"text": one.text}
            answers.append({"index": index, **said, "logprobs": None, "finish_reason": one.finish_reason})
        return JSONResponse({**head, "choices": answers, "usage": _usage(choices)})

    async def _read(self, request: Request, key: str) -> tuple[Body, dict[str, Any]]:
        """The request, and the part of it that is its prompts."""
        try:
            values = json.loads(await request.body())
            if not isinstance(values, dict):
                raise Refused(f"the body is no JSON object but a {type(values).__name__}")
            body = Body.model_validate(values)
        except ValidationError as error:
            raise Refused(explain(error), param=str(error.errors()[0]["loc"][0])) from None
        except ValueError as error:
            raise Refused(f"the body is no JSON: {error}") from None
        if body.model is not None and body.model != self.model:
            message = f"the model {body.model!r} does not exist; there is {self.model!r}"
            raise Refused(message, param="model", status=404, code="model_not_found")
        for name, only in _ONLY.items():
            if (value := values.get(name)) not in (None, only):
                raise Refused(f"{name}={value!r} is not served; leave it out, or give {only!r}", param=name)
        mine = self.sampling
        fixed = {"temperature": 0.0} if mine is None else mine.model_dump(include={"temperature", "top_p", "top_k"})
        for name, only in fixed.items():
            if (value := getattr(body, name)) not in (None, only):
                raise Refused(f"{name}={value}: this server draws all tokens with {name}={only}", param=name)
        if not values.get(key):
            raise Refused(f"{key}: is missing", param=key)
        options = ("chat_template_kwargs", "add_generation_prompt", "continue_final_message")
        return body, {name: values[name] for name in (key, *options) if name in values}

    def _submit(self, body: Body, given: Mapping[str, Any], pieces: _Pieces, *, is_chat: bool) -> list[_Choice]:
        limit = body.max_completion_tokens or body.max_tokens or (None if is_chat else DEFAULT_MAX_TOKENS)
        stops = [stop for stop in ([body.stop] if isinstance(body.stop, str) else body.stop or []) if stop]
        loop, choices = asyncio.get_running_loop(), list[_Choice]()

        def tell(index: int, piece: str | None) -> None:
            # The loop is closed where the server ends at once.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(pieces.put_nowait, (index, piece))

        try:
            for index, one in enumerate(requests_of(given, "the request")):
                handle = self.queue.submit(
                    one.prompt,
                    max_new_tokens=limit,
                    ignore_eos=body.ignore_eos,
                    on_text=lambda piece, index=index: tell(index, piece),  # type: ignore[misc]
                )
                choices.append(_Choice(handle, limit or self.queue.max_len, stops))
        except PipetuneError as error:
            _cancel(choices)
            raise Refused(str(error), status=400 if isinstance(error, ConfigError) else 503) from None
        return choices


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return JSONResponse(error.body, status_code=error.status)


async def _disconnected(request: Request) -> None:
    while not await request.is_disconnected():
        await asyncio.sleep(0.2)


def _cancel(choices: Sequence[_Choice]) -> None:
    for choice in choices:
        if not choice.handle.future.done():
            choice.handle.cancel()


async def _grown(choices: Sequence[_Choice], pieces: _Pieces) -> AsyncIterator[int]:
    """Choices, each time that one has grown or ended, until all have, or one cannot be answered."""
    left = len(choices)
    while left:
        index, piece = await pieces.get()
        if piece is not None:
            choices[index].take(piece)
        else:
            left -= 1
            try:
                choices[index].end()
            except PipetuneError as error:
                raise Refused(str(error), status=400 if isinstance(error, ConfigError) else 500) from None
        yield index


async def _collect(choices: Sequence[_Choice], pieces: _Pieces) -> None:
    async for _ in _grown(choices, pieces):
        pass


async def _events(
    choices: Sequence[_Choice], pieces: _Pieces, head: Mapping[str, Any], *, is_chat: bool, wants_usage: bool
) -> AsyncIterator[str]:
    """Server-sent events of a streamed answer."""

    def event(choice: Mapping[str, Any] | None, **more: Any) -> str:
        return f"data: {json.dumps({**head, 'choices': [choice] if choice else [], **more})}\n\n"

    try:
        if is_chat:
            for index in range(len(choices)):
                yield event({"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None})
        async for index in _grown(choices, pieces):
            choice = choices[index]
            text, reason = choice.ready(), choice.finish_reason if choice.result is not None else None
            if text or reason:
                said: dict[str, Any] = {"delta": {"content": text} if text else {}} if is_chat else {"text": text}
                yield event({"index": index, **said, "logprobs": None, "finish_reason": reason})
        if wants_usage:
            yield event(None, usage=_usage(choices))
    except Refused as error:
        yield f"data: {json.dumps(error.body)}\n\n"
    finally:
        # The client is gone, or all has been said.
        _cancel(choices)
    yield "data: [DONE]\n\n"


def _usage(choices: Sequence[_Choice]) -> dict[str, int]:
    results = [choice.result for choice in choices if choice.result is not None]
    prompt, completion = (sum(len(getattr(one, of)) for one in results) for of in ("prompt_token_ids", "token_ids"))
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def serve(api: Api, *, host: str, port: int, say: Callable[[str], object]) -> None:
    """Serves until SIGINT or SIGTERM, and then what was accepted; ends by itself when the workers are lost.
    ConfigError: nobody may listen there."""
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ConfigError(f"--host {host} --port {port}: nobody can listen there: {error.strerror}") from None
    server = uvicorn.Server(uvicorn.Config(api.app(), log_level="warning", access_log=False))

    async def run() -> None:
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        while api.queue.is_open and not serving.done():
            await asyncio.wait({serving}, timeout=0.5)
        server.should_exit = True
        await serving

    # Also before uvicorn listens to signals, and when it raises again, at its end, the one that ended it.
    before = {number: signal.signal(number, server.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
    shown = f"[{host}]" if ":" in host else host
    say(f"serving {api.model} at http://{shown}:{listener.getsockname()[1]}/v1; Ctrl-C ends it")
    try:
        asyncio.run(run())
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
