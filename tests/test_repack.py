"""Words along K to packed tiles: equal to packing the codes one by one, for any words and order."""

import numpy as np
import oracle
import pytest

from jax_marlin import repack
from jax_marlin import words as words_module
from jax_marlin.layout import pack_tiles
from jax_marlin.repack import pack_words
from jax_marlin.words import exchange, pack_rows, take_rows, transpose_fields, unpack_rows


def random_words(bits, k, n):
    return np.random.default_rng(k + n).integers(0, 2**32, (k * bits // 32, n), np.uint32)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("k, n", [(64, 64), (192, 320), (1088, 128)])
@pytest.mark.parametrize("block_words", [1, 2**12, 2**17])
def test_packed_words_are_packed_codes(monkeypatch, bits, k, n, block_words):
    monkeypatch.setattr(repack, "_BLOCK_WORDS", block_words)
    words = random_words(bits, k, n)
    expected = pack_tiles(unpack_rows(words, bits), bits)
    np.testing.assert_array_equal(pack_words(words, bits), expected, strict=True)
    transposed = np.ascontiguousarray(words.T).T
    np.testing.assert_array_equal(pack_words(transposed, bits), expected, strict=True)


def test_packing_writes_into_a_part_of_a_stack():
    words = random_words(4, 128, 192)
    out = np.zeros((2, 5, 2, 512), np.uint32)
    pack_words(words, 4, out[1, 1:4])
    np.testing.assert_array_equal(out[1, 1:4], pack_words(words, 4))
    assert not out[0].any() and not out[1, 0].any() and not out[1, 4].any()


@pytest.mark.parametrize("shape", [(7, 64), (8, 96)])
def test_words_off_the_tile_are_refused(shape):
    with pytest.raises(ValueError, match=r"pack_words: words have shape .* 8 and 64; pad"):
        pack_words(np.zeros(shape, np.uint32), 4)


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


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("k, n, width", [(64, 1, 16), (40, 300, 2), (99, 130, 16), (5, 7, 1)])
def test_rows_of_words_in_another_order(monkeypatch, bits, k, n, width):
    monkeypatch.setattr(words_module, "_TAKEN_AT_ONCE", 1)
    monkeypatch.setattr(words_module, "_MIN_RUN", width)
    rng = np.random.default_rng(k)
    codes, order = rng.integers(0, 2**bits, (k, n), np.uint8), rng.permutation(k)
    taken = take_rows(pack_rows(codes, bits), order, bits)
    np.testing.assert_array_equal(unpack_rows(taken, bits)[:k], codes[order], strict=True)
