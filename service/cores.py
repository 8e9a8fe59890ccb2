"""How many cores there are, and how the workers of one host share them."""

import os
from collections.abc import MutableMapping
from pathlib import Path

_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def count_cores(quota: Path = _QUOTA) -> int:
    """Return how many cores this process may use: its affinity, and its container's quota."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        used, period = quota.read_text().split()
        limit = int(used) // int(period)
    except (OSError, ValueError):  # no container, or one without a quota: "max"
        return allowed or 1
    return max(1, min(allowed or 1, limit))


def share_cores(workers: int, environ: MutableMapping[str, str] = os.environ) -> None:
    """Give each of ``workers`` its part of the cores, unless OMP_NUM_THREADS says otherwise.

    Threads that spin for the same core slow each other down many times over. It must be said
    before torch is imported, and the worker processes inherit it.
    """
    environ.setdefault("OMP_NUM_THREADS", str(max(1, count_cores() // workers)))
