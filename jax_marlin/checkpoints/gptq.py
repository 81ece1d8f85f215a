"""GPTQ modules: shapes of the stored tensors, and their canonical form (see `gptq_format.py`)."""

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
    bits = quantization.bits
    rows, n = two_axes(parts["qweight"], "qweight", "(K * bits / 32, N)", where)
    k = rows * 32 // bits
    g_idx = parts.get("g_idx")
    if g_idx is not None and g_idx.size < k and -(-g_idx.size * bits // 32) == rows:
        k = g_idx.size  # the last word of each column is not full
    groups = quantization.num_groups(k)
    if quantization.desc_act and groups > 1 and g_idx is None:
        raise ValueError(
            f"{where}: desc_act is true but there is no g_idx to say which row is of which group; "
            f"is a shard missing, or desc_act wrong?"
        )
    return Layout(k, n, {
        "qweight": (WORDS, (rows, n)),
        "scales": (SCALES, (groups, n)),
        "qzeros": (WORDS, (groups, -(-n * bits // 32))),
        "g_idx": (INDICES, (k,)),
        "bias": (SCALES, (n,)),
    })  # fmt: skip


def _canonical(
    parts: Mapping[str, np.ndarray],
    quantization: ModuleQuantization,
    shape: tuple[int, int],
    where: str,
) -> CanonicalLinear:
    return gptq_to_canonical(
        parts["qweight"],
        parts["scales"],
        parts.get("qzeros"),
        parts.get("g_idx"),
        parts.get("bias"),
        bits=quantization.bits,
        group_size=quantization.group_size,
        k=shape[0],
        n=shape[1],
        symmetric=quantization.symmetric,
        checkpoint_format=quantization.checkpoint_format,
        where=where,
    )


GPTQ = Format("gptq", "qweight", "scales", "g_idx", _layout, _canonical)
