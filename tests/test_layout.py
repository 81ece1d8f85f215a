"""The packed layout: golden words, an independent loop, exact inverses on NumPy and JAX arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_marlin.layout import pack_columns, pack_tiles, unpack_columns, unpack_tiles

# (..., K, N): one tile, several tiles both ways, one and two leading axes; all sizes distinct
SHAPES = [(64, 64), (128, 192), (3, 64, 128), (2, 5, 192, 64)]


def golden_codes(bits: int) -> np.ndarray:
    """A tile in which every index bit of k and n changes the code."""
    k, n = np.arange(64)[:, None], np.arange(64)[None]
    of_n = 3 * n + n // 8
    return ((k + k // 16 + of_n) % 16 if bits == 4 else (5 * k + of_n) % 256).astype(np.uint8)


# Derived by hand: thread 0; thread 87 (w 2, g 5, c 3: n = 37 and 45) in step 1; the last word.
GOLDEN_4 = {0: 0x29A11890, 4 * 87 + 1: 0xC34BB23A, 511: 0x6DE55CD4}
GOLDEN_8 = {0: 0x41281900, 1: 0x462D1E05, 8 * 87 + 3: 0x270EFFE6, 1023: 0xFFE6D7BE}


@pytest.mark.parametrize("bits, golden", [(4, GOLDEN_4), (8, GOLDEN_8)])
def test_golden_tile(bits, golden):
    tile = pack_tiles(golden_codes(bits), bits)[0, 0]
    assert {word: int(tile[word]) for word in golden} == golden


def loop_packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """[K, N] packed code by code from the formula of DESIGN section 3."""
    k_size, n_size = codes.shape
    out = np.zeros((n_size // 64, k_size // 64, 128 * bits), np.uint32)
    for k in range(k_size):
        for n in range(n_size):
            w, b, g = n % 64 // 16, n % 16 // 8, n % 8
            j, h, c, l_ = k % 64 // 16, k % 16 // 8, k % 8 // 2, k % 2
            t = 32 * w + 4 * g + c
            p = (b + 2 * h) + 4 * l_
            word, place = (4 * t + j, p) if bits == 4 else (8 * t + 2 * j + (p >> 2), p & 3)
            out[n // 64, k // 64, word] |= np.uint32(int(codes[k, n]) << (bits * place))
    return out


@pytest.mark.parametrize("bits", [4, 8])
def test_packing_follows_the_formula_code_by_code(bits):
    codes = np.random.default_rng(bits).integers(0, 2**bits, (128, 192), dtype=np.uint8)
    np.testing.assert_array_equal(pack_tiles(codes, bits), loop_packed(codes, bits), strict=True)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_unpacking_inverts_packing_on_numpy_and_jax(shape, bits):
    codes = np.random.default_rng(1).integers(0, 2**bits, shape, dtype=np.uint8)
    packed = pack_tiles(codes, bits)
    *lead, k, n = shape
    assert packed.shape == (*lead, n // 64, k // 64, 128 * bits)
    np.testing.assert_array_equal(unpack_tiles(packed, bits), codes, strict=True)

    on_device = jnp.asarray(packed)
    modes = [(jax.jit(pack_tiles, static_argnums=1), jax.jit(unpack_tiles, static_argnums=1))]
    modes += [(pack_tiles, unpack_tiles)] if len(shape) == 4 else []  # eager JAX is slow to warm up
    for pack, unpack in modes:
        np.testing.assert_array_equal(
            np.asarray(pack(jnp.asarray(codes), bits)), packed, strict=True
        )
        np.testing.assert_array_equal(np.asarray(unpack(on_device, bits)), codes, strict=True)


@pytest.mark.parametrize("bits", [4, 8])
def test_packing_inverts_unpacking_for_any_words(bits):
    words = np.random.default_rng(2).integers(0, 2**32, (3, 2, 128 * bits), dtype=np.uint32)
    np.testing.assert_array_equal(pack_tiles(unpack_tiles(words, bits), bits), words, strict=True)


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.uint8, np.int64])
def test_codes_of_any_integer_dtype_pack_alike(dtype):
    codes = np.random.default_rng(3).integers(0, 16, (64, 128), dtype=np.uint8)
    packed = pack_tiles(codes.astype(dtype), 4)
    np.testing.assert_array_equal(packed, pack_tiles(codes, 4), strict=True)


def test_codes_of_a_strided_view_pack_right():
    codes = np.random.default_rng(4).integers(0, 16, (192, 64), dtype=np.uint8)
    packed = pack_tiles(codes.T, 4)
    np.testing.assert_array_equal(unpack_tiles(packed, 4), codes.T, strict=True)


def test_one_mask_extracts_both_halves_of_a_register():
    codes = np.random.default_rng(5).integers(0, 16, (64, 64))
    words = pack_tiles(codes, 4)[0, 0].reshape(4, 8, 4, 4)  # [w, g, c, j]
    for b in (0, 1):
        for h in (0, 1):
            pair = (words >> (4 * (b + 2 * h))) & 0x000F000F
            for w, g, c, j in np.ndindex(words.shape):
                n, k = 16 * w + 8 * b + g, 16 * j + 8 * h + 2 * c
                assert pair[w, g, c, j] == codes[k, n] + (codes[k + 1, n] << 16)


def test_a_column_slice_of_codes_is_a_tile_slice():
    codes = np.random.default_rng(6).integers(0, 16, (128, 256), dtype=np.uint8)
    np.testing.assert_array_equal(pack_tiles(codes[:, 64:192], 4), pack_tiles(codes, 4)[1:3])
    np.testing.assert_array_equal(pack_tiles(codes[64:], 4), pack_tiles(codes, 4)[:, 1:])


def test_columns_follow_the_formula():
    a = np.random.default_rng(7).standard_normal((3, 5, 192)).astype(np.float32)
    packed = pack_columns(a)
    assert packed.shape == (3, 3, 5, 64)
    for n in range(192):
        w, b, g = n % 64 // 16, n % 16 // 8, n % 8
        np.testing.assert_array_equal(packed[:, n // 64, :, 16 * w + 2 * g + b], a[..., n])


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32, jnp.uint8])
def test_unpacking_columns_inverts_packing_on_numpy_and_jax(dtype):
    a = np.random.default_rng(8).integers(0, 99, (2, 3, 128)).astype(dtype)
    packed = pack_columns(a)
    np.testing.assert_array_equal(unpack_columns(packed), a, strict=True)
    on_device = jax.jit(pack_columns)(jnp.asarray(a))
    np.testing.assert_array_equal(np.asarray(on_device), packed, strict=True)
    np.testing.assert_array_equal(np.asarray(unpack_columns(on_device)), a, strict=True)


@pytest.mark.parametrize("shape", [(32, 64), (64, 96)])
def test_sizes_off_the_tile_are_refused(shape):
    with pytest.raises(ValueError, match=r"pack_tiles: codes have shape .* multiples of 64; pad"):
        pack_tiles(np.zeros(shape, np.uint8), 4)
    with pytest.raises(ValueError, match=r"pack_columns: array has shape .* multiple of 64; pad"):
        pack_columns(np.zeros((3, 96), np.float16))


def test_tiles_of_another_width_are_refused():
    packed = pack_tiles(np.zeros((64, 128), np.uint8), 4)
    with pytest.raises(
        ValueError, match=r"unpack_tiles: .*expected \[..., N/64, K/64, 1024\] at 8 bit"
    ):
        unpack_tiles(packed, 8)
    with pytest.raises(ValueError, match="unpack_columns: array has shape"):
        unpack_columns(np.zeros((2, 3, 32), np.float16))
    for function, array in [(pack_tiles, np.zeros((64, 64), np.uint8)), (unpack_tiles, packed)]:
        with pytest.raises(ValueError, match=f"{function.__name__}: bits is 3, expected 4 or 8"):
            function(array, 3)
