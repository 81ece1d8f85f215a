"""Random AWQ (GEMM) tensor sets, and a slow decoder written from the format's description."""

from typing import Any

import numpy as np

# bits 4*i.. of a word hold column ORDER[i] of its eight
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def pack_columns(codes):
    """Codes [R, N] to int32 [R, N / 8]."""
    words = np.zeros((codes.shape[0], codes.shape[1] // 8), np.int64)
    for place, column in enumerate(ORDER):
        words |= codes[:, column::8].astype(np.int64) << (4 * place)
    return words.astype(np.uint32).view(np.int32)


def awq_weight(parts, group_size):
    """float64 [K, N] of stored tensors, one number after the other."""
    scales = np.asarray(parts["scales"], np.float64)
    k, n = parts["qweight"].shape[0], scales.shape[1]
    rows = k if group_size == -1 else group_size

    def code(words, row, column):
        return (int(words[row, column // 8]) >> (4 * ORDER.index(column % 8))) & 15

    weight = np.empty((k, n))
    for row in range(k):
        for column in range(n):
            zero = code(parts["qzeros"], row // rows, column) if "qzeros" in parts else 8
            q = code(parts["qweight"], row, column)
            weight[row, column] = scales[row // rows, column] * (q - zero)
    return weight


def awq_tensors(
    seed, k, n, *, group_size=32, zeros: str | None = "random", bias=False, dtype: Any = np.float16
):
    """One random linear; `zeros` is "random", "eight" or None (not stored)."""
    rng = np.random.default_rng(seed)
    groups = 1 if group_size == -1 else -(-k // group_size)
    parts = {
        "qweight": pack_columns(rng.integers(0, 16, (k, n))),
        "scales": (rng.standard_normal((groups, n)) / 16).astype(dtype),  # of both signs
    }
    if zeros is not None:
        points = rng.integers(0, 16, (groups, n)) if zeros == "random" else np.full((groups, n), 8)
        parts["qzeros"] = pack_columns(points)
    if bias:
        parts["bias"] = rng.standard_normal(n).astype(dtype)
    return parts
