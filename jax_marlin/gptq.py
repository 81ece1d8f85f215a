"""`load_gptq` and `load_gptq_stacked`: GPTQ tensors to packed weights, one expert at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from jax.typing import DTypeLike

from jax_marlin.canonical import CanonicalLinear
from jax_marlin.gptq_format import gptq_to_canonical
from jax_marlin.host_arrays import count_experts, float_array, per_expert
from jax_marlin.linear import compute_dtype
from jax_marlin.quant_spec import QuantSpec
from jax_marlin.stack_builder import StackBuilder
from jax_marlin.weights import MarlinExpertStack, MarlinLinear


def load_gptq(
    qweight: Any,
    scales: Any,
    qzeros: Any = None,
    g_idx: Any = None,
    bias: Any = None,
    *,
    bits: int = 4,
    group_size: int = 128,
    k: int | None = None,
    n: int | None = None,
    symmetric: bool | None = None,
    dtype: DTypeLike | None = None,
    checkpoint_format: str = "gptq",
) -> MarlinLinear:
    """Packs one GPTQ tensor set; host work, done once, not under `jax.jit`.

    Args:
        qweight: int32 or uint32 [ceil(K * bits / 32), N], a NumPy, JAX or torch array, as all here.
        scales: float16, bfloat16 or float32 [G, N] of any sign (float64 needs `dtype`).
        qzeros: int32 or uint32 [G, ceil(N * bits / 32)]; None means symmetric.
        g_idx: integers [K], the group of each row; None means rows in group order.
        bias: float [N].
        bits: 4 or 8.
        group_size: rows that share a scale: a multiple of 32, K, or -1 for one group.
        k: K; needed only where K * bits is no multiple of 32 and there is no `g_idx`.
        n: N; checked if given.
        symmetric: None takes the zero points as stored. True says that they are all
            `2**(bits - 1)`, and accepts that value or the one below it as stored (writers
            disagree), or no `qzeros`. False says that they vary, and needs `qzeros`.
        dtype: compute dtype; None keeps that of the scales.
        checkpoint_format: `"gptq"` (version 1, zeros stored minus one) or `"gptq_v2"`.

    Returns:
        A `MarlinLinear` of shape (K, N).

    Raises:
        TypeError: a traced or wrongly typed array.
        ValueError: shapes, `g_idx`, zero points or scales that contradict the arguments.
        NotImplementedError: 2, 3, 5, 6 or 7 bits.

    Source: `qlinear/__init__.py` and `utils/model.py` of ModelCloud/GPTQModel.

    >>> import jax_marlin as jm, numpy as np
    >>> qweight = np.full((8, 96), 0x99999999, np.uint32)  # every code 9, every zero point 8
    >>> w = jm.load_gptq(qweight, np.full((2, 96), 0.5, np.float16), group_size=32)
    >>> w.shape, float(w.dequantize()[3, 5])
    ((64, 96), 0.5)
    """
    stack = _pack(
        iter([(qweight, scales, qzeros, g_idx, bias)]), ["load_gptq"], k, n, dtype, bits=bits,
        group_size=group_size, symmetric=symmetric, checkpoint_format=checkpoint_format,
    )  # fmt: skip
    return stack[0]


def load_gptq_stacked(
    qweights: Any,
    scales: Any,
    qzeros: Any = None,
    g_idx: Any = None,
    bias: Any = None,
    *,
    bits: int = 4,
    group_size: int = 128,
    k: int | None = None,
    n_per_expert: int | None = None,
    symmetric: bool | None = None,
    dtype: DTypeLike | None = None,
    checkpoint_format: str = "gptq",
) -> MarlinExpertStack:
    """Packs one GPTQ tensor set an expert into one stack, an expert at a time, each by itself.

    Each tensor is a list of E arrays or one array with a leading E; otherwise as in `load_gptq`.

    Args:
        qweights: E times int32 or uint32 [ceil(K * bits / 32), N].
        scales: E times float [G, N], one dtype for all experts unless `dtype` is given.
        qzeros: E times int32 or uint32 [G, ceil(N * bits / 32)]; entries of a list may be None.
        g_idx: [K] for all experts, or E times [K]; entries of a list may be None.
        bias: E times float [N]; entries of a list may be None.
        bits: 4 or 8.
        group_size: rows that share a scale: a multiple of 32, K, or -1 for one group.
        k: K; needed only where K * bits is no multiple of 32 and there is no `g_idx`.
        n_per_expert: N; checked if given.
        symmetric: see `load_gptq`.
        dtype: compute dtype; None keeps that of the scales.
        checkpoint_format: `"gptq"` or `"gptq_v2"`.

    Returns:
        A `MarlinExpertStack` of shape (E, K, N).

    Raises:
        TypeError, ValueError, NotImplementedError: as `load_gptq`; the message names the expert.

    Source: `qlinear/__init__.py` and `utils/model.py` of ModelCloud/GPTQModel.

    >>> import jax_marlin as jm, numpy as np
    >>> qweights = np.full((3, 8, 96), 0x99999999, np.uint32)
    >>> stack = jm.load_gptq_stacked(qweights, np.full((3, 2, 96), 0.5, np.float16), group_size=32)
    >>> stack.shape, float(stack.dequantize()[2, 3, 5])
    ((3, 64, 96), 0.5)
    """
    where = "load_gptq_stacked"
    num_experts = count_experts(qweights, "qweights", where)
    if g_idx is not None and _is_one_row(g_idx):
        g_idx = [g_idx] * num_experts
    named = {"qweights": qweights, "scales": scales, "qzeros": qzeros, "g_idx": g_idx, "bias": bias}
    tensors = [per_expert(a, name, num_experts, where) for name, a in named.items()]
    names = [f"{where}: expert {expert}" for expert in range(num_experts)]
    return _pack(
        zip(*tensors, strict=True), names, k, n_per_expert, dtype, bits=bits,
        group_size=group_size, symmetric=symmetric, checkpoint_format=checkpoint_format,
    )  # fmt: skip


def _is_one_row(g_idx: Any) -> bool:
    """True for [K], an array or a list of numbers, which then serves every expert."""
    if isinstance(g_idx, (list, tuple)):
        return len(g_idx) > 0 and g_idx[0] is not None and np.ndim(g_idx[0]) == 0
    return np.ndim(g_idx) == 1


def _pack(
    experts: Iterator[tuple[Any, ...]],  # (qweight, scales, qzeros, g_idx, bias) of each
    names: list[str],
    k: int | None,
    n: int | None,
    dtype: DTypeLike | None,
    *,
    bits: int,
    group_size: int,
    **options: Any,
) -> MarlinExpertStack:
    """Packs one expert after the other; the first one decides K, N and the dtype."""
    wanted = None if dtype is None else compute_dtype(dtype, names[0].partition(":")[0])

    def next_expert(where: str, k: int | None, n: int | None) -> CanonicalLinear:
        qweight, scales, qzeros, g_idx, bias = next(experts)
        scales = float_array(scales, "scales", wanted, where)
        bias = None if bias is None else float_array(bias, "bias", wanted, where)
        return gptq_to_canonical(
            qweight, scales, qzeros, g_idx, bias,
            bits=bits, group_size=group_size, k=k, n=n, where=where, **options,
        )  # fmt: skip

    canonical = next_expert(names[0], k, n)
    rows, columns = canonical.shape
    spec = QuantSpec.create(bits=bits, group_size=group_size, k=rows, n=columns, where=names[0])
    first_dtype = canonical.scales.dtype
    builder = StackBuilder(len(names), spec, first_dtype if wanted is None else wanted)
    for expert, where in enumerate(names):
        if expert > 0:
            canonical = next_expert(where, rows, columns)
        if wanted is None and canonical.scales.dtype != first_dtype:
            raise TypeError(
                f"{where}: scales has dtype {canonical.scales.dtype}, expected {first_dtype}, the "
                "dtype of expert 0; pass dtype="
            )
        builder.set_expert(expert, canonical, where)
    return builder.finish()
