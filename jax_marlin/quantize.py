"""`quantize`: round-to-nearest from dense weights to packed ones."""

from __future__ import annotations

from typing import Any

import numpy as np
from jax.typing import DTypeLike

from jax_marlin.canonical import SCALE_DTYPES, CanonicalLinear
from jax_marlin.host_arrays import host_array
from jax_marlin.linear import compute_dtype
from jax_marlin.quant_spec import QuantSpec
from jax_marlin.stack_builder import StackBuilder

_COLUMNS_AT_ONCE = 512  # bounds the float64 temporaries


def quantize(
    w: Any,
    *,
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = True,
    dtype: DTypeLike | None = None,
) -> Any:
    """Packs dense weights, each element to the nearest code; host work, one expert at a time.

    The error of an element is at most half the scale of its group and column: scales are rounded up
    to `dtype`, so that the largest element still has a code. Calibrated methods (GPTQ, AWQ) lose
    less of a model; this serves tests, benchmarks and weights that nobody has quantized.

    Args:
        w: floats [K, N], or [E, K, N]; a NumPy, JAX or torch array.
        bits: 4 or 8.
        group_size: rows of K that share a scale: a multiple of 32, K, or -1 for one group.
        symmetric: True puts zero in the middle of the codes, with a scale of max(|w|) / 7 (127 at 8
            bit); False fits scale and zero point to [min(w, 0), max(w, 0)].
        dtype: compute dtype, float16, bfloat16 or float32; None keeps that of `w`.

    Returns:
        A `MarlinLinear` of shape (K, N), or a `MarlinExpertStack` of shape (E, K, N).

    Raises:
        TypeError: `w` is traced or holds no floats, or it is float64 and `dtype` is not given.
        ValueError: a wrong rank or size, weights that are not finite, scales that overflow `dtype`.
        NotImplementedError: 2, 3, 5, 6 or 7 bits.

    >>> import jax_marlin as jm, numpy as np
    >>> dense = np.linspace(-0.7, 0.7, 64 * 96, dtype=np.float32).reshape(64, 96)
    >>> w = jm.quantize(dense, group_size=32)
    >>> w.shape, bool(abs(dense - w.dequantize()).max() <= 0.05 * 1.001)
    ((64, 96), True)
    """
    where = "quantize"
    if not isinstance(symmetric, (bool, np.bool_)):
        raise TypeError(f"{where}: symmetric is {symmetric!r}, expected True or False")
    shape = np.shape(w)
    if len(shape) not in (2, 3) or 0 in shape:
        raise ValueError(f"{where}: w has shape {shape}, expected (K, N) or (E, K, N)")
    spec = QuantSpec.create(bits=bits, group_size=group_size, k=shape[-2], n=shape[-1], where=where)
    experts = w if len(shape) == 3 else [w]
    target = _target_dtype(host_array(experts[0], "w", where).dtype, dtype, where)
    builder = StackBuilder(len(experts), spec, target)
    for expert in range(len(experts)):
        at = where if len(shape) == 2 else f"{where}: expert {expert}"
        dense = host_array(experts[expert], "w", at)
        if not np.isfinite(dense).all():
            raise ValueError(f"{at}: w holds values that are not finite")
        builder.set_expert(expert, _round_to_nearest(dense, spec, bool(symmetric), target, at), at)
    stack = builder.finish()
    return stack if len(shape) == 3 else stack[0]


def _target_dtype(found: np.dtype, dtype: DTypeLike | None, where: str) -> np.dtype:
    """The compute dtype: the one asked for, else that of the weights."""
    if found not in (*SCALE_DTYPES, np.dtype(np.float64)):
        raise TypeError(f"{where}: w has dtype {found}, expected float16, bfloat16 or float32")
    if dtype is not None:
        return compute_dtype(dtype, where)
    if found == np.float64:
        raise TypeError(f"{where}: w has dtype float64; pass dtype= float16, bfloat16 or float32")
    return found


def _round_to_nearest(
    dense: np.ndarray, spec: QuantSpec, symmetric: bool, dtype: np.dtype, where: str
) -> CanonicalLinear:
    """[K, N] floats to codes, scales and zero points; float64 for a block of columns at a time."""
    groups, rows = spec.num_groups, spec.group_size
    codes = np.empty((spec.k, spec.n), np.uint8)
    scales = np.empty((groups, spec.n), dtype)
    zero_points = np.empty((groups, spec.n), np.uint8)
    middle, largest = spec.symmetric_zero_point, 2**spec.bits - 1
    for start in range(0, spec.n, _COLUMNS_AT_ONCE):
        columns = slice(start, start + _COLUMNS_AT_ONCE)
        block = dense[:, columns].astype(np.float64)
        # a short last group is filled with zeros, which every range below contains anyway
        block = np.pad(block, ((0, groups * rows - spec.k), (0, 0)))
        block = block.reshape(groups, rows, -1)  # [G, group_size, columns]
        low = np.minimum(block.min(axis=1), 0.0)  # [G, columns]
        high = np.maximum(block.max(axis=1), 0.0)
        if symmetric:
            exact = np.maximum(high, -low) / (middle - 1)
        else:
            exact = high / largest - low / largest
        scale = _round_up(exact, dtype, where)
        scales[:, columns] = scale
        divisor = np.where(scale == 0, 1.0, scale.astype(np.float64))  # a group of zeros
        zero = np.full(low.shape, middle) if symmetric else np.rint(-low / divisor)
        zero_points[:, columns] = zero
        q = np.rint(block / divisor[:, None]) + zero[:, None]
        codes[:, columns] = np.clip(q, 0, largest).reshape(groups * rows, -1)[: spec.k]
    zeros = None if symmetric else zero_points
    return CanonicalLinear.from_codes(codes, scales, zeros, bits=spec.bits)


def _round_up(exact: np.ndarray, dtype: np.dtype, where: str) -> np.ndarray:
    """float64 scales >= 0 to the next value of `dtype` that is not below; zero stays zero.

    Rounding to nearest would leave the largest element beyond the last code, by far where a scale
    is subnormal in float16.
    """
    exact = np.where(exact > 0, np.maximum(exact, np.finfo(np.float32).tiny), 0.0)
    with np.errstate(over="ignore", under="ignore"):
        scale = exact.astype(dtype)
        scale = np.where(scale < exact, np.nextafter(scale, dtype.type(np.inf)), scale)
    if not np.isfinite(scale).all():
        raise ValueError(
            f"{where}: scales up to {exact.max():g} overflow {dtype}; use dtype=bfloat16 or float32"
        )
    return scale
