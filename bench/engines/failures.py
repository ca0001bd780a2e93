"""What an engine's words and exit codes amount to, as kinds of failure with a remedy. Pure."""

import re
import signal

from pipetune.bench.record import REMEDIES, FailureKind

_REASONS = (
    (
        FailureKind.OVER_MEMORY_CAP,
        r"No available memory for the cache blocks|larger than the available KV cache memory"
        r"|less than requested memory for kv|less than desired CPU memory|(?i:increase|raise) --mem-fraction-static",
        "give it a larger kv_cache_memory_bytes or memory_fraction, or the stage fewer layers",
    ),
    (
        FailureKind.OUT_OF_MEMORY,
        r"out of memory|MemoryError|not enough memory|Cannot allocate memory",
        "give the stage fewer layers, or lower kv_cache_memory_bytes or max_num_batched_tokens",
    ),
    (
        FailureKind.UNSUPPORTED_MODEL,
        r"Model architectures .* not supported|Unsupported model|is not supported for now|does not support pipeline",
        "choose another model, or pipetune's own runtime",
    ),
)
_ERROR = re.compile(r"\b\w*(?:Error|Exception): .+")


def reason_of(error: str, log: str) -> tuple[FailureKind, str]:
    """Kind and words of an error: engines tell the cause in their log, and their callers often nothing of it."""
    lines = (*error.splitlines(), *reversed(log.splitlines()))
    for kind, pattern, remedy in _REASONS:
        for line in lines:
            if re.search(pattern, line):
                found = _ERROR.search(line)
                return kind, f"{found[0] if found else line.strip()}; {remedy}"
    causes = [found[0] for line in log.splitlines() if (found := _ERROR.search(line)) and found[0] not in error]
    # The first error of a worker is the cause, and those of others follow from it.
    cause = f" ({causes[0]})" if causes else ""
    return FailureKind.WORKER_ERROR, f"{error}{cause}; {REMEDIES[FailureKind.WORKER_ERROR]}"


def died(code: int, phase: str, *, by_kernel: bool) -> tuple[FailureKind, str]:
    """Kind and words of a process's end; `by_kernel` if the kernel killed one for memory meanwhile."""
    if code >= 0:
        return FailureKind.WORKER_DIED, f"exited with code {code} during {phase}"
    name = signal.Signals(-code).name
    if by_kernel:
        text = f"was killed by {name} during {phase}: the host ran out of memory; {REMEDIES[FailureKind.OUT_OF_MEMORY]}"
        return FailureKind.OUT_OF_MEMORY, text
    return FailureKind.WORKER_DIED, f"was killed by {name} during {phase}"
