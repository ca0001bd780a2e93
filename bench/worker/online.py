"""Requests over time inside the workers: the lines between the stages, a run over a trace, and what all of them saw."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import validate_call

from pipetune.bench.errors import ConfigError
from pipetune.bench.files import scratch_folder
from pipetune.bench.load.admission import Rules
from pipetune.bench.load.online import OnlineRequest
from pipetune.bench.runtime.device import undisturbed
from pipetune.bench.runtime.online import Leader, Mail, OnlineStage, Sizes, Trace, close_all
from pipetune.bench.spec import Plan, Sampling
from pipetune.bench.worker.prompts import Tokens
from pipetune.bench.worker.stage_host import StageHost


class Online:
    """Every rank has one and calls the same methods; rank 0's answers count."""

    def __init__(self, host: StageHost, tokens: Tokens) -> None:
        self._host, self._tokens = host, tokens

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
        source = Trace(requests)
        longest = max(len(one.prompt) for one in requests)
        max_len = max(len(one.prompt) + one.output_len for one in requests)
        self._tokens.encode([one.prompt for one in requests], max_len - longest)
        sizes = Sizes(rules=rules, max_len=max_len, prompt_len=longest)
        own = self.open(plan, sizes, sampling, instrument=instrument)
        run = self.serve(own, source, sizes, max_concurrency)
        del own
        self._host.free()
        return {"run": run}

    def serve(
        self, own: OnlineStage | None, source: Trace, sizes: Sizes, max_concurrency: int | None
    ) -> dict[str, Any]:
        """One pass over a trace, as `OnlineRun` has it, on every rank."""
        host = self._host
        assert host.placement is not None
        ranks, leader = host.placement.replicas[0], None
        if own is not None:
            own.timeline.reset()
        with self._lines(ranks) as lines, undisturbed():
            if own is not None and host.rank == ranks[0]:
                leader = Leader(own, lines, source, sizes, max_concurrency=max_concurrency)
            # Nobody is told anything before all are ready.
            host.control.barrier()
            zero_s = leader.run() if leader is not None else None
            if leader is None and own is not None:
                own.follow(lines[0])
        mine: dict[str, Any] = {}
        zero_s = host.control.gather(zero_s)[ranks[0]]
        if own is not None:
            mine["trace"] = own.timeline.resolve().trace(zero_s)
        if leader is not None:
            mine["run"] = {
                "requests": source.in_order(),
                "duration_s": round(leader.last_s, 6),
                "tasks": leader.tasks,
                "idle_s": leader.idle_s,
                "underfilled_s": leader.underfilled_s,
            }
        rows = host.control.gather(mine)
        stages = [rows[rank]["trace"] for rank in ranks]
        return {**rows[ranks[0]]["run"], "stages": stages, "transport": host.transport()}

    def open(self, plan: Plan, sizes: Sizes, sampling: Sampling | None, *, instrument: bool) -> OnlineStage | None:
        """Moves to the plan, and makes and tries this rank's caches and edges; None on ranks without a stage.

        Raises:
            ConfigError: on every rank, if the model's caches cannot be used so.
        """
        host = self._host
        if plan != host.plan:
            host.apply(plan)
        elif host.loop is not None:
            host.loop.close()
            host.loop = None
        assert host.placement is not None
        host.status.phase = "serve"
        edges = host.links.edges(
            host.placement.replicas[0],
            hidden_numel=sizes.most_tokens * host.stage.message_values,
            hidden_dtype=host.stage.message_dtype,
            tokens_numel=1,
            tokens_depth=1,
            tokens_to_all=False,
        )
        own = None
        if edges is not None:
            own = OnlineStage(
                *(host.stage, host.device, host.status, edges, sizes),
                sampling=sampling,
                pad_token_id=self._tokens.pad_token_id,
                instrument=instrument,
            )
        if not all(host.control.gather(own is None or own.caches[0].is_movable)):
            raise ConfigError(
                f"{host.shape.architecture} keeps more than keys and values of each token, which cannot be moved "
                "within a slot yet; give it its prompts at once"
            )
        if own is not None:
            own.rehearse()
        return own

    @contextlib.contextmanager
    def _lines(self, ranks: Sequence[int]) -> Iterator[list[Mail]]:
        """The first stage's lines to the others, in their order; of another, its line to the first."""
        host, lines = self._host, list[Mail]()
        with contextlib.ExitStack() as held:
            held.callback(close_all, lines)
            path, listener = None, None
            if host.rank == ranks[0]:
                path = str(held.enter_context(scratch_folder()) / "orders")
                listener = held.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
                listener.bind(path)
                listener.listen(len(ranks))
            path = host.control.gather(path)[ranks[0]]
            if listener is not None:
                found = {}
                for _ in ranks[1:]:
                    line = Mail(listener.accept()[0])
                    lines.append(line)
                    found[line.receive()] = line
                lines[:] = [found[index] for index in range(1, len(ranks))]
            elif host.rank in ranks:
                connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                connection.connect(path)
                lines.append(Mail(connection))
                lines[0].send(host.index)
            yield lines
