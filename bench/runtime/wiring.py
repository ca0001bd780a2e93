"""Which transport lies between each pair of stages, and the edges made of it."""

import datetime as dt
import itertools
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from pipetune.bench.memory import EDGE_DEPTH
from pipetune.bench.runtime.links import Messages, Receiver, Sender, StagedReceiver, StagedSender
from pipetune.bench.runtime.loop import Edges
from pipetune.bench.spec import device_kind

HIDDEN_TAG, TOKENS_TAG = 1, 2
MAX_CTAS = 8
"""Blocks of a GPU that one NCCL communicator may take: messages are small, and its buffers grow with them."""
COMMUNICATOR_BYTES = 64 * 2**20
"""What one may take of a GPU, outside of torch's allocator: buffers of some MiB for each block and direction."""
# NCCL 2.30 and later let ranks share a GPU if told so: the way to run this path on a machine with a single one.
NCCL_SHARES_GPUS = os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1"


def communicators_bytes(devices: Sequence[str], device: str) -> int:
    """What a worker leaves for the NCCL communicators that it may hold at once: one each way with workers elsewhere."""
    others = sum(device_kind(name) == "cuda" and name != device for name in devices)
    return 2 * others * COMMUNICATOR_BYTES if device_kind(device) == "cuda" else 0


class Links:
    """Makes the edges of a plan on this rank; NCCL groups are kept over plans, since making one is slow."""

    def __init__(self, devices: Sequence[str], rank: int, device: torch.device) -> None:
        self._devices = tuple(devices)
        self._rank = rank
        self._device = device
        self._groups: dict[tuple[int, int], dist.ProcessGroup] = {}

    def transport(self, source: int, destination: int) -> str:
        """`gloo`, `gloo+staging` or `nccl` for one directed edge between ranks."""
        kinds = {device_kind(self._devices[source]), device_kind(self._devices[destination])}
        if kinds == {"cpu"}:
            return "gloo"
        if kinds == {"cuda"} and (self._devices[source] != self._devices[destination] or NCCL_SHARES_GPUS):
            return "nccl"
        return "gloo+staging"

    def kind(self, ranks: Sequence[int]) -> str:
        """One word for a plan: `local` for a single stage, else the transports between neighbours."""
        used = {self.transport(a, b) for a, b in itertools.pairwise(ranks)}
        return ", ".join(sorted(used)) if used else "local"

    def edges(
        self,
        ranks: Sequence[int],
        *,
        hidden_numel: int,
        hidden_dtype: torch.dtype,
        tokens_numel: int,
        tokens_depth: int,
        tokens_to_all: bool = True,
    ) -> Edges | None:
        """Edges of this rank in a pipeline over `ranks`; None if it has no stage. Every rank must call this alike.

        `hidden_numel` counts elements of the largest hidden states that cross an edge, `tokens_numel` rows of a
        micro-batch, `tokens_depth` the token messages that may be under way to one stage. `tokens_to_all` tells every
        stage the sampled tokens; else the first alone is told, which embeds them.
        """
        *others, last = ranks
        told = others if tokens_to_all else others[:1]
        for source, destination in (*itertools.pairwise(ranks), *((last, rank) for rank in told)):
            self._open(source, destination)
        # All stages of a plan, replicas among them, have fewer; the oldest go first, on every rank alike.
        while len(self._groups) > 2 * len(self._devices):
            dist.destroy_process_group(self._groups.pop(next(iter(self._groups))))
        if self._rank not in ranks:
            return None
        index = list(ranks).index(self._rank)
        hidden = Messages(tag=HIDDEN_TAG, depth=EDGE_DEPTH, numel=hidden_numel, dtype=hidden_dtype)
        tokens = Messages(tag=TOKENS_TAG, depth=max(1, tokens_depth), numel=tokens_numel, dtype=torch.long)
        is_last = self._rank == last
        return Edges(
            hidden_in=self._receiver(ranks[index - 1], hidden) if index > 0 else None,
            hidden_out=self._sender(ranks[index + 1], hidden) if not is_last else None,
            tokens_in=self._receiver(last, tokens) if self._rank in told else None,
            tokens_out=tuple(self._sender(rank, tokens) for rank in told) if is_last else (),
        )

    def _open(self, source: int, destination: int) -> None:
        """Makes and warms the NCCL group of a directed edge; all ranks in the same order, or NCCL hangs."""
        key = (source, destination)
        if self.transport(source, destination) != "nccl":
            return
        if key in self._groups:
            self._groups[key] = self._groups.pop(key)
            return
        # Messages go before compute: whoever waits for one has nothing else to do.
        options: Any = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
        options.config.max_ctas = MAX_CTAS
        group = dist.new_group([source, destination], backend="nccl", timeout=dt.timedelta(hours=1), pg_options=options)
        self._groups[key] = group
        if self._rank in key:
            # The first message sets the communicator up, which both sides must do at the same time.
            probe = torch.zeros(1, device=self._device)
            work = dist.isend(probe, destination, group) if self._rank == source else dist.irecv(probe, source, group)
            assert work is not None
            work.wait()
            torch.cuda.synchronize(self._device)

    def _receiver(self, source: int, messages: Messages) -> Receiver:
        group = self._groups.get((source, self._rank))
        if group is None and self._device.type == "cuda":
            return StagedReceiver(source, messages, self._device)
        return Receiver(source, messages, self._device, group)

    def _sender(self, destination: int, messages: Messages) -> Sender:
        group = self._groups.get((self._rank, destination))
        if group is None and self._device.type == "cuda":
            return StagedSender(destination, messages)
        return Sender(destination, messages, group)
