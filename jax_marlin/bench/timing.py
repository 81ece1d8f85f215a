"""Times one operation as a model runs it: many calls in a program, with the device as the bound.

Starting a program costs the host as much as ten small calls cost the device, and more with every
operand. Two runs of one program that go round a loop a different number of times start alike, so
that what their times differ by is calls alone.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

_LOOP_MICROSECONDS = 8000  # of the inner loop at least, on a GPU
_CPU_ROUNDS = 2  # a CPU has no host to wait for
_REPEATS = (1, 3)  # of the inner loop: the two runs that are compared
_FEWEST = 3  # pairs of runs


def microseconds(
    operation: Callable[..., Any],
    operands: Sequence[tuple[Any, ...]],
    *,
    expected_us: float,
    runs: int = 20,
    max_seconds: float = 0.5,
) -> float:
    """The time of one call on the device.

    Args:
        operation: called once with each element of `operands`; returns arrays.
        operands: pytrees of arrays, one tuple a call. Repeated arrays are separate parameters of
            the program, so that XLA cannot merge two calls.
        expected_us: microseconds that a call takes at least, its floor for instance; decides how
            many of them a run has.
        runs: how many pairs of runs, of which the median counts.
        max_seconds: stop early after this long, with three pairs at least.

    Returns:
        Microseconds a call.
    """
    operands = list(operands)
    rounds = rounds_for(len(operands), expected_us)
    program = looped(operation, rounds)
    short, long = (jnp.int32(repeats) for repeats in _REPEATS)

    def seconds(repeats: jax.Array) -> float:
        started = time.perf_counter()
        jax.block_until_ready(program(repeats, operands))
        return time.perf_counter() - started

    seconds(short)  # compiles, records command buffers
    seconds(long)  # settles the clocks
    samples: list[float] = []
    deadline = time.perf_counter() + max_seconds
    while len(samples) < _FEWEST or (len(samples) < runs and time.perf_counter() < deadline):
        first = seconds(short)
        samples.append(seconds(long) - first)
    # Positive, even if a call on a CPU takes no longer than the clock's noise.
    calls = (_REPEATS[1] - _REPEATS[0]) * rounds * len(operands)
    return max(statistics.median(samples), 1e-9) / calls * 1e6


def rounds_for(calls: int, expected_us: float) -> int:
    """How often so many calls follow each other without a look at the device."""
    if jax.default_backend() == "cpu":
        return _CPU_ROUNDS
    return max(1, math.ceil(_LOOP_MICROSECONDS / (calls * expected_us)))


def looped(operation: Callable[..., Any], rounds: int) -> Callable[..., jax.Array]:
    """A program that calls `operation` `repeats * rounds` times with each of its operands.

    The inner loop's trip count is static. XLA enqueues the body of such a loop again and again
    without a look at the device, and records its calls in one command buffer (a CUDA graph), whose
    commands follow each other. The outer one's is an argument, so that one compilation serves every
    length: before each of its turns XLA copies the predicate to the host while the device idles,
    which is why an inner loop lasts milliseconds.

    Args:
        operation: returns arrays.
        rounds: trip count of the inner loop.

    Returns:
        `program(repeats, operands)`: int32 `[]` and a list of tuples to float32 `[results]`, the
        sum of the first element of each array that each call returned.
    """

    def one_round(operands, total):
        done: list[Any] = [total]
        for one in operands:
            # A call has its operands only when the call before it is done, or the round before: no
            # call is the same in each round, which would let XLA take it out of the loop, no two
            # are alike, and none begins early. A barrier is no work for the device.
            one, done[-1] = jax.lax.optimization_barrier((one, done[-1]))
            done.append(operation(*one))
        # Behind the barrier, so that XLA does not compute single elements of its own products.
        total, *results = jax.lax.optimization_barrier(done)
        # All results are used, by one small kernel a round.
        firsts = [a[(0,) * a.ndim].astype(jnp.float32) for a in jax.tree.leaves(results)]
        return total + jnp.stack(firsts)

    @jax.jit
    def program(repeats, operands):
        def inner(_, total):
            return jax.lax.fori_loop(0, rounds, lambda _, t: one_round(operands, t), total)

        results = jax.tree.leaves(jax.eval_shape(operation, *operands[0]))
        zeros = jnp.zeros(len(operands) * len(results), jnp.float32)
        return jax.lax.fori_loop(0, repeats, inner, zeros)

    return program
