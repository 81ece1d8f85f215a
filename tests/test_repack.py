"""Words of files to packed tiles: equal to packing code after code, for any words and order."""

import awq_tensors
import numpy as np
import oracle
import pytest

from jax_marlin import repack, repack_rows
from jax_marlin.layout import pack_tiles
from jax_marlin.repack import pack_words
from jax_marlin.repack_rows import pack_awq_words, pack_words_in_order
from jax_marlin.words import (
    exchange,
    exchange_neighbours,
    pack_awq,
    pack_rows,
    transpose_fields,
    unpack_awq,
    unpack_rows,
)


def random_words(bits, k, n):
    return np.random.default_rng(k + n).integers(0, 2**32, (k * bits // 32, n), np.uint32)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("k, n", [(64, 64), (192, 320), (1088, 128)])
@pytest.mark.parametrize("block_words", [1, 2**12, 2**17])
def test_packed_words_are_packed_codes(monkeypatch, bits, k, n, block_words):
    monkeypatch.setattr(repack, "WORDS_AT_ONCE", block_words)
    words = [random_words(bits, k, n), random_words(bits, k, n)[::-1]]
    words.append(np.ascontiguousarray(words[0].T).T)
    expected = [pack_tiles(unpack_rows(one, bits), bits) for one in words]
    np.testing.assert_array_equal(pack_words(words, bits), expected, strict=True)


def test_packing_writes_into_a_part_of_a_stack():
    words = [random_words(4, 128, 192)]
    out = np.zeros((2, 5, 2, 512), np.uint32)
    pack_words(words, 4, out[1:, 1:4])
    np.testing.assert_array_equal(out[1:, 1:4], pack_words(words, 4))
    assert not out[0].any() and not out[1, 0].any() and not out[1, 4].any()


@pytest.mark.parametrize("shape", [(7, 64), (8, 96)])
def test_words_off_the_tile_are_refused(shape):
    with pytest.raises(ValueError, match=r"pack_words: words have shape .* 8 and 64; pad"):
        pack_words([np.zeros(shape, np.uint32)], 4)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("k", [1, 5, 8, 96, 99])
def test_rows_of_codes_and_words(bits, k):
    codes = np.random.default_rng(k).integers(0, 2**bits, (k, 7), np.uint8)
    words = pack_rows(codes, bits)
    if k * bits % 32 == 0:
        np.testing.assert_array_equal(words.view(np.int32), oracle.pack_rows(codes, bits))
    np.testing.assert_array_equal(unpack_rows(words, bits)[:k], codes, strict=True)
    assert not unpack_rows(words, bits)[k:].any()


@pytest.mark.parametrize("shift", [4, 8, 16])
def test_exchanging_fields(shift):
    x, y = np.random.default_rng(shift).integers(0, 2**32, (2, 9), np.uint32)
    fields = 2**shift - 1
    expected_x, expected_y = x.copy(), y.copy()
    for low in range(0, 32, 2 * shift):
        high = low + shift
        expected_x &= ~np.uint32(fields << high)
        expected_x |= (y >> np.uint32(low) & np.uint32(fields)) << np.uint32(high)
        expected_y &= ~np.uint32(fields << low)
        expected_y |= (x >> np.uint32(high) & np.uint32(fields)) << np.uint32(low)
    exchange(x, y, shift, np.empty_like(x))
    np.testing.assert_array_equal(x, expected_x)
    np.testing.assert_array_equal(y, expected_y)


@pytest.mark.parametrize("bits", [4, 8])
def test_transposed_fields(bits):
    count = 32 // bits
    matrix = np.random.default_rng(bits).integers(0, 2**32, (count, 3, 5), np.uint32)
    shifts = np.arange(0, 32, bits, dtype=np.uint32).reshape(-1, 1, 1, 1)
    expected = (matrix >> shifts & np.uint32(2**bits - 1)).swapaxes(0, 1)  # [word, field, ...]
    transpose_fields(matrix, bits)
    np.testing.assert_array_equal(matrix >> shifts & np.uint32(2**bits - 1), expected)


def test_exchanging_fields_of_neighbours():
    words = np.random.default_rng(0).integers(0, 2**32, (3, 10), np.uint32)
    even, odd = words[:, 0::2].copy(), words[:, 1::2].copy()
    for shift in (4, 8, 16):
        exchange(even, odd, shift, np.empty_like(even))
        exchange_neighbours(words, shift)
    np.testing.assert_array_equal(words[:, 0::2], even)
    np.testing.assert_array_equal(words[:, 1::2], odd)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("k, n", [(64, 64), (192, 320), (1088, 128)])
@pytest.mark.parametrize("block_words", [1, 2**12, 2**19])
def test_rows_packed_in_another_order(monkeypatch, bits, k, n, block_words):
    monkeypatch.setattr(repack_rows, "WORDS_AT_ONCE", block_words)
    words, rng = random_words(bits, k, n), np.random.default_rng(k)
    orders = [rng.permutation(k), rng.permutation(k)]
    expected = [pack_tiles(unpack_rows(words, bits)[order], bits) for order in orders]
    out = np.zeros_like(expected)
    pack_words_in_order([words, np.ascontiguousarray(words.T).T], orders, bits, out)
    np.testing.assert_array_equal(out, expected, strict=True)


@pytest.mark.parametrize("k, n", [(64, 64), (192, 320), (1088, 128)])
@pytest.mark.parametrize("block_words", [1, 2**12, 2**19])
def test_packed_awq_words_are_packed_codes(monkeypatch, k, n, block_words):
    monkeypatch.setattr(repack_rows, "WORDS_AT_ONCE", block_words)
    codes = np.random.default_rng(k).integers(0, 16, (k, n), np.uint8)
    words = awq_tensors.pack_columns(codes).view(np.uint32)
    np.testing.assert_array_equal(pack_awq(codes), words, strict=True)
    np.testing.assert_array_equal(unpack_awq(words), codes, strict=True)
    wider = np.zeros((k, n // 8 + 3), np.uint32)
    wider[:, 1:-2] = words
    out = np.zeros((2, n // 64, k // 64, 512), np.uint32)
    pack_awq_words([words, wider[:, 1:-2]], out)
    np.testing.assert_array_equal(out, [pack_tiles(codes, 4)] * 2, strict=True)
