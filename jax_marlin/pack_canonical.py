"""The words of weights to packed tiles: filled up to whole tiles, then packed as they stand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jax_marlin.canonical import CanonicalLinear
from jax_marlin.layout import TILE
from jax_marlin.native_repack import pack_awq_words, pack_words
from jax_marlin.quant_spec import QuantSpec
from jax_marlin.words import AWQ_COLUMNS, one_in_every_field, pack_awq


def pack_canonical(weights: Sequence[CanonicalLinear], spec: QuantSpec, out: np.ndarray) -> None:
    """Packs the codes of E weights, rows in group order.

    Padding decodes to exactly zero in a kernel that does not mask it: the code is the zero point.

    Args:
        weights: what fits `spec`.
        spec: what each is.
        out: uint32 [E, N/64, K/64, 512 or 1024] to write to, both rounded up.

    >>> spec = QuantSpec.create(bits=4, group_size=32, k=32, n=8)
    >>> weight = CanonicalLinear.from_codes(
    ...     np.full((32, 8), 3, np.uint8), np.ones((1, 8), np.float32), bits=4
    ... )
    >>> out = np.empty((1, 1, 1, 512), np.uint32)
    >>> pack_canonical([weight], spec, out)
    >>> hex(out[0, 0, 0, 0]), hex(out[0, 0, 0, 2])  # rows 0 to 15 of columns 0 and 8, 32 to 47
    ('0x83838383', '0x88888888')
    """
    if len({(weight.awq, weight.perm is None) for weight in weights}) > 1:
        for e, weight in enumerate(weights):
            pack_canonical([weight], spec, out[e : e + 1])
    elif weights[0].awq:
        pack_awq_words([_padded_awq_words(weight, spec) for weight in weights], out)
    else:
        words = [_padded_words(weight, spec) for weight in weights]
        perms = [weight.perm for weight in weights if weight.perm is not None]
        padding = np.arange(spec.k, spec.k_tiles * TILE)
        orders = [np.concatenate([perm, padding]) for perm in perms]
        pack_words(words, orders or None, spec.bits, out)


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
