"""Requests over time inside the workers: the lines between the stages, a run over a trace, and what all of them saw."""

import contextlib
import socket
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import validate_call
from tokenizers.decoders import DecodeStream

from pipetune.bench.errors import ConfigError
from pipetune.bench.files import scratch_folder
from pipetune.bench.load.admission import Rules, deal
from pipetune.bench.load.online import OnlineRequest, OnlineRun, ServedRequest
from pipetune.bench.prompts.forms import requests_of
from pipetune.bench.runtime.device import undisturbed
from pipetune.bench.runtime.online import Leader, Mail, OnlineStage, Sizes, Source
from pipetune.bench.spec import Plan, Sampling
from pipetune.bench.worker.channel import DriverLink
from pipetune.bench.worker.prompts import Tokens
from pipetune.bench.worker.stage_host import StageHost


class Queue(Source):
    """Requests as the driver gives them, until it says that no more will come; each token is told at once."""

    is_over = False

    def __init__(self, link: DriverLink, tokens: Tokens, max_len: int) -> None:
        super().__init__()
        self.waits_on = [link]
        self._link, self._tokens, self._max_len = link, tokens, max_len
        self._cancelled: list[int] = []
        self._texts: dict[int, DecodeStream] = {}

    def take(self, now_s: float) -> list[OnlineRequest]:
        """Those that were given, but for those that cannot be served, of which the driver is told."""
        found = []
        for message in self._link.pending():
            args = message["args"]
            if message["command"] == "submit":
                try:
                    found.append(self._read(**args))
                except ConfigError as error:
                    self._link.send("served", number=args["number"], error=str(error))
            elif message["command"] == "cancel":
                self._cancelled.append(args["number"])
            else:
                self.is_over = True
        return found

    def _read(self, number: int, prompt: Any, max_new_tokens: int | None, ignore_eos: bool) -> OnlineRequest:
        given = requests_of(prompt, "prompt")[0].prompt if isinstance(prompt, dict) else prompt
        ids = self._tokens.read(given)
        if max_new_tokens is None:
            max_new_tokens = max(1, self._max_len - len(ids))
        if len(ids) + max_new_tokens > self._max_len:
            raise ConfigError(
                f"prompt: {len(ids)} tokens and max_new_tokens={max_new_tokens} are more than max_len={self._max_len}; "
                "shorten it, or open the queue with a larger one"
            )
        eos = () if ignore_eos else tuple(self._tokens.eos_token_ids())
        return OnlineRequest(number=number, prompt=ids, output_len=max_new_tokens, eos_token_ids=eos)

    def cancelled(self) -> list[int]:
        """Those that are no longer wanted."""
        found, self._cancelled = self._cancelled, []
        return found

    def told(self, tokens: Sequence[tuple[int, int]]) -> None:
        """Tells the driver, with the text that is whole by then."""
        self._link.send("tokens", tokens=[(number, token, self._text(number, token)) for number, token in tokens])

    def _text(self, number: int, token: int) -> str | None:
        if (fast := getattr(self._tokens.tokenizer, "backend_tokenizer", None)) is None:
            return None
        stream = self._texts.setdefault(number, DecodeStream(skip_special_tokens=True))
        text: str | None = stream.step(fast, token)
        return text

    def finished(self, request: OnlineRequest, served: ServedRequest) -> None:
        """Tells the driver, with the text that the tokens are."""
        tokenizer = self._tokens.tokenizer
        self._texts.pop(served.number, None)
        text = tokenizer.decode(served.token_ids, skip_special_tokens=True) if tokenizer is not None else None
        self._link.send("served", number=served.number, prompt=request.prompt, text=text, served=served)


