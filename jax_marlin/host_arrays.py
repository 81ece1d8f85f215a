"""Loader arguments as NumPy arrays: takes JAX and torch, refuses tracers, splits by expert."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

_ALIGNMENT = 64  # bytes; what XLA's CPU client asks of a host buffer to take it over without a copy


def host_array(value: Any, name: str, where: str) -> np.ndarray:
    """`value` as a NumPy array, without a copy where its owner allows.

    Args:
        value: a NumPy, JAX or torch array, or anything that `np.asarray` takes.
        name: the argument, for messages.
        where: the function or module that errors are reported for.

    Raises:
        TypeError: a tracer, or something that does not become an array, say rows of unequal length.

    >>> host_array([1, 2], "g_idx", "example").shape
    (2,)
    """
    if isinstance(value, Tracer):
        raise TypeError(
            f"{where}: {name} is traced (inside jax.jit, grad, vmap or scan), expected a concrete "
            "array; weights are packed on the host, so load them outside and pass the result in"
        )
    try:
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        # torch has no NumPy form of bfloat16 tensors; JAX reads them through DLPack
        if not hasattr(value, "__dlpack__"):
            raise TypeError(f"{where}: {name} does not become a NumPy array: {error}") from error
    return np.asarray(jnp.from_dlpack(value))


def float_array(value: Any, name: str, dtype: np.dtype | None, where: str) -> np.ndarray:
    """`host_array`, with float64 cast to the compute dtype, which must then be given.

    Raises:
        TypeError: float64 without `dtype`, or as `host_array`.
        ValueError: a finite value overflows `dtype`.
    """
    array = host_array(value, name, where)
    if array.dtype != np.float64:
        return array
    if dtype is None:
        raise TypeError(
            f"{where}: {name} has dtype float64, expected float16, bfloat16 or float32; pass "
            "dtype= to have it rounded"
        )
    with np.errstate(over="ignore", under="ignore"):
        cast = array.astype(dtype)
    if bool((np.isfinite(array) & ~np.isfinite(cast)).any()):
        raise ValueError(
            f"{where}: {name} up to {np.abs(array[np.isfinite(array)]).max():g} overflow {dtype}; "
            "use dtype=bfloat16 or float32"
        )
    return cast


def count_experts(value: Any, name: str, where: str) -> int:
    """Entries of a list, or the leading axis of an array; a ValueError where there are none."""
    if isinstance(value, (list, tuple)):
        count = len(value)
    else:
        shape = np.shape(value)
        count = shape[0] if shape else 0
    if count < 1:
        raise ValueError(
            f"{where}: {name} holds no experts, expected a list with one array an expert, or an "
            "array with a leading expert axis"
        )
    return count


def per_expert(value: Any, name: str, num_experts: int, where: str) -> Iterable[Any]:
    """The entries of `value` one by one, so that one expert at a time crosses to the host.

    Args:
        value: None (gives None for each expert), a list of E, or an array with a leading E.
        name: the argument, for messages.
        num_experts: E.
        where: the function that errors are reported for.

    Raises:
        ValueError: not E entries.
    """
    if value is None:
        return (None for _ in range(num_experts))
    count = count_experts(value, name, where)
    if count != num_experts:
        raise ValueError(
            f"{where}: {name} has {count} entries, expected one an expert: {num_experts}"
        )
    return (value[expert] for expert in range(num_experts))


def aligned_zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Zeros with an aligned first byte; the system provides each page when it is written."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.zeros(size + _ALIGNMENT, np.uint8)
    offset = -raw.ctypes.data % _ALIGNMENT
    return raw[offset : offset + size].view(dtype).reshape(shape)
