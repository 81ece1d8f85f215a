"""Random GPTQ tensor sets as the real tools write them, with the float64 weight that they mean."""

from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  (names the NumPy dtype "bfloat16")
import numpy as np
import oracle


class GptqTensors(NamedTuple):
    """One linear [K, N]: what is stored, how, and its truth."""

    tensors: dict[str, Any]  # qweight, scales, qzeros, g_idx, bias; absent ones are None
    options: dict[str, Any]  # bits, group_size, k, checkpoint_format
    weight: np.ndarray  # float64 [K, N]


def random_tensors(
    rng, *, k=64, n=96, bits=4, group_size=32, zeros=None, act_order=False, bias=False,
    dtype="float16",
) -> GptqTensors:  # fmt: skip
    """`zeros` is None, "v1" or "v2"; scales have both signs and one is zero."""
    rows = k if group_size == -1 else group_size
    num_groups = -(-k // rows)
    g_idx = np.arange(k, dtype=np.int32) // rows
    if act_order:
        g_idx = rng.permutation(g_idx)
    codes = rng.integers(0, 2**bits, (k, n))
    scales = rng.normal(0.0, 0.1, (num_groups, n)).astype(dtype)
    scales[0, 1] = 0
    zero_points, qzeros = np.full((num_groups, n), 2 ** (bits - 1)), None
    if zeros is not None:
        zero_points = rng.integers(0, 2**bits, (num_groups, n))
        zero_points[:, ::5] = 0  # their stored v1 words borrow
        checkpoint_format = "gptq" if zeros == "v1" else "gptq_v2"
        qzeros = oracle.pack_zeros(padded(zero_points, 1, bits), bits, checkpoint_format)
    tensors = {
        "qweight": oracle.pack_rows(padded(codes, 0, bits), bits),
        "scales": scales,
        "qzeros": qzeros,
        "g_idx": g_idx if act_order else None,
        "bias": rng.normal(0.0, 1.0, n).astype(dtype) if bias else None,
    }
    options = {
        "bits": bits,
        "group_size": group_size,
        "k": k,
        "checkpoint_format": "gptq_v2" if zeros == "v2" else "gptq",
    }
    return GptqTensors(tensors, options, oracle.dequantize(codes, scales, zero_points, g_idx))


def padded(a: np.ndarray, axis: int, bits: int) -> np.ndarray:
    """`a` with ones behind it, up to whole 32-bit words along `axis`."""
    width = [(0, 0), (0, 0)]
    width[axis] = (0, -a.shape[axis] % (32 // bits))
    return np.pad(a, width, constant_values=1)


def stacked(sets: list[GptqTensors]) -> dict[str, Any]:
    """Arguments of load_gptq_stacked: a list for each tensor that at least one expert has."""
    columns = {name: [s.tensors[name] for s in sets] for name in sets[0].tensors}
    columns["qweights"] = columns.pop("qweight")
    present = {name: a for name, a in columns.items() if any(x is not None for x in a)}
    return present | sets[0].options
