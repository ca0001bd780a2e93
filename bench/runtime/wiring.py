"""Which transport lies between each pair of stages, and the edges made of it."""

from __future__ import annotations

import datetime as dt
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from pipetune.bench.runtime.links.transport import (
    DirectSender,
    GlooReceiver,
    NcclReceiver,
    Receiver,
    Sender,
    StagedReceiver,
    StagedSender,
)
from pipetune.bench.runtime.loop import Edges
from pipetune.bench.spec import device_kind

HIDDEN_TAG, TOKENS_TAG = 1, 2
# One buffer computes while the next one fills.
HIDDEN_DEPTH = 2
# NCCL 2.30 and later let ranks share a GPU if told so: the way to run this path on a machine with a single one.
NCCL_SHARES_GPUS = os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Messages:
    """What travels on one kind of edge."""

    tag: int
    depth: int
    numel: int
    dtype: torch.dtype


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
    ) -> Edges | None:
        """Edges of this rank in a pipeline over `ranks`; None if it has no stage. Every rank must call this alike.

        Args:
            hidden_numel: elements of the largest hidden states that cross an edge.
            tokens_numel: rows of a micro-batch.
            tokens_depth: token messages that may be under way to one stage.
        """
        last = ranks[-1]
        directed = [*itertools.pairwise(ranks), *((last, rank) for rank in ranks[:-1])]
        for source, destination in directed:
            self._open(source, destination)
        if self._rank not in ranks:
            return None
        index = list(ranks).index(self._rank)
        hidden = _Messages(tag=HIDDEN_TAG, depth=HIDDEN_DEPTH, numel=hidden_numel, dtype=hidden_dtype)
        tokens = _Messages(tag=TOKENS_TAG, depth=max(1, tokens_depth), numel=tokens_numel, dtype=torch.long)
        is_last = self._rank == last
        return Edges(
            hidden_in=self._receiver(ranks[index - 1], hidden) if index > 0 else None,
            hidden_out=self._sender(ranks[index + 1], hidden) if not is_last else None,
            tokens_in=self._receiver(last, tokens) if not is_last else None,
            tokens_out=tuple(self._sender(rank, tokens) for rank in ranks[:-1]) if is_last else (),
        )

    def _open(self, source: int, destination: int) -> None:
        """Makes and warms the NCCL group of a directed edge; all ranks in the same order, or NCCL hangs."""
        key = (source, destination)
        if self.transport(source, destination) != "nccl" or key in self._groups:
            return
        group = dist.new_group([source, destination], backend="nccl", timeout=dt.timedelta(hours=1))
        self._groups[key] = group
        if self._rank in key:
            # The first message sets the communicator up, which both sides must do at the same time.
            probe = torch.zeros(1, device=self._device)
            work = (
                dist.isend(probe, dst=destination, group=group)
                if self._rank == source
                else dist.irecv(probe, src=source, group=group)
            )
            assert work is not None
            work.wait()
            torch.cuda.synchronize(self._device)

    def _receiver(self, source: int, messages: _Messages) -> Receiver:
        depth, numel, dtype = messages.depth, messages.numel, messages.dtype
        if self.transport(source, self._rank) == "nccl":
            group = self._groups[source, self._rank]
            return NcclReceiver(source, group, depth=depth, numel=numel, dtype=dtype, device=self._device)
        if self._device.type == "cuda":
            return StagedReceiver(source, messages.tag, depth=depth, numel=numel, dtype=dtype, device=self._device)
        return GlooReceiver(source, messages.tag, depth=depth, numel=numel, dtype=dtype)

    def _sender(self, destination: int, messages: _Messages) -> Sender:
        depth, numel, dtype = messages.depth, messages.numel, messages.dtype
        if self.transport(self._rank, destination) == "nccl":
            return DirectSender(destination, depth=depth, group=self._groups[self._rank, destination])
        if self._device.type == "cuda":
            return StagedSender(destination, messages.tag, depth=depth, numel=numel, dtype=dtype)
        return DirectSender(destination, depth=depth, tag=messages.tag)
