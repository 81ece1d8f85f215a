"""Weights of any size and form of words: their tiles are their codes, padded with zero points."""

import dataclasses

import numpy as np
import pytest

from jax_marlin.canonical import CanonicalLinear, concat_columns
from jax_marlin.layout import unpack_tiles
from jax_marlin.pack_canonical import pack_canonical
from jax_marlin.quant_spec import QuantSpec
from jax_marlin.words import pack_awq

GROUP = 32


def random_weight(k, n, *, bits=4, order=False, zeros=True) -> CanonicalLinear:
    rng = np.random.default_rng(k + n)
    groups = -(-k // GROUP)
    return CanonicalLinear.from_codes(
        rng.integers(0, 2**bits, (k, n), np.uint8),
        np.ones((groups, n), np.float32),
        rng.integers(0, 2**bits, (groups, n), np.uint8) if zeros else None,
        rng.permutation(k).astype(np.int32) if order else None,
        bits=bits,
    )


def as_awq(weight: CanonicalLinear) -> CanonicalLinear:
    return dataclasses.replace(weight, words=pack_awq(weight.codes), awq=True)


def tiles_of(*weights: CanonicalLinear) -> np.ndarray:
    (k, n), bits = weights[0].shape, weights[0].bits
    spec = QuantSpec.create(bits=bits, group_size=GROUP, k=k, n=n)
    for weight in weights:
        weight.check(spec, "test")
    out = np.zeros((len(weights), spec.n_tiles, spec.k_tiles, spec.words_per_tile), np.uint32)
    pack_canonical(weights, spec, out)
    return out


def padded_codes(weight: CanonicalLinear) -> np.ndarray:
    (k, n), middle = weight.shape, 2 ** (weight.bits - 1)
    codes = np.pad(weight.codes, ((0, -k % 64), (0, -n % 64)), constant_values=middle)
    if weight.zero_points is not None:
        codes[k:, :n] = weight.zero_points[-1]
    return codes


@pytest.mark.parametrize("k, n", [(64, 64), (96, 72), (128, 200), (99, 64), (160, 128)])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("form", ["4 bit", "8 bit", "4 bit in order", "8 bit in order", "awq"])
def test_tiles_hold_the_codes_and_the_zero_point(k, n, zeros, form):
    bits = 8 if form.startswith("8") else 4
    weight = random_weight(k, n, bits=bits, order="order" in form, zeros=zeros)
    if form == "awq":
        weight = as_awq(weight)
    np.testing.assert_array_equal(
        unpack_tiles(tiles_of(weight)[0], bits), padded_codes(weight), strict=True
    )


def test_weights_of_several_forms_are_packed_together():
    k, n = 96, 72
    plain, in_order = random_weight(k, n), random_weight(k, n, order=True)
    weights = [plain, in_order, as_awq(plain), in_order]
    for chosen in (weights, weights[1::2], [plain, plain]):
        expected = np.concatenate([tiles_of(weight) for weight in chosen])
        np.testing.assert_array_equal(tiles_of(*chosen), expected)


def test_a_window_of_awq_words():
    weight = random_weight(128, 192)
    rows, columns = range(32, 96), range(64, 136)
    window = as_awq(weight).window(rows, columns, GROUP)
    expected = weight.window(rows, columns, GROUP)
    assert window.shape == expected.shape == (64, 72)
    np.testing.assert_array_equal(window.codes, expected.codes)
    np.testing.assert_array_equal(window.zero_points, expected.zero_points)
    np.testing.assert_array_equal(tiles_of(window), tiles_of(expected))


@pytest.mark.parametrize("first, second", [(True, True), (True, False), (False, True)])
def test_joined_columns_of_awq_words(first, second):
    a, b = random_weight(64, 64), random_weight(64, 72)
    expected = tiles_of(concat_columns(a, b))
    joined = concat_columns(as_awq(a) if first else a, as_awq(b) if second else b)
    np.testing.assert_array_equal(tiles_of(joined), expected)
    assert joined.awq == (first and second)


def test_awq_words_have_4_bits_and_no_order_of_their_own():
    weight = as_awq(random_weight(64, 64))
    permuted = dataclasses.replace(weight, perm=np.arange(64, dtype=np.int32)[::-1].copy())
    with pytest.raises(ValueError, match="words in AWQ's form have 4 bits and a perm, expected 4 "):
        tiles_of(permuted)


def test_awq_words_of_another_shape_are_refused():
    weight = as_awq(random_weight(64, 64))
    cut = dataclasses.replace(weight, words=weight.words[:32])
    with pytest.raises(ValueError, match=r"words has shape \(32, 8\), expected \(K, N / 8\)"):
        tiles_of(cut)
