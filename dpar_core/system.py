"""What the operating system says about this process. Linux and macOS answer differently; this is the one place to ask."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

_STATM = Path("/proc/self/statm")  # Linux


def cpus() -> int:
    """Return the number of CPUs that this process may use; all of the machine where the system cannot restrict them."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def resident_bytes() -> int:
    """Return the memory that this process holds now, in bytes; without /proc (macOS) the most it has held so far."""
    try:
        return int(_STATM.read_text("utf-8").split()[1]) * os.sysconf("SC_PAGESIZE")
    except (OSError, ValueError, IndexError):
        import resource

        largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return largest if sys.platform == "darwin" else largest * 1024


def open_files_limit() -> int:
    """Return how many files this process may hold open."""
    import resource

    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


def is_x86() -> bool:
    """Return whether the CPU is an x86-64 one, for which oneDNN's packed matrices were measured to keep rows independent."""
    return platform.machine().lower() in ("x86_64", "amd64")
