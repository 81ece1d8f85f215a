"""The floor: what this device needs at least for the bytes and the arithmetic of a problem."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jax_marlin.bench.problems import random_key
from jax_marlin.bench.timing import microseconds

_CALLS = 4


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What the device can do.

    Attributes:
        bandwidth: bytes/s read from memory.
        flops: multiplications and additions per second of a large matmul.
    """

    bandwidth: float
    flops: float


NOMINAL = Ceilings(bandwidth=3.35e12, flops=9.9e14)  # of an H100, by its data sheet


def floor_microseconds(num_bytes: float, flops: float, ceilings: Ceilings) -> tuple[float, str]:
    """The larger of the two times, and which it is.

    Args:
        num_bytes: packed weight bytes that must be read.
        flops: multiplications and additions.
        ceilings: of the device.

    Returns:
        (microseconds, "bandwidth" or "compute").
    """
    read, compute = num_bytes / ceilings.bandwidth * 1e6, flops / ceilings.flops * 1e6
    return (read, "bandwidth") if read >= compute else (compute, "compute")


def measure_bandwidth() -> float:
    """Bytes/s of a sum over an array far larger than any cache."""
    side = 4096 if jax.default_backend() == "cpu" else 16384  # 64 MiB, 1 GiB
    array = jnp.ones((side, side), jnp.float32)
    expected, _ = floor_microseconds(array.nbytes, 0, NOMINAL)
    us = microseconds(lambda a: jnp.sum(a, axis=1), [(array,)] * _CALLS, expected_us=expected)
    return array.nbytes / us * 1e6


def measure_flops(dtype: DTypeLike) -> float:
    """Multiplications and additions per second of XLA's large square matmul in `dtype`."""
    side = 512 if jax.default_backend() == "cpu" else 8192
    # Random values: constant ones draw less power, and clocks rise.
    a, b = (jax.random.normal(key, (side, side), dtype) for key in jax.random.split(random_key(0)))
    flops = 2 * side**3
    expected, _ = floor_microseconds(0, flops, NOMINAL)
    return flops / microseconds(jnp.dot, [(a, b)] * _CALLS, expected_us=expected) * 1e6
