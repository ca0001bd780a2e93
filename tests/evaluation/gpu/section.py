"""One section in a process of its own: whatever it does to CUDA or to memory goes with it."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from tests.evaluation.gpu.context import Context, SkippedError


def _machine(context: Context) -> None:
    from tests.evaluation.gpu import machine

    machine.run(context)


def _memory(context: Context) -> None:
    from tests.evaluation.gpu import memory

    memory.run(context)


def _timing(context: Context) -> None:
    from tests.evaluation.gpu import timing

    timing.run(context)


def _equality(dtype: str, transport: str) -> Callable[[Context], None]:
    def work(context: Context) -> None:
        from tests.evaluation.gpu import equality

        only = os.environ.get("PIPETUNE_GPU_FAMILIES", "").split()
        equality.run(context, "float32" if dtype == "fp32" else "bfloat16", transport, only)

    return work


def _decode(which: str) -> Callable[[Context], None]:
    def work(context: Context) -> None:
        from tests.evaluation.gpu import decode

        decode.run(context, which)

    return work


SECTIONS: dict[str, Callable[[Context], None]] = {
    "machine": _machine,
    "equality-staged-fp32": _equality("fp32", "host staging"),
    "equality-staged-bf16": _equality("bf16", "host staging"),
    "equality-nccl-fp32": _equality("fp32", "nccl"),
    "equality-nccl-bf16": _equality("bf16", "nccl"),
    "memory": _memory,
    "timing": _timing,
    "decode-small": _decode("small"),
    "decode-large": _decode("large"),
}


def main(arguments: list[str] | None = None) -> int:
    """Runs one section and writes what came of it; 1 if it failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.evaluation.gpu.section")
    parser.add_argument("name", choices=SECTIONS)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    args = parser.parse_args(arguments)
    context = Context(args.name, args.folder, args.seconds)
    try:
        SECTIONS[args.name](context)
    except SkippedError as reason:
        context.end("skipped", str(reason))
        return 0
    # The check goes on with the other sections, and the report says what this one died of.
    except Exception:
        context.end("failed", traceback.format_exc()[-4000:])
        return 1
    context.end()
    return 0


if __name__ == "__main__":
    sys.exit(main())
