"""The words of one weight to packed tiles: filled up to whole tiles, then packed as they stand."""

from __future__ import annotations

import numpy as np

from jax_marlin.canonical import CanonicalLinear
from jax_marlin.layout import TILE
from jax_marlin.quant_spec import QuantSpec
from jax_marlin.repack import pack_words
from jax_marlin.repack_rows import pack_awq_words, pack_words_in_order
from jax_marlin.words import AWQ_COLUMNS, one_in_every_field, pack_awq


def pack_canonical(canonical: CanonicalLinear, spec: QuantSpec, out: np.ndarray) -> None:
    """Packs a weight's codes, rows in group order.

    Padding decodes to exactly zero in a kernel that does not mask it: the code is the zero point.

    Args:
        canonical: a weight that fits `spec`.
        spec: what it is.
        out: uint32 [N/64, K/64, 512 or 1024] to write to, both rounded up.

    >>> spec = QuantSpec.create(bits=4, group_size=32, k=32, n=8)
    >>> weight = CanonicalLinear.from_codes(
    ...     np.full((32, 8), 3, np.uint8), np.ones((1, 8), np.float32), bits=4
    ... )
    >>> out = np.empty((1, 1, 512), np.uint32)
    >>> pack_canonical(weight, spec, out)
    >>> hex(out[0, 0, 0]), hex(out[0, 0, 2])  # rows 0 to 15 of columns 0 and 8, rows 32 to 47
    ('0x83838383', '0x88888888')
    """
    if canonical.awq:
        pack_awq_words(_padded_awq_words(canonical, spec), out)
    elif canonical.perm is None:
        pack_words(_padded_words(canonical, spec), spec.bits, out)
    else:
        order = np.concatenate([canonical.perm, np.arange(spec.k, spec.k_tiles * TILE)])
        pack_words_in_order(_padded_words(canonical, spec), order, spec.bits, out)


def _padded_awq_words(canonical: CanonicalLinear, spec: QuantSpec) -> np.ndarray:
    """AWQ's words of all tiles, uint32 [K to 64, N / 8 to 8]."""
    words = canonical.words
    shape = (spec.k_tiles * TILE, spec.n_tiles * TILE // AWQ_COLUMNS)
    if words.shape == shape:
        return words
    padded = np.full(shape, one_in_every_field(4) * np.uint32(spec.symmetric_zero_point), np.uint32)
    padded[: spec.k, : words.shape[1]] = words
    if canonical.zero_points is not None:
        padded[spec.k :, : words.shape[1]] = pack_awq(canonical.zero_points[-1:])
    return padded


def _padded_words(canonical: CanonicalLinear, spec: QuantSpec) -> np.ndarray:
    """The words along K of all tiles, uint32 [K to 64 / P, N to 64]."""
    words, factor = canonical.words, spec.pack_factor
    shape = (spec.k_tiles * TILE // factor, spec.n_tiles * TILE)
    if words.shape == shape and spec.k % factor == 0:
        return words
    one, zero_point = one_in_every_field(spec.bits), np.uint32(spec.symmetric_zero_point)
    padded = np.full(shape, one * zero_point, np.uint32)
    full, left = divmod(spec.k, factor)  # words of a column that are full, codes in the next one
    padded[:full, : spec.n] = words[:full]
    last_group = padded[-1:, : spec.n]
    if canonical.zero_points is not None:
        last_group = one * canonical.zero_points[-1:].astype(np.uint32)
    padded[full:, : spec.n] = last_group
    if left:
        live = np.uint32(2 ** (spec.bits * left) - 1)
        padded[full, : spec.n] = (words[full] & live) | (last_group[0] & ~live)
    return padded
