"""Packing by the extension, and by NumPy where there is none: equal to packing code after code."""

import numpy as np
import pytest

from jax_marlin import native_repack
from jax_marlin.layout import pack_tiles
from jax_marlin.words import pack_awq, unpack_rows

SHAPES = [(64, 64), (192, 320), (1088, 128)]


@pytest.fixture(params=["extension", "numpy"])
def packer(request, monkeypatch):
    if request.param == "numpy":
        monkeypatch.setattr(native_repack, "extension", lambda: None)
    elif native_repack.extension() is None:
        pytest.skip("the extension is not built here")


def random_words(bits, k, n):
    return np.random.default_rng(k + n).integers(0, 2**32, (k * bits // 32, n), np.uint32)


def unaligned(words):
    """The same words from a byte that no word may begin at, and read-only, as files are mapped."""
    raw = np.zeros(words.nbytes + 1, np.uint8)
    raw[1:] = np.ascontiguousarray(words).view(np.uint8).reshape(-1)
    moved = raw[1:].view(np.uint32).reshape(words.shape)
    moved.flags.writeable = False
    return moved


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("k, n", SHAPES)
def test_words_in_any_order_of_memory(packer, bits, k, n):
    first = random_words(bits, k, n)
    words = [first, first[::-1], np.ascontiguousarray(first.T).T, unaligned(first)]
    words.append(np.repeat(first, 3, axis=1)[:, 1::3])
    expected = np.stack([pack_tiles(unpack_rows(one, bits), bits) for one in words])
    out = np.zeros((len(words), n // 64 + 2, *expected.shape[2:]), np.uint32)
    native_repack.pack_words(words, None, bits, out[:, 1:-1])
    np.testing.assert_array_equal(out[:, 1:-1], expected)
    assert not out[:, 0].any() and not out[:, -1].any()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("k, n", SHAPES)
def test_rows_in_another_order(packer, bits, k, n):
    words, rng = random_words(bits, k, n), np.random.default_rng(k)
    orders = [rng.permutation(k), rng.permutation(k).astype(np.int32)]
    expected = [pack_tiles(unpack_rows(words, bits)[order], bits) for order in orders]
    out = np.zeros_like(expected)
    native_repack.pack_words([words, np.ascontiguousarray(words.T).T], orders, bits, out)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("k, n", SHAPES)
def test_awq_words(packer, k, n):
    codes = np.random.default_rng(k).integers(0, 16, (k, n), np.uint8)
    words = pack_awq(codes)
    wider = np.zeros((k, n // 8 + 3), np.uint32)
    wider[:, 1:-2] = words
    same = [words, wider[:, 1:-2], unaligned(words), np.ascontiguousarray(words.T).T]
    out = np.zeros((len(same), n // 64, k // 64, 512), np.uint32)
    native_repack.pack_awq_words(same, out)
    np.testing.assert_array_equal(out, [pack_tiles(codes, 4)] * len(same))


@pytest.mark.parametrize(
    ("words", "order", "bits", "out", "message"),
    [
        ((8, 64), None, 4, (1, 2, 512), "one tile for each 64 x 64 codes"),
        ((8, 128), None, 4, (1, 1, 512), "one tile for each 64 x 64 codes"),
        ((7, 64), None, 4, (1, 1, 512), "one tile for each 64 x 64 codes"),
        ((8, 64), None, 8, (1, 1, 1024), "one tile for each 64 x 64 codes"),
        ((16, 64), None, 8, (1, 1, 512), "each contiguous"),
        ((8, 64), None, 3, (1, 1, 512), "bits is neither 4 nor 8"),
        ((8, 64), None, 0, (1, 1, 512), "bits is neither 4 nor 8"),
        ((8, 64), 63, 4, (1, 1, 512), "not as long as K"),
        ((8, 64), -64, 4, (1, 1, 512), "a row outside"),
    ],
)
def test_what_does_not_fit_is_refused(words, order, bits, out, message):
    if (extension := native_repack.extension()) is None:
        pytest.skip("the extension is not built here")
    order = None if order is None else np.arange(order) if order > 0 else np.arange(64) + 1
    arrays = np.zeros(words, np.uint32), order, bits, np.zeros(out, np.uint32)
    with pytest.raises(ValueError, match=message):
        extension.pack_words(*arrays)


def test_tiles_of_another_dtype_are_refused():
    """A copy of them would be written to, and lost."""
    if (extension := native_repack.extension()) is None:
        pytest.skip("the extension is not built here")
    with pytest.raises(TypeError):
        extension.pack_words(np.zeros((8, 64), np.uint32), None, 4, np.zeros((1, 1, 512), np.int32))


def test_an_extension_of_an_older_checkout_is_passed_over(monkeypatch):
    monkeypatch.setattr(native_repack.importlib, "import_module", lambda name: object())
    assert native_repack.extension.__wrapped__() is None
