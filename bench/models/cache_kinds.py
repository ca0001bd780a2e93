"""Kinds of cache layer that some versions of transformers lack; there no cache layer is of such a kind."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers.cache_utils import DummyLayer
else:
    try:
        from transformers.cache_utils import DummyLayer
    except ImportError:

        class DummyLayer:
            """Stands where a model keeps nothing for a layer."""


__all__ = ["DummyLayer"]
