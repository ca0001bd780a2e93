"""What tasks cost by nominal rates: good for the order in which to try plans, and for devices that are not here.

Every layer costs

    overhead + bytes / bandwidth + flops / compute

where the bytes are its weights, read once a task, and the KV cache of its rows; and the flops are 2 · active parameters
of each token, and of full attention 4 · hidden size · positions attended to. Prefill meets many tokens a task and is
bound by the last term, so pieces may be small; decode meets one token a row and is bound by the middle one, so its
micro-batches want to be large. The head runs on the last stage: on one position a row, or on all of them where texts
are scored. Embedding and sampling are taken to cost nothing.

Compilation, CUDA graphs and packed weights speed every plan up alike, as far as is known here. Of rates the ratios
decide the order of plans, so they need not be those of the machine.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from pipetune.bench.memory import ModelShape
from pipetune.bench.profile import TaskKind
from pipetune.bench.spec import device_kind
from pipetune.tuner.planning.arrays import Floats, remembered


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a device does in a second, and how messages reach it."""

    flops_per_s: float
    bytes_per_s: float
    """Reading rate of a layer's weights, at the batch sizes where decode is bound by it."""
    head_bytes_per_s: float
    """Reading rate of the head: one wide matrix is read faster than a layer's many."""
    layer_overhead_s: float
    """What one layer costs however small it is: launches from Python."""
    hop_latency_s: float
    """Latency of a message to or from another device."""
    hop_bytes_per_s: float


RATES: Mapping[str, Rates] = {
    "cpu": Rates(
        flops_per_s=1.9e11,
        bytes_per_s=2.5e10,
        head_bytes_per_s=2.1e10,
        layer_overhead_s=1.5e-4,
        hop_latency_s=2.5e-4,
        hop_bytes_per_s=3e9,
    ),
    "cuda": Rates(
        flops_per_s=2e14,
        bytes_per_s=2e12,
        head_bytes_per_s=2e12,
        layer_overhead_s=1.5e-4,
        hop_latency_s=5e-5,
        hop_bytes_per_s=2e10,
    ),
}
"""By kind of device; of a CPU, one core with packed weights in fp32."""
NVLINK_BYTES_PER_S = 2e10
"""Rate of one NVLink of a pair; it and those below are as in NCCL's `src/graph/topo.h`."""
PCI_BYTES_PER_S: Mapping[str, float] = {**dict.fromkeys(("PSB", "PIX", "PXB", "PHB", "NODE"), 1.2e10), "SYS": 6e9}
"""By the nearest common ancestor of two GPUs, as `nvidia-smi topo -m` names it."""


@dataclass(frozen=True)
class NominalCosts:
    """Costs by rates; see `tuner.planning.costs.base.Costs`."""

    shape: ModelShape
    rates_by_device: Mapping[str, Rates] = field(default_factory=lambda: RATES)
    """Rates by a device's name, or for all of a kind by the kind: `cpu`, `cuda`."""
    scores: bool = False
    """Whether texts are scored, which takes the head on every position."""
    links: tuple[str, ...] = ()
    """What lies between GPUs, as `Hardware.links` has it: `0-1:NV18`."""

    def rates(self, device: str) -> Rates:
        """Rates of one device; KeyError where neither it nor its kind has any."""
        return self.rates_by_device.get(device) or self.rates_by_device[device_kind(device)]

    def layers_s(self, device: str, kind: TaskKind) -> Floats:
        """`[num_layers]`, of each layer if it lay on the device."""
        # The head is no layer's affair.
        return self._of_layers(self.rates(device), kind._replace(samples=True))

    @remembered
    def _of_layers(self, rates: Rates, kind: TaskKind) -> Floats:
        layers = self.shape.layers
        tokens = kind.rows * kind.new_tokens
        # Over the new positions of a row, the mean of what is attended to is what was there and half of them.
        attended = kind.past_tokens + kind.new_tokens / 2
        active = np.array([layer.active_params for layer in layers], dtype=float)
        weights = np.array([layer.weight_bytes for layer in layers], dtype=float)
        kv = np.array([layer.kv_bytes_per_token for layer in layers], dtype=float)
        attends = np.array([layer.kind == "full_attention" for layer in layers], dtype=float)
        # Of routed experts no more is read than the tokens choose.
        read = np.minimum(weights, tokens * active * self.shape.kept_bytes) + kind.rows * attended * kv
        flops = tokens * (2 * active + attends * 4 * self.shape.hidden_size * attended)
        seconds: Floats = rates.layer_overhead_s + read / rates.bytes_per_s + flops / rates.flops_per_s
        seconds.setflags(write=False)
        return seconds

    def ends_s(self, device: str, kind: TaskKind, *, is_first: bool, is_last: bool) -> float:
        """Seconds of the head, on the last stage; 0 elsewhere."""
        if not (is_last and kind.samples):
            return 0.0
        rates = self.rates(device)
        head = self.shape.hidden_size * self.shape.vocab_size
        positions = kind.rows * (kind.new_tokens if self.scores else 1)
        return head * self.shape.kept_bytes / rates.head_bytes_per_s + 2 * head * positions / rates.flops_per_s

    def hop_s(self, source: str, target: str, num_bytes: int) -> float:
        """By what lies between two GPUs, where it is known, else by the slower of both ends."""
        ends = (self.rates(source), self.rates(target))
        known = self._gpu_bytes_per_s.get(frozenset((source, target)))
        bandwidth = known or min(rates.hop_bytes_per_s for rates in ends)
        return max(rates.hop_latency_s for rates in ends) + num_bytes / bandwidth

    @cached_property
    def _gpu_bytes_per_s(self) -> Mapping[frozenset[str], float]:
        """By the names of two GPUs."""
        found = {}
        for pair, _, level in (link.partition(":") for link in self.links):
            lanes, pci = level.removeprefix("NV"), PCI_BYTES_PER_S.get(level.partition("+")[0])
            rate = int(lanes) * NVLINK_BYTES_PER_S if lanes.isdecimal() else pci
            if rate:
                found[frozenset(f"cuda:{index}" for index in pair.split("-"))] = rate
        return found
