"""Threads that read and pack experts side by side: NumPy lets go of the interpreter's lock."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

T = TypeVar("T")
_MOST = 8  # beyond, threads wait for the interpreter's lock, and each holds one expert's tensors


@functools.cache
def _keep_freed_memory() -> None:
    """Has glibc reuse blocks of some megabytes, once a process.

    At first it maps each from the system and gives it back, and the page faults of new ones take as
    long as packing does. It keeps those up to the size of the largest mapped block ever freed,
    32 MiB at most; this one is never touched. Other allocators take no notice.
    """
    np.empty(31 << 20, np.uint8)


def thread_count() -> int:
    """Threads of `in_threads`, where there are as many items."""
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    return min(count, _MOST)


def in_threads(work: Callable[[T], object], items: Sequence[T]) -> Iterator[T]:
    """Does `work` for all items, a few at a time, and yields each that is done, in order.

    Raises:
        Exception: what `work` raises for the first item for which it does; no further one begins.

    >>> list(in_threads(str, range(3)))
    [0, 1, 2]
    """
    _keep_freed_memory()
    count = min(thread_count(), len(items))
    if count < 2:
        for item in items:
            work(item)
            yield item
        return
    with ThreadPoolExecutor(count, "jax_marlin") as pool:
        for item, _ in zip(items, pool.map(work, items), strict=True):
            yield item
