"""Clocks, memory, and the machine they were read on."""

import itertools
import os
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import nn


def machine() -> str:
    """Return one line: processor, cores, threads used, torch, and how busy it was before."""
    cpuinfo = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    processor = models[0] if models else platform.processor() or platform.machine()
    return (
        f"{processor}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, load {os.getloadavg()[0]:.1f}"
    )


def seconds_of(call: Callable[[], object], limit: float = 3.0) -> float:
    """Return the median seconds of a call, after one to warm up: 3 to 50 calls, until ``limit``."""
    call()
    taken: list[float] = []
    while len(taken) < 3 or (sum(taken) < limit and len(taken) < 50):
        started = time.perf_counter()
        call()
        taken.append(time.perf_counter() - started)
    return median(taken)


class _Enough(Exception):
    """Thrown out of a training that has been watched for long enough."""


def seconds_per_step(training: Callable[[], object], model: nn.Module, limit: float) -> float:
    """Run ``training``, time its steps from one pass of ``model`` to the next, and stop it.

    Returns the median of at least 3 steps after 2 to warm up. What is done once an epoch falls
    between two passes too, but seldom enough not to touch the median.
    """
    moments: list[float] = []

    def note(*_: object) -> None:
        moments.append(time.perf_counter())
        if len(moments) > 5 and moments[-1] - moments[0] > limit:
            raise _Enough

    hook = model.register_forward_pre_hook(note)
    try:
        training()
    except _Enough:
        pass
    finally:
        hook.remove()
    steps = [later - earlier for earlier, later in itertools.pairwise(moments)]
    return median(steps[2:])


class PeakMemory:
    """The most memory that a process takes beyond what it holds now. Linux only."""

    def __init__(self) -> None:
        self._held = _status("VmRSS")
        if self._held is not None:
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far

    def mib(self) -> float | None:
        """Return MiB, None where the system does not say."""
        peak = _status("VmHWM")
        return None if self._held is None or peak is None else (peak - self._held) / 1024


def _status(name: str) -> int | None:
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    found = re.search(rf"{name}:\s*(\d+) kB", status.read_text())
    return int(found[1]) if found else None
