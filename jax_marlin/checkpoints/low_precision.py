"""Numbers of 4 and 8 bits as float32: e2m1 (MXFP4, NVFP4), e8m0 (MXFP4's scales), e4m3 (FP8).

    e2m1  sign, 2 exponent bits of bias 1, 1 mantissa bit: 0, .5, 1, 1.5, 2, 3, 4, 6; 8..15 negative
    e8m0  2 ** (u - 127); 255 is NaN
    e4m3  `ml_dtypes.float8_e4m3fn`: no infinity, S.1111.111 is NaN

Source: OCP Microscaling Formats (MX) Specification 1.0.
"""

from __future__ import annotations

import numpy as np

_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_E2M1 = np.concatenate([_E2M1, -_E2M1])
# Both numbers of a byte, the low nibble's first, as one item of 8 bytes: one look-up moves both.
_E2M1_PAIRS = np.stack([_E2M1[np.arange(256) & 15], _E2M1[np.arange(256) >> 4]], axis=1)
_E2M1_PAIRS = _E2M1_PAIRS.view(np.uint64)[:, 0]
_E8M0 = np.append(np.ldexp(np.float32(1), np.arange(255) - 127), np.float32(np.nan))


def decode_e2m1(packed: np.ndarray) -> np.ndarray:
    """uint8 [R, C], two codes in a byte, to float32 [R, 2 C]."""
    return _E2M1_PAIRS.take(packed).view(np.float32)


def decode_e8m0(stored: np.ndarray) -> np.ndarray:
    """uint8 or `float8_e8m0fnu` of any shape to float32, NaN for 255."""
    return _E8M0[stored.view(np.uint8)]


def scaled(
    values: np.ndarray, scales: np.ndarray, block: tuple[int, int], where: str
) -> np.ndarray:
    """values float32 [N, K] times the scale of each block, transposed: float32 [K, N].

    Args:
        values: rows are output features.
        scales: float32 [ceil(N / bn), ceil(K / bk)].
        block: (bn, bk), how many rows and columns share a scale.
        where: the module that errors are reported for.

    Raises:
        ValueError: a product is NaN or infinite.
    """
    for axis, size in enumerate(block):
        if size > 1 and scales.shape[axis] > 1:  # else it broadcasts
            scales = np.repeat(scales, size, axis=axis)
    scales = scales[: values.shape[0], : values.shape[1]]
    with np.errstate(over="ignore", invalid="ignore"):
        weight = (values * scales).T
    finite = np.isfinite(weight)
    if not finite.all():
        row, column = (int(i) for i in np.argwhere(~finite)[0])
        raise ValueError(
            f"{where}: {int((~finite).sum())} weights are not finite once scaled, the first at "
            f"[k={row}, n={column}]; the weight or its scales are damaged, download them again"
        )
    return weight
