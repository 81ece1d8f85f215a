"""Times one operation: many calls in one jitted program, so that dispatch does not count."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

_WARM_UP = 3  # compile, record command buffers, settle the clocks
_FEWEST = 5


def microseconds(
    operation: Callable[..., jax.Array],
    operands: Sequence[tuple[Any, ...]],
    *,
    runs: int = 20,
    max_seconds: float = 1.0,
) -> float:
    """The time of one call on the device.

    A program that makes no call but has the same operands and the same last kernel is timed too,
    and its fastest run subtracted: that is the cost of dispatch, operands and synchronisation.

    Args:
        operation: called once with each element of `operands`; returns one array.
        operands: pytrees of arrays, one tuple a call, an array first. Repeated arrays are separate
            parameters of the program, so that XLA cannot merge two calls.
        runs: runs of the program, of which the median counts.
        max_seconds: stop early after this long, with five runs at least.

    Returns:
        Microseconds a call.
    """
    overhead = min(_samples(lambda first, *_: first, operands, runs, max_seconds))
    total = statistics.median(_samples(operation, operands, runs, max_seconds))
    # Positive, even if a call on a CPU takes no longer than the clock's noise.
    return max(total - overhead, 1e-9) / len(operands) * 1e6


def _samples(operation, operands, runs, max_seconds) -> list[float]:
    """Seconds of each run of the whole program."""

    def program(operands):
        results = [operation(*one) for one in operands]
        # Behind the barrier, so that XLA does not compute single elements of its own products.
        results = jax.lax.optimization_barrier(results)
        # All results are used, by one small kernel; returning them would time their allocation.
        return jnp.stack([result[(0,) * result.ndim] for result in results])

    # keep_unused: the program that makes no call takes all the operands, too
    compiled = jax.jit(program, keep_unused=True)
    operands = list(operands)
    for _ in range(_WARM_UP):
        jax.block_until_ready(compiled(operands))
    samples: list[float] = []
    deadline = time.perf_counter() + max_seconds
    while len(samples) < _FEWEST or (len(samples) < runs and time.perf_counter() < deadline):
        started = time.perf_counter()
        jax.block_until_ready(compiled(operands))
        samples.append(time.perf_counter() - started)
    return samples
