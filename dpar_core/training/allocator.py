"""How glibc treats large blocks that a training step frees: kept for the next step, not handed back to the system.

By default blocks of over 32 MB, as logits and their gradients are, come fresh from the system at every step, and each of
their pages is cleared at its first touch: a fifth of a training step at size B on two cores (docs/log.md). Other C libraries
ignore all of this.
"""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGEST_KEPT = 1 << 30  # bytes of a block; larger ones are still handed back
NEVER_TRIM = (1 << 31) - 1

# For processes that are yet to be started. One arena: only the first can hold such blocks, and Ray trains in a thread.
ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": str(LARGEST_KEPT),
    "MALLOC_TRIM_THRESHOLD_": str(NEVER_TRIM),
    "MALLOC_ARENA_MAX": "1",
}


def keep_freed_blocks() -> bool:
    """Let the main thread of this process keep its freed blocks; return whether the C library has such a switch."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)) and bool(mallopt(M_TRIM_THRESHOLD, NEVER_TRIM))
