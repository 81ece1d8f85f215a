"""CanonicalLinear: one quantized weight [K, N] on the host, what every file format becomes."""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np

from jax_marlin.quant_spec import QuantSpec
from jax_marlin.words import AWQ_COLUMNS, pack_rows, unpack_awq, unpack_rows

_EXPONENTS = {  # whose bits are all set where a number is not finite
    np.dtype(np.float16): np.uint16(0x7C00),
    np.dtype(ml_dtypes.bfloat16): np.uint16(0x7F80),
    np.dtype(np.float32): np.uint32(0x7F800000),
}
SCALE_DTYPES = tuple(_EXPONENTS)


@dataclasses.dataclass
class CanonicalLinear:
    """Codes, scales and zero points in plain order; P = 32 / bits, G = ceil(K / group_size).

    The value is, with g = i // group_size,

        W[perm[i], n] = scales[g, n] * (codes[i, n] - zero_points[g, n])

    Attributes:
        words: uint32, the codes in the order of the weight's rows, as a file holds them: [ceil(K /
            P), N], P neighbours along K in a word, the first lowest, fields past K anything; or
            with `awq` [K, N / 8], 8 neighbours along N in a word (`words.unpack_awq`).
        scales: float16, bfloat16 or float32 [G, N], finite; may be negative or zero.
        zero_points: uint8 [G, N], below `2**bits`; None: symmetric, `2**(bits - 1)` everywhere.
        perm: int32 [K], row i of the codes, which are sorted by group, is row `perm[i]` of the
            weight; None means in order.
        bias: float [N], or None.
        bits: 4 or 8.
        k: K.
        awq: how words hold codes.
    """

    words: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray | None = None
    perm: np.ndarray | None = None
    bias: np.ndarray | None = None
    bits: int = dataclasses.field(kw_only=True)
    k: int = dataclasses.field(kw_only=True)
    awq: bool = dataclasses.field(default=False, kw_only=True)

    @classmethod
    def from_codes(
        cls,
        codes: np.ndarray,
        scales: np.ndarray,
        zero_points: np.ndarray | None = None,
        perm: np.ndarray | None = None,
        bias: np.ndarray | None = None,
        *,
        bits: int,
        where: str = "CanonicalLinear.from_codes",
    ) -> CanonicalLinear:
        """A weight from its codes, uint8 [K, N].

        Args:
            codes: below `2**bits`, rows in group order.
            scales, zero_points, perm, bias: see the class.
            bits: 4 or 8.
            where: the function or module that errors are reported for.

        Raises:
            TypeError: codes are not uint8.
            ValueError: a code needs more bits.

        >>> codes = np.arange(64, dtype=np.uint8).reshape(32, 2) % 16
        >>> w = CanonicalLinear.from_codes(codes, np.ones((1, 2), np.float16), bits=4)
        >>> w.words.shape, bool((w.codes == codes).all())
        ((4, 2), True)
        """
        _check_codes(codes, "codes", bits, where)
        words = pack_rows(codes if perm is None else codes[np.argsort(perm)], bits)
        return cls(words, scales, zero_points, perm, bias, bits=bits, k=codes.shape[0])

    @property
    def codes(self) -> np.ndarray:
        """uint8 [K, N], below `2**bits`, rows in group order; a new array."""
        codes = unpack_awq(self.words) if self.awq else unpack_rows(self.words, self.bits)
        return codes[: self.k] if self.perm is None else codes[self.perm]

    @property
    def shape(self) -> tuple[int, int]:
        """(K, N)."""
        return (self.k, self.words.shape[1] * (AWQ_COLUMNS if self.awq else 1))

    def window(self, rows: range, columns: range, group_size: int) -> CanonicalLinear:
        """A part of the weight, as views.

        Args:
            rows: of the sorted rows; all of them, or whole words and whole groups of a weight
                without `perm`.
            columns: any; whole words of AWQ's.
            group_size: rows of one group.

        >>> codes = np.arange(64, dtype=np.uint8).reshape(32, 2) % 16
        >>> w = CanonicalLinear.from_codes(codes, np.ones((2, 2), np.float16), bits=4)
        >>> w.window(range(16, 32), range(1, 2), 16).codes[:2, 0].tolist()
        [1, 3]
        """
        n, groups = slice(columns.start, columns.stop), _whole(rows, group_size)
        if self.awq:
            words = self.words[rows.start : rows.stop, _whole(columns, AWQ_COLUMNS)]
        else:
            words = self.words[_whole(rows, 32 // self.bits), n]
        return dataclasses.replace(
            self,
            words=words,
            scales=self.scales[groups, n],
            zero_points=None if self.zero_points is None else self.zero_points[groups, n],
            bias=None if self.bias is None else self.bias[n],
            k=len(rows),
        )

    def check(self, spec: QuantSpec, where: str) -> None:
        """Raises unless every array fits `spec`.

        Args:
            spec: what the weight must be.
            where: the function or module that errors are reported for.

        Raises:
            TypeError: an array has the wrong dtype.
            ValueError: wrong shape, a zero point that needs more bits, a scale or bias that is not
                finite, or a `perm` that is no permutation.
        """
        k, n, groups = spec.k, spec.n, spec.num_groups
        if self.bits != spec.bits or self.shape != (k, n):
            raise ValueError(
                f"{where}: codes have {self.bits} bits and shape {self.shape}, expected "
                f"{spec.bits} and (K, N) = {(k, n)}"
            )
        if self.words.dtype != np.uint32:
            raise TypeError(f"{where}: words have dtype {self.words.dtype}, expected uint32")
        if self.awq and (self.bits != 4 or self.perm is not None):
            raise ValueError(
                f"{where}: words in AWQ's form have {self.bits} bits and "
                f"{'no perm' if self.perm is None else 'a perm'}, expected 4 and none"
            )
        if self.awq:
            _check_shape(self.words, "words", (k, n // AWQ_COLUMNS), "(K, N / 8)", where)
        else:
            _check_shape(self.words, "words", (-(-k // spec.pack_factor), n), "(K / P, N)", where)
        _check_shape(self.scales, "scales", (groups, n), "(ceil(K / group_size), N)", where)
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
    a: CanonicalLinear, b: CanonicalLinear, *, where: str = "concat_columns"
) -> CanonicalLinear:
    """Joins two weights of the same K along N, as gate|up.

    Args:
        a: the left columns.
        b: the right columns.
        where: the function or module that errors are reported for.

    Raises:
        ValueError: K, the bits, the number of groups, or the permutations differ.

    >>> import numpy as np
    >>> codes, scales = np.zeros((32, 64), np.uint8), np.ones((1, 64), np.float16)
    >>> gate = CanonicalLinear.from_codes(codes, scales, bits=4)
    >>> concat_columns(gate, gate).shape
    (32, 128)
    """
    sizes = [(part.k, part.scales.shape[0], part.bits) for part in (a, b)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"{where}: the two weights have K, G, bits = {sizes[0]} and {sizes[1]}, expected the "
            "same"
        )
    if not same_perm(a.perm, b.perm):
        raise ValueError(
            f"{where}: the two weights have different act-order permutations (g_idx); "
            "keep them as a pair of weights"
        )
    zero_points = None
    if a.zero_points is not None or b.zero_points is not None:
        zero_points = np.concatenate([_filled_zero_points(part) for part in (a, b)], axis=1)
    bias = None
    if a.bias is not None or b.bias is not None:
        bias = _concat_floats(*(_filled_bias(part) for part in (a, b)))
    if a.awq != b.awq:
        a, b = _along_k(a), _along_k(b)
    return dataclasses.replace(
        a,
        words=np.concatenate([a.words, b.words], axis=1),
        scales=_concat_floats(a.scales, b.scales),
        zero_points=zero_points,
        bias=bias,
    )


def same_perm(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    """True if two permutations are equal; None and the identity are the same."""
    if a is None or b is None:
        return is_identity(a) and is_identity(b)
    return np.array_equal(a, b)


def is_identity(perm: np.ndarray | None) -> bool:
    """True for None and for 0, 1, 2, ..."""
    return perm is None or np.array_equal(perm, np.arange(perm.shape[0]))


def _along_k(part: CanonicalLinear) -> CanonicalLinear:
    """The weight with words along K."""
    if not part.awq:
        return part
    return dataclasses.replace(part, words=pack_rows(unpack_awq(part.words), 4), awq=False)


def _whole(places: range, size: int) -> slice:
    """The words, or groups, of `size` places that hold these."""
    return slice(places.start // size, -(-places.stop // size))


def _concat_floats(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Along the last axis; different dtypes become float32, which holds them exactly."""
    if a.dtype != b.dtype:
        a, b = a.astype(np.float32), b.astype(np.float32)
    return np.concatenate([a, b], axis=-1)


def _filled_zero_points(part: CanonicalLinear) -> np.ndarray:
    if part.zero_points is not None:
        return part.zero_points
    return np.full(part.scales.shape, 2 ** (part.bits - 1), np.uint8)


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
    # In bits: NumPy's own test of 16-bit floats takes one after the other.
    exponent = _EXPONENTS[a.dtype]
    finite = (a.view(exponent.dtype) & exponent) != exponent
    if not finite.all():
        place = tuple(int(i) for i in np.argwhere(~finite)[0])
        raise ValueError(
            f"{where}: {name} has {int((~finite).sum())} values that are not finite, the first at "
            f"{place}; the checkpoint is damaged or was quantized with an overflow"
        )
