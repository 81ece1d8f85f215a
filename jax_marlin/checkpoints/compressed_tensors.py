"""compressed-tensors, pack-quantized: shapes of the stored tensors, and their canonical form.

A linear W [K, N] is stored so, P = 32 / bits codes in a word, G = ceil(K / group_size):

    weight_packed      int32 [N, ceil(K / P)]   P neighbours along K in a word, first lowest
    weight_scale       float [N, G]
    weight_zero_point  int32 [ceil(N / P), G]   P neighbours along N in a word, first lowest
    weight_shape       int64 [2]                N, K
    weight_g_idx       int32 [K]                group of each row (act-order); -1: not used

Codes and zero points are signed numbers of which 2**(bits - 1) was added before packing, so that
with both unsigned

    W[k, n] = weight_scale[n, g] * (q[n, k] - z[n, g]),  g = weight_g_idx[k] or k // group_size

and a symmetric module has z = 2**(bits - 1) everywhere. Transposed, these are GPTQ's tensors with
zero points stored as they are (`gptq_v2`).

Source: `compressors/pack_quantized/` of vllm-project/compressed-tensors.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from jax_marlin.canonical import CanonicalLinear
from jax_marlin.checkpoints.module_format import (
    INDICES,
    SCALES,
    WORDS,
    Format,
    Layout,
    Read,
    two_axes,
)
from jax_marlin.checkpoints.quantize_config import ModuleQuantization
from jax_marlin.checkpoints.safetensors_header import TensorInfo
from jax_marlin.gptq_format import gptq_to_canonical


def _layout(
    parts: Mapping[str, TensorInfo], quantization: ModuleQuantization, read: Read, where: str
) -> Layout:
    n, _ = two_axes(parts["weight_packed"], "weight_packed", "(N, K * bits / 32)", where)
    k = _stated_k(parts, n, read, where)
    bits, groups = quantization.bits, quantization.num_groups(k)
    if quantization.desc_act and groups > 1 and "weight_g_idx" not in parts:
        raise ValueError(
            f"{where}: actorder is 'group' but there is no weight_g_idx to say which row is of "
            f"which group; is a shard missing?"
        )
    if quantization.symmetric is False and "weight_zero_point" not in parts:
        raise ValueError(
            f"{where}: symmetric is false but there is no weight_zero_point; is a shard missing?"
        )
    return Layout(k, n, {
        "weight_packed": (WORDS, (n, -(-k * bits // 32))),
        "weight_scale": (SCALES, (n, groups)),
        "weight_zero_point": (WORDS, (-(-n * bits // 32), groups)),
        "weight_shape": (INDICES, (2,)),
        "weight_g_idx": (INDICES, (k,)),
        "bias": (SCALES, (n,)),
    })  # fmt: skip


def _stated_k(parts: Mapping[str, TensorInfo], n: int, read: Read, where: str) -> int:
    """K out of weight_shape, the one small tensor that is read to know a shape."""
    info = parts.get("weight_shape")
    if info is None:
        raise ValueError(f"{where} has a weight_packed but no weight_shape; is a shard missing?")
    if info.dtype not in INDICES or info.shape != (2,):
        raise ValueError(
            f"{where}: weight_shape is {info.dtype} of shape {info.shape}, expected "
            f"{' or '.join(INDICES)} of shape (2,)"
        )
    stated_n, k = (int(size) for size in read(info.name))
    if stated_n != n or k < 1:
        raise ValueError(
            f"{where}: weight_shape holds {[stated_n, k]}, expected [N, K] with N={n}, the rows of "
            f"weight_packed, and K at least 1; the checkpoint is damaged, export it again"
        )
    return k


def _canonical(
    parts: Mapping[str, np.ndarray],
    quantization: ModuleQuantization,
    shape: tuple[int, int],
    where: str,
) -> CanonicalLinear:
    g_idx, zero_points = parts.get("weight_g_idx"), parts.get("weight_zero_point")
    if g_idx is not None and (g_idx == -1).all():
        g_idx = None
    canonical = gptq_to_canonical(
        parts["weight_packed"].T,
        np.ascontiguousarray(parts["weight_scale"].T),
        None if zero_points is None else zero_points.T,
        g_idx,
        parts.get("bias"),
        bits=quantization.bits,
        group_size=quantization.group_size,
        k=shape[0],
        n=shape[1],
        symmetric=None,  # taken as stored, and None where all are in the middle
        checkpoint_format="gptq_v2",
        where=where,
    )
    if quantization.symmetric and canonical.zero_points is not None:
        raise ValueError(
            f"{where}: weight_zero_point holds other values than 0 (stored as "
            f"{2 ** (quantization.bits - 1)}), expected none with symmetric true; is the "
            f"quantization config right?"
        )
    return canonical


COMPRESSED_TENSORS = Format(
    "compressed-tensors", "weight_packed", "weight_scale", "weight_g_idx", _layout, _canonical
)
