"""Decides what to measure and what it means; knows nothing of torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tuner.planning.auto_split import auto_split_model

__all__ = ["auto_split_model"]


def __getattr__(name: str) -> Any:
    # Loaded when asked for, so that the command line need not wait for it.
    if name == "auto_split_model":
        from tuner.planning.auto_split import auto_split_model

        return auto_split_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
