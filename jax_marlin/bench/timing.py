"""Times one operation as a model runs it: many calls in a program, programs queued on the device.

A program's start costs the host as much as ten small calls cost the device. Where programs follow
each other the device does not wait for it, so neither does the clock here.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

_WARM_UP = 3  # compile, record command buffers, settle the clocks
_FEWEST = 5  # runs
_QUEUED = 10  # programs of a run, at most
_RUN_SECONDS = 0.03  # of fewer programs, where they are long


def microseconds(
    operation: Callable[..., jax.Array],
    operands: Sequence[tuple[Any, ...]],
    *,
    runs: int = 20,
    max_seconds: float = 1.0,
) -> float:
    """The time of one call on the device.

    A run queues several programs behind a first one; the time of the first alone is subtracted:
    dispatch, the device's start and the last synchronisation.

    Args:
        operation: called once with each element of `operands`; returns one array.
        operands: pytrees of arrays, one tuple a call. Repeated arrays are separate parameters of
            the program, so that XLA cannot merge two calls.
        runs: how many runs, of which the median counts.
        max_seconds: stop early after this long, with five runs at least.

    Returns:
        Microseconds a call.
    """

    @jax.jit
    def program(operands):
        results = [operation(*one) for one in operands]
        # Behind the barrier, so that XLA does not compute single elements of its own products.
        results = jax.lax.optimization_barrier(results)
        # All results are used, by one small kernel; returning them would time their allocation.
        return jnp.stack([result[(0,) * result.ndim] for result in results])

    def seconds(programs: int) -> float:
        started = time.perf_counter()
        last = [program(operands) for _ in range(programs)][-1]
        jax.block_until_ready(last)
        return time.perf_counter() - started

    operands = list(operands)
    alone = min(seconds(1) for _ in range(_WARM_UP))
    queued = max(1, min(_QUEUED, int(_RUN_SECONDS / alone)))
    samples: list[float] = []
    deadline = time.perf_counter() + max_seconds
    while len(samples) < _FEWEST or (len(samples) < runs and time.perf_counter() < deadline):
        first = seconds(1)
        samples.append((seconds(1 + queued) - first) / queued)
    # Positive, even if a call on a CPU takes no longer than the clock's noise.
    return max(statistics.median(samples), 1e-9) / len(operands) * 1e6
