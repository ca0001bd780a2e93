"""Requests given to a running pipeline one by one, from any thread: a handle each, with its tokens as they come."""

import itertools
import queue
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, Self

from pipetune.bench.errors import ConfigError, FleetError, PipetuneError
from pipetune.bench.fleet.supervisor import Supervisor
from pipetune.bench.load.online import ServedRequest
from pipetune.bench.prompts.forms import Chat, Prompts, prompts_of_call
from pipetune.bench.record import Failure, FailureKind
from pipetune.bench.spec import Value


class GenerationResult(Value):
    """What one prompt gave."""

    token_ids: tuple[int, ...]
    """Generated tokens, the end-of-sequence token included."""
    text: str | None
    """None where the model has no tokenizer."""
    prompt_token_ids: tuple[int, ...]
    ttft_s: float
    """From the call's prompts to this prompt's first token."""
    e2el_s: float
    """From the call's prompts to this prompt's last token."""
    token_times_s: tuple[float, ...]


class Closing:
    """Something that is closed at the end of its `with` block."""

    def close(self) -> None:
        """Gives back what is held."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class RequestHandle:
    """One request that was given: its tokens as they come, and its result."""

    def __init__(
        self, rank: int, cancel: Callable[[], None], on_text: Callable[[str | None], object] | None = None
    ) -> None:
        self.rank = rank
        """Rank of the worker that was given it."""
        self.future: Future[GenerationResult] = Future()
        """Its result; raises ConfigError for a request that cannot be served, FleetError if the workers fail. A request
        that was cancelled has the tokens that it got."""
        self.cancel = cancel
        """Asks for no more tokens; the request leaves with its next one."""
        self._tokens: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._on_text, self._text = on_text, ""

    def result(self, timeout_s: float | None = None) -> GenerationResult:
        """Waits for the result; raises as it, or TimeoutError."""
        return self.future.result(timeout_s)

    def __iter__(self) -> Iterator[int]:
        """Tokens as they come, for one reader; ends with the request, and raises what its result raises."""
        while (token := self._tokens.get()) is not None:
            yield token
        self.future.result()

    def _tell(self, token: int | None, text: str | None = None) -> None:
        self._tokens.put(token)
        if self._on_text is None:
            return
        if token is None and self.future.exception() is None and self.future.result().text is not None:
            # What was no whole text before its end.
            text = (self.future.result().text or "").removeprefix(self._text)
        if text:
            self._text += text
            self._on_text(text)
        if token is None:
            self._on_text(None)


class RequestQueue(Closing):
    """Requests that are served as they are given, from any thread; times count from when the first stage took them.

    A prompt with its output has at most `max_len` tokens.

    Example:
        >>> with pipeline.open_queue(max_len=2048) as requests:
        ...     for token in requests.submit([1, 2, 3], max_new_tokens=64):
        ...         print(token)
    """

    def __init__(self, supervisor: Supervisor, serve: Callable[[], object], max_len: int, replicas: int) -> None:
        """Waits until the workers are ready; raises what `serve` does, which returns once they have served all."""
        self._supervisor, self._serve, self.max_len, self._replicas = supervisor, serve, max_len, replicas
        self._ranks: list[int] = []
        """First stages of the replicas: a request goes to the one that has the fewest."""
        self._handles: dict[int, RequestHandle] = {}
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._error: PipetuneError | None = None
        self._is_closed = False
        self._opened = threading.Event()
        supervisor.on_served = self._hear
        self._thread = threading.Thread(target=self._run, name="requests", daemon=True)
        self._thread.start()
        self._opened.wait()
        if self._error is not None:
            raise self._error

    @property
    def is_open(self) -> bool:
        """Whether the workers serve requests still."""
        return self._thread.is_alive()

    def submit(
        self,
        prompt: Prompts | Chat,
        *,
        max_new_tokens: int | None,
        ignore_eos: bool = False,
        on_text: Callable[[str | None], object] | None = None,
    ) -> RequestHandle:
        """Gives a request: one prompt, as text, token ids, or messages of a chat, for at most `max_new_tokens`, where
        None lets it fill what is left of its positions; `ignore_eos` goes on after an end-of-sequence token.

        `on_text` is called with each piece of text as it comes, and with None once the result is there; from the thread
        that hears the workers, which it must not keep. TypeError for something else than a prompt; ConfigError where
        the queue is closed, there is not one prompt, or no token is asked for; else the PipetuneError that the workers
        died of.
        """
        chat = {"messages": prompt.messages, **prompt.options} if isinstance(prompt, Chat) else None
        given: list[Any] = [chat] if isinstance(prompt, Chat) else prompts_of_call(prompt)
        if len(given) != 1 or (max_new_tokens is not None and max_new_tokens < 1):
            raise ConfigError(f"{len(given)} prompts, max_new_tokens={max_new_tokens}: give one, and at least 1 token")
        with self._lock:
            if self._error is not None:
                raise self._error
            if self._is_closed:
                raise ConfigError("the queue of requests is closed; open another one")
            number, counts = next(self._numbers), Counter(handle.rank for handle in list(self._handles.values()))
            rank = min(self._ranks, key=lambda one: counts[one])
            handle = RequestHandle(rank, lambda: self._cancel(number), on_text)
            self._handles[number] = handle
            wanted = {"prompt": given[0], "max_new_tokens": max_new_tokens, "ignore_eos": ignore_eos}
            self._supervisor.tell("submit", rank, number=number, **wanted)
        return handle

    def close(self) -> None:
        """Takes no more requests, and waits for those that were given; raises what the workers died of."""
        with self._lock:
            for rank in () if self._is_closed else self._ranks:
                self._supervisor.tell("stop", rank)
            self._is_closed = True
        self._thread.join()
        if self._error is not None:
            raise self._error

    def __exit__(self, *error: object) -> None:
        if error[0] is not None:
            # Nobody waits for what was given any more.
            for handle in list(self._handles.values()):
                handle.cancel()
        self.close()

    def _cancel(self, number: int) -> None:
        # Later queues have requests of the same numbers.
        if (handle := self._handles.get(number)) is not None:
            self._supervisor.tell("cancel", handle.rank, number=number)

    def _run(self) -> None:
        error: PipetuneError | None = None
        try:
            self._serve()
        except PipetuneError as raised:
            error = raised
        # Somebody else ended the workers, and what was listened to with them.
        except Exception as raised:
            why = f"the fleet was closed while it served requests ({raised!r})"
            error = FleetError(Failure(kind=FailureKind.INTERRUPTED, message=why))
        with self._lock:
            self._error, self._is_closed = error, True
        self._opened.set()
        for handle in self._handles.values():
            handle.future.set_exception(error or ConfigError("the workers ended before the request did"))
            handle._tell(None)

    def _hear(self, message: dict[str, Any]) -> None:
        if message["type"] == "open":
            self._ranks.append(message["rank"])
            if message["rank"] != 0:
                self._supervisor.tell("begin", message["rank"])
            if len(self._ranks) == self._replicas:
                self._opened.set()
            return
        if message["type"] == "tokens":
            for number, token, text in message["tokens"]:
                self._handles[number]._tell(token, text)
            return
        handle = self._handles.pop(message["number"])
        if "error" in message:
            handle.future.set_exception(ConfigError(message["error"]))
        else:
            served = ServedRequest.model_validate(message["served"])
            times = [round(time - served.arrived_s, 6) for time in served.token_times_s]
            handle.future.set_result(
                GenerationResult(
                    token_ids=served.token_ids,
                    text=message["text"],
                    prompt_token_ids=message["prompt"],
                    ttft_s=times[0] if times else 0.0,
                    e2el_s=times[-1] if times else 0.0,
                    token_times_s=tuple(times),
                )
            )
        handle._tell(None)
