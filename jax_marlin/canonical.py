"""CanonicalLinear: one quantized weight [K, N] on the host, what every file format becomes."""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np

from jax_marlin.quant_spec import QuantSpec

SCALE_DTYPES = tuple(np.dtype(t) for t in (np.float16, ml_dtypes.bfloat16, np.float32))


@dataclasses.dataclass
class CanonicalLinear:
    """Codes, scales and zero points in plain order; G = ceil(K / group_size).

    The value is, with g = i // group_size,

        W[perm[i], n] = scales[g, n] * (codes[i, n] - zero_points[g, n])

    Attributes:
        codes: uint8 [K, N], below `2**bits`, rows in group order (act-order rows sorted by group).
        scales: float16, bfloat16 or float32 [G, N], finite; may be negative or zero.
        zero_points: uint8 [G, N], below `2**bits`; None: symmetric, `2**(bits - 1)` everywhere.
        perm: int32 [K], row i of `codes` is row `perm[i]` of the weight; None means in order.
        bias: float [N], or None.
    """

    codes: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray | None = None
    perm: np.ndarray | None = None
    bias: np.ndarray | None = None

    def check(self, spec: QuantSpec, where: str) -> None:
        """Raises unless every array fits `spec`.

        Args:
            spec: what the weight must be.
            where: the function or module that errors are reported for.

        Raises:
            TypeError: an array has the wrong dtype.
            ValueError: wrong shape, a code or zero point that needs more bits, a scale or bias that
                is not finite, or a `perm` that is no permutation.
        """
        k, n, groups = spec.k, spec.n, spec.num_groups
        _check_shape(self.codes, "codes", (k, n), "(K, N)", where)
        _check_shape(self.scales, "scales", (groups, n), "(ceil(K / group_size), N)", where)
        _check_codes(self.codes, "codes", spec.bits, where)
        _check_finite(self.scales, "scales", where)
        if self.zero_points is not None:
            name = "zero_points"
            _check_shape(self.zero_points, name, (groups, n), "(ceil(K / group_size), N)", where)
            _check_codes(self.zero_points, name, spec.bits, where)
        if self.bias is not None:
            _check_shape(self.bias, "bias", (n,), "(N,)", where)
            _check_finite(self.bias, "bias", where)
        if self.perm is not None:
            _check_shape(self.perm, "perm", (k,), "(K,)", where)
            if not np.array_equal(np.sort(self.perm), np.arange(k)):
                raise ValueError(f"{where}: perm is not a permutation of 0..{k - 1}")


def concat_columns(
    a: CanonicalLinear,
    b: CanonicalLinear,
    *,
    bits: int | None = None,
    where: str = "concat_columns",
) -> CanonicalLinear:
    """Joins two weights of the same K along N, as gate|up.

    Args:
        a: the left columns.
        b: the right columns.
        bits: only needed where one of the two is symmetric and the other is not.
        where: the function or module that errors are reported for.

    Raises:
        ValueError: K, the number of groups, or the permutations differ; or `bits` is missing.

    >>> import numpy as np
    >>> gate = CanonicalLinear(np.zeros((32, 64), np.uint8), np.ones((1, 64), np.float16))
    >>> concat_columns(gate, gate).codes.shape
    (32, 128)
    """
    if a.codes.shape[0] != b.codes.shape[0] or a.scales.shape[0] != b.scales.shape[0]:
        raise ValueError(
            f"{where}: the two weights have K, G = {a.codes.shape[0]}, {a.scales.shape[0]} and "
            f"{b.codes.shape[0]}, {b.scales.shape[0]}, expected the same"
        )
    if not same_perm(a.perm, b.perm):
        raise ValueError(
            f"{where}: the two weights have different act-order permutations (g_idx); "
            "keep them as a pair of weights"
        )
    zero_points = None
    if a.zero_points is not None or b.zero_points is not None:
        zero_points = np.concatenate(
            [_filled_zero_points(part, bits, where) for part in (a, b)], axis=1
        )
    bias = None
    if a.bias is not None or b.bias is not None:
        bias = _concat_floats(*(_filled_bias(part) for part in (a, b)))
    codes = np.concatenate([a.codes, b.codes], axis=1)
    return CanonicalLinear(codes, _concat_floats(a.scales, b.scales), zero_points, a.perm, bias)


def same_perm(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    """True if two permutations are equal; None and the identity are the same."""
    if a is None or b is None:
        return is_identity(a) and is_identity(b)
    return np.array_equal(a, b)


def is_identity(perm: np.ndarray | None) -> bool:
    """True for None and for 0, 1, 2, ..."""
    return perm is None or np.array_equal(perm, np.arange(perm.shape[0]))


def _concat_floats(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Along the last axis; different dtypes become float32, which holds them exactly."""
    if a.dtype != b.dtype:
        a, b = a.astype(np.float32), b.astype(np.float32)
    return np.concatenate([a, b], axis=-1)


def _filled_zero_points(part: CanonicalLinear, bits: int | None, where: str) -> np.ndarray:
    if part.zero_points is not None:
        return part.zero_points
    if bits is None:
        raise ValueError(f"{where}: one weight is symmetric and the other is not, pass bits")
    return np.full(part.scales.shape, 2 ** (bits - 1), np.uint8)


def _filled_bias(part: CanonicalLinear) -> np.ndarray:
    return np.zeros(part.scales.shape[1:], part.scales.dtype) if part.bias is None else part.bias


def _check_shape(a: np.ndarray, name: str, shape: tuple[int, ...], axes: str, where: str) -> None:
    if a.shape != shape:
        raise ValueError(f"{where}: {name} has shape {a.shape}, expected {axes} = {shape}")


def _check_codes(a: np.ndarray, name: str, bits: int, where: str) -> None:
    if a.dtype != np.uint8:
        raise TypeError(f"{where}: {name} has dtype {a.dtype}, expected uint8")
    largest = int(a.max())
    if largest >= 2**bits:
        raise ValueError(f"{where}: {name} holds {largest}, expected values below {2**bits}")


def _check_finite(a: np.ndarray, name: str, where: str) -> None:
    if a.dtype not in SCALE_DTYPES:
        raise TypeError(
            f"{where}: {name} has dtype {a.dtype}, expected float16, bfloat16 or float32"
        )
    finite = np.isfinite(a)
    if not finite.all():
        place = tuple(int(i) for i in np.argwhere(~finite)[0])
        raise ValueError(
            f"{where}: {name} has {int((~finite).sum())} values that are not finite, the first at "
            f"{place}; the checkpoint is damaged or was quantized with an overflow"
        )
