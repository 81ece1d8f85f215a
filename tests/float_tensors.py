"""Random MXFP4, NVFP4 and FP8 tensor sets, and slow decoders from the formats' descriptions."""

import ml_dtypes
import numpy as np
import numpy.typing as npt

E4M3 = ml_dtypes.float8_e4m3fn


def e2m1(code):
    """4 bits: sign, exponent of bias 1, one bit of mantissa."""
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    size = mantissa * 0.5 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
    return -size if sign else size


def e4m3(byte):
    """8 bits: sign, exponent of bias 7, three bits of mantissa; no infinities."""
    sign, exponent, mantissa = byte >> 7, byte >> 3 & 15, byte & 7
    size = mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    if byte & 127 == 127:
        size = np.nan
    return -size if sign else size


def nibble(row, k):
    """Code k of a row of bytes, the even one in the low half."""
    return int(row[k // 2]) >> 4 * (k % 2) & 15


def mxfp4_weight(packed, exponents):
    """float64 [K, N] of codes uint8 [N, K / 2] and e8m0 exponents uint8 [N, ceil(K / 32)]."""
    return np.array([
        [e2m1(nibble(codes, k)) * 2.0 ** (int(row[k // 32]) - 127) for k in range(2 * len(codes))]
        for codes, row in zip(packed, exponents, strict=True)
    ]).T  # fmt: skip


def nvfp4_weight(packed, scales, factor):
    """float64 [K, N] of codes uint8 [N, K / 2], e4m3 scales [N, ceil(K / 16)] and one factor."""
    scales = scales.view(np.uint8)
    return factor * np.array([
        [e2m1(nibble(codes, k)) * e4m3(int(row[k // 16])) for k in range(2 * len(codes))]
        for codes, row in zip(packed, scales, strict=True)
    ]).T  # fmt: skip


def fp8_weight(weight, scales, bn, bk):
    """float64 [K, N] of e4m3 [N, K] and a scale for each bn x bk of it."""
    n, k = weight.shape
    scales = np.asarray(scales, np.float64).reshape(-(-n // bn), -(-k // bk))
    stored = weight.view(np.uint8)
    return np.array([
        [e4m3(int(stored[row, column])) * scales[row // bn, column // bk] for row in range(n)]
        for column in range(k)
    ])  # fmt: skip


def mxfp4_parts(seed, k, n, *, bias=False):
    """As compressed-tensors stores it."""
    rng = np.random.default_rng(seed)
    parts = {
        "weight_packed": rng.integers(0, 256, (n, k // 2), np.uint8),
        "weight_scale": rng.integers(115, 130, (n, -(-k // 32)), np.uint8),
    }
    return parts | _bias(rng, n, bias)


def fused_mxfp4_parts(seed, experts, k, n):
    """As gpt-oss stores all experts, the last part of each name."""
    each = [mxfp4_parts(seed + e, k, n, bias=True) for e in range(experts)]
    blocks = np.stack([parts["weight_packed"] for parts in each])
    return {
        "blocks": blocks.reshape(experts, n, k // 32, 16),
        "scales": np.stack([parts["weight_scale"] for parts in each]),
        "bias": np.stack([parts["bias"] for parts in each]),
    }


def nvfp4_parts(seed, k, n, *, bias=False):
    """As compressed-tensors stores it: the global scale divides."""
    rng = np.random.default_rng(seed)
    parts = {
        "weight_packed": rng.integers(0, 256, (n, k // 2), np.uint8),
        "weight_scale": e4m3_array(rng, n, -(-k // 16)),
        "weight_global_scale": rng.uniform(50, 400, 1).astype(np.float32),
        "input_global_scale": np.ones(1, np.float32),
    }
    return parts | _bias(rng, n, bias)


def modelopt_parts(seed, k, n):
    """As ModelOpt stores it: the second scale multiplies."""
    parts = nvfp4_parts(seed, k, n)
    return {
        "weight": parts["weight_packed"],
        "weight_scale": parts["weight_scale"],
        "weight_scale_2": (1 / parts["weight_global_scale"]).reshape(()),
        "input_scale": np.ones((), np.float32),
    }


def fp8_parts(
    seed, k, n, scale_shape, *, name="weight_scale", dtype: npt.DTypeLike = np.float32, bias=False
):
    rng = np.random.default_rng(seed)
    scales = rng.uniform(0.01, 0.1, scale_shape) * rng.choice([-1, 1], scale_shape)
    return {"weight": e4m3_array(rng, n, k), name: np.asarray(scales, dtype)} | _bias(rng, n, bias)


def e4m3_array(rng, *shape):
    """Every finite value of either sign, subnormals too."""
    stored = rng.integers(0, 127, shape, np.uint8) | rng.integers(0, 2, shape, np.uint8) << 7
    return stored.astype(np.uint8).view(E4M3)


def _bias(rng, n, wanted):
    return {"bias": rng.standard_normal(n).astype(np.float16)} if wanted else {}