class Online:
    """Every rank has one and calls the same methods; rank 0's answers count."""

    def __init__(self, host: StageHost, tokens: Tokens, link: DriverLink) -> None:
        self._host, self._tokens, self._link = host, tokens, link

    @validate_call
    def run_trace(
        self,
        plan: Plan,
        rules: Rules,
        requests: tuple[OnlineRequest, ...],
        max_concurrency: int | None,
        sampling: Sampling | None,
        instrument: bool,
    ) -> dict[str, Any]:
        """Serves requests as they arrive, until all have left."""
        longest = max(len(one.prompt) for one in requests)
        max_len = max(len(one.prompt) + one.output_len for one in requests)
        self._tokens.encode([one.prompt for one in requests], max_len - longest)
        sizes = Sizes(rules=rules, max_len=max_len, prompt_len=longest)
        own = self.open(plan, sizes, sampling, instrument=instrument)
        run = self.serve(own, requests, sizes, max_concurrency)
        del own
        self._host.free()
        return {"run": run}

    def serve(
        self, own: OnlineStage | None, requests: Sequence[OnlineRequest], sizes: Sizes, max_concurrency: int | None
    ) -> OnlineRun:
        """One pass over a trace, on every rank."""
        host = self._host
        assert host.placement is not None
        replica, replicas, leader, source = host.placement.replica, host.placement.replicas, None, Source()
        shares = deal(len(replicas), max_concurrency)
        if own is not None:
            own.timeline.reset()
        with self._lines() as lines, undisturbed():
            if own is not None and replica is not None and host.index == 0:
                share, places = shares[replica]
                source = Source(requests[share])
                leader = Leader(own, lines, source, sizes, max_concurrency=places)
            zero_s = self._run(own, leader, lines)
        mine: dict[str, Any] = {"trace": own.timeline.resolve().trace(zero_s)} if own is not None else {}
        if leader is not None:
            load = {"load_tasks": leader.tasks, "idle_s": leader.idle_s, "underfilled_s": leader.underfilled_s}
            mine |= {"requests": source.in_order(), "last_s": leader.last_s, "load": load}
        rows = host.control.gather(mine)
        leaders = [rows[ranks[0]] for ranks in replicas]
        duration_s = max(row["last_s"] for row in leaders)
        served: list[Any] = [None] * len(requests)
        for (share, _), row in zip(shares, leaders, strict=True):
            served[share] = row["requests"]
            if row["last_s"] < duration_s:
                row["load"]["idle_s"].append((row["last_s"], duration_s))
        return OnlineRun(
            **leaders[0]["load"],
            further_replicas=tuple(row["load"] for row in leaders[1:]),
            requests=tuple(served),
            duration_s=duration_s,
            stages=tuple(rows[rank]["trace"] for rank in host.placement.ranks),
            transport=host.transport(),
        )

    @validate_call
    def open_queue(self, plan: Plan, rules: Rules, max_len: int, sampling: Sampling | None) -> dict[str, Any]:
        """Serves requests as the driver gives them, until it says that no more will come and all have left."""
        host = self._host
        sizes = Sizes(rules=rules, max_len=max_len, prompt_len=max_len - 1)
        own = self.open(plan, sizes, sampling, instrument=False)
        leader = None
        with contextlib.ExitStack() as held:
            lines = held.enter_context(self._lines())
            if own is not None and host.index == 0:
                leader = Leader(own, lines, Queue(self._link, self._tokens, max_len), sizes, keep_tasks=False)
                self._link.send("open")
                held.enter_context(self._link.heard())
            self._run(own, leader, lines)
        # What is answered next says that all have been served.
        host.control.barrier()
        del own, leader
        host.free()
        return {}

    def open(self, plan: Plan, sizes: Sizes, sampling: Sampling | None, *, instrument: bool) -> OnlineStage | None:
        """Moves to the plan, and makes and tries this rank's caches and edges; None on ranks without a stage."""
        host = self._host
        if plan != host.plan:
            host.apply(plan)
        elif host.loop is not None:
            host.loop.close()
            host.loop = None
        assert host.placement is not None
        host.status.phase = "serve"
        found = [
            host.links.edges(
                ranks,
                hidden_numel=sizes.most_tokens * host.stage.message_values,
                hidden_dtype=host.stage.message_dtype,
                tokens_numel=1,
                tokens_depth=1,
                tokens_to_all=False,
            )
            for ranks in host.placement.replicas
        ]
        own, edges = None, next(filter(None, found), None)
        if edges is not None:
            own = OnlineStage(
                *(host.stage, host.device, host.status, edges, sizes),
                sampling=sampling,
                pad_token_id=self._tokens.pad_token_id,
                instrument=instrument,
            )
        if own is not None:
            own.rehearse()
        return own

    def _run(self, own: OnlineStage | None, leader: Leader | None, lines: Sequence[Mail]) -> float:
        """This rank's part; the moment from which times are counted, alike on every rank."""
        # Nobody is told anything before all are ready.
        now_s = self._host.control.gather(None if own is None else self._host.device.now())
        zero_s: float = max(one for one in now_s if one is not None)
        if leader is not None:
            leader.run(zero_s)
        elif own is not None:
            own.follow(lines[0])
        return zero_s

    @contextlib.contextmanager
    def _lines(self) -> Iterator[list[Mail]]:
        """The lines of a replica's first stage to the others, in their order; of another, its line to the first."""
        host, lines = self._host, list[Mail]()
        assert host.placement is not None
        replica = host.placement.replica
        ranks = host.placement.replicas[replica] if replica is not None else ()
        with contextlib.ExitStack() as held:
            path, listener = None, None
            if host.index == 0:
                path = str(held.enter_context(scratch_folder()) / "orders")
                listener = held.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
                listener.bind(path)
                listener.listen(len(ranks))
            paths = host.control.gather(path)
            if listener is not None:
                found = {}
                for _ in ranks[1:]:
                    line = Mail(listener.accept()[0])
                    held.callback(line.close)
                    found[line.receive()] = line
                lines += [found[index] for index in range(1, len(ranks))]
            elif ranks:
                connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                connection.connect(paths[ranks[0]])
                lines.append(Mail(connection))
                held.callback(lines[0].close)
                lines[0].send(host.index)
            yield lines
