"""The inverse of packing: one expert of a stack, or one linear, back in plain order on the host."""

from __future__ import annotations

import jax
import numpy as np
from jax.core import Tracer

from jax_marlin import layout
from jax_marlin.canonical import CanonicalLinear, is_identity
from jax_marlin.weights import MarlinLinear


def unpack_linear(w: MarlinLinear, where: str = "unpack_linear") -> CanonicalLinear:
    """What `w` was packed from: codes, scales, zero points, row order and bias; host work.

    Args:
        w: a linear, or an expert `stack[e]`, with concrete leaves.
        where: the function or module that errors are reported for.

    Returns:
        A `CanonicalLinear` of shape (K, n) with exactly the codes that the leaves hold.

    Raises:
        TypeError: called under `jax.jit`, where leaves have no values.

    >>> import jax_marlin as jm, numpy as np
    >>> w = jm.quantize(np.linspace(-0.7, 0.7, 64 * 96).reshape(64, 96), dtype="float32")
    >>> unpack_linear(w).shape
    (64, 96)
    """
    stack, spec = w.stack, w.stack.held_spec
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(w)):
        raise TypeError(
            f"{where}: the weight is traced (inside jax.jit, grad, vmap or scan), expected arrays "
            "with values; call it outside"
        )
    expert = min(max(int(w.expert), 0), stack.num_experts - 1)  # clamped, as everywhere
    start, stop = w.held_columns
    n, tiles = stop - start, slice(start // layout.TILE, -(-stop // layout.TILE))

    def grouped(leaf: jax.Array) -> np.ndarray:  # [n_tiles, G, 64] to [G, n]
        columns = layout.unpack_columns(np.asarray(leaf[expert, tiles]))[:, :n]
        return layout.unpair_columns(columns, spec.pairs)

    codes = layout.unpack_tiles(np.asarray(stack.qweight[expert, tiles]), spec.bits)
    perm = None if stack.perm is None else np.asarray(stack.perm[expert])
    bias = w.bias
    if bias is None and stack.bias is not None:
        bias = stack.bias[expert, start:stop]
    return CanonicalLinear.from_codes(
        layout.unpair_columns(codes[: spec.k, :n], spec.pairs),
        grouped(stack.scales),
        None if stack.zero_points is None else grouped(stack.zero_points).astype(np.uint8),
        None if is_identity(perm) else perm,
        None if bias is None else layout.unpair_columns(np.asarray(bias), spec.pairs),
        bits=spec.bits,
    )
