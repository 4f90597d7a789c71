"""How much memory a process holds: what C and C++ do, tensors and graphs among it, and the pages of all."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import pytest

COUNTS = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")


class _Heap(ctypes.Structure):
    """What glibc's mallinfo2 tells, in bytes."""

    _fields_ = [(name, ctypes.c_size_t) for name in COUNTS]


def bytes_in_use() -> int:
    """Bytes in use, garbage included; the test is skipped where the C library does not tell."""
    try:
        tell = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError, TypeError):
        pytest.skip("the C library does not tell what is in use")
    tell.restype = _Heap
    heap = tell()
    return heap.uordblks + heap.hblkhd


@dataclass
class Growth:
    """By how many MB the resident set has grown at most."""

    mb: float = 0.0


@contextmanager
def peak_growth() -> Iterator[Growth]:
    """Watch the resident set of this process while the block runs."""
    process, growth, done = psutil.Process(), Growth(), threading.Event()
    start = process.memory_info().rss

    def watch() -> None:
        while not done.wait(0.02):
            growth.mb = max(growth.mb, (process.memory_info().rss - start) / 1e6)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield growth
    finally:
        done.set()
        thread.join()
