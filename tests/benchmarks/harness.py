"""Time and peak memory of a call, and a table of them. Benchmarks assert nothing.

Peak memory is the growth of the resident set over the call, read by a sampling thread (CPU), or the allocator's own
peak (CUDA). Quote no figure without the header that :func:`report` prints.
"""

from __future__ import annotations

import ctypes
import gc
import json
import platform
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import psutil
import torch

SHORTEST = 0.2
"""Seconds that the timed calls take together at least."""


@dataclass(frozen=True)
class Timing:
    """Median seconds and peak memory in MB (10^6 bytes) on top of what was allocated before the call."""

    name: str
    seconds: float
    peak_mb: float


class _PeakRSS(threading.Thread):
    """Samples the resident set every half millisecond until stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._process = psutil.Process()
        self._done = threading.Event()
        self.start_bytes = self.peak_bytes = self._process.memory_info().rss

    def run(self) -> None:
        while not self._done.wait(0.0005):
            self.peak_bytes = max(self.peak_bytes, self._process.memory_info().rss)

    def stop(self) -> float:
        self._done.set()
        self.join()
        return max(0, self.peak_bytes - self.start_bytes) / 1e6


def measure(name: str, call: Callable[[], object], repeat: int = 5, device: str = "cpu") -> Timing:
    """Run ``call`` once for memory, then ``repeat`` times, short ones more often, for the median time."""
    peak = peak_mb(call, device)
    seconds: list[float] = []
    while len(seconds) < repeat or sum(seconds) < SHORTEST:
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return Timing(name, median(seconds), peak)


def measure_in_turn(calls: Mapping[str, Callable[[], object]], repeat: int = 5, device: str = "cpu") -> list[Timing]:
    """Time forms that are close to each other: in turn, and on a CPU by the processor's time of this process.

    What else the machine does meanwhile then weighs on none of them more than on the others.
    """
    clock = time.perf_counter if device == "cuda" else time.process_time
    peaks = {name: peak_mb(call, device) for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    while any(len(own) < repeat or sum(own) < SHORTEST for own in seconds.values()):
        for name, call in calls.items():
            start = clock()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(clock() - start)
    return [Timing(name, median(own), peaks[name]) for name, own in seconds.items()]


def peak_mb(call: Callable[[], object], device: str) -> float:
    """MB that one call needs on top of what is there."""
    gc.collect()
    _return_freed_memory()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    sampler = _PeakRSS()
    sampler.start()
    call()
    return sampler.stop()


def _return_freed_memory() -> None:
    """Hand what the C library keeps of freed memory back to the system, else a later call seems to need none."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return  # another C library: later rows may read too low


def conditions(device: str = "cpu") -> dict[str, str]:
    """Commit, date, versions, device and threads: what a figure must be quoted with."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "commit": commit.stdout.strip() or "unknown",
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
        "threads": str(torch.get_num_threads()),
    }


def report(title: str, rows: Sequence[Timing], json_file: str | None = None, device: str = "cpu") -> None:
    """Print ``rows`` as a table under its conditions; with ``json_file`` also store them."""
    header = conditions(device)
    print(f"\n{title}   [{', '.join(f'{k} {v}' for k, v in header.items())}]")
    width = max(len(row.name) for row in rows)
    for row in rows:
        print(f"  {row.name:<{width}}  {row.seconds * 1e3:10.1f} ms  {row.peak_mb:10.1f} MB")
    if json_file is not None:
        content = {"title": title, "conditions": header, "rows": [asdict(row) for row in rows]}
        Path(json_file).write_text(json.dumps(content, indent=2) + "\n")
