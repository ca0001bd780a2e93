"""Bytes of tensors that are alive, storage by storage: what an allocator would have given out."""

# mypy: allow-untyped-calls
from collections.abc import Iterable

import torch

from pipetune.bench.models.torch_private import StorageWeakRef, address_of

ROUND_BYTES = 512
"""CUDA's caching allocator gives out multiples of this."""


class LiveBytes:
    """Storages added so far, as long as they live; looks whether they do only where it matters."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[StorageWeakRef, int]] = {}
        self._most = 0
        """Bytes known, those among them that are gone since the last look."""
        self.peak = 0

    def knows(self, storage: int) -> bool:
        """Whether a living storage was added: its address is not used again while a weak reference to it is held."""
        return storage in self._known

    def add(self, tensors: Iterable[torch.Tensor]) -> int:
        """Adds storages that are new; returns their bytes."""
        added = 0
        for tensor in tensors:
            storage = tensor.untyped_storage()
            address = address_of(storage)
            if address not in self._known:
                size = -(-storage.nbytes() // ROUND_BYTES) * ROUND_BYTES
                self._known[address] = StorageWeakRef(storage), size
                added += size
        self._most += added
        if added and self._most > self.peak:
            self.peak = max(self.peak, self.now())
        return added

    def now(self) -> int:
        """Bytes alive."""
        self._known = {key: (ref, size) for key, (ref, size) in self._known.items() if not ref.expired()}
        self._most = sum(size for _, size in self._known.values())
        return self._most
