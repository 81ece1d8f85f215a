"""Words along K, as files hold them, to packed tiles; no code is taken out of its word.

By index bits, named as in `layout`, with c = 2 c1 + c0:

    4 bit   word of row (kt, j, h), column (nt, w, b, g), holds nibbles (c1, c0, l)
            word of tile (nt, kt), place (w, g, c1, c0, j), holds nibbles (l, h, b)
    8 bit   word of row (kt, j, h, c1), column (nt, w, b, g), holds bytes (c0, l)
            word of tile (nt, kt), place (w, g, c1, c0, j, l), holds bytes (h, b)

So the four words that differ in h and b become the four that differ in the two places they held
highest: h changes with the place of 16 bits, b with that of 8. At 4 bit the nibbles of a word then
are (h, b, l), and two swaps of neighbours make them (l, h, b). What remains is to store words in
another order. All of it runs on blocks that stay in the cache, at more than 1 GB a second on one
core, where NumPy lets go of the interpreter's lock.
"""

from __future__ import annotations

import numpy as np

from jax_marlin.layout import TILE
from jax_marlin.words import exchange, swap_places

_BLOCK_WORDS = 2**17  # words packed at once; they and their copies fill a core's cache
_RUN = np.dtype(np.complex128)  # 16 bytes, four words, which NumPy moves as one item


def pack_words(words: np.ndarray, bits: int, out: np.ndarray | None = None) -> np.ndarray:
    """`layout.pack_tiles` of the codes that `words` hold.

    Args:
        words: uint32 [K / P, N], P = 32 / bits codes along K in a word, the first lowest; K and N
            multiples of 64. May be a view in any order.
        bits: 4 or 8.
        out: uint32 [N/64, K/64, 512 or 1024] to write to; None makes one.

    Returns:
        `out`.

    Raises:
        ValueError: K or N is not a multiple of 64.

    >>> from jax_marlin.layout import pack_tiles
    >>> from jax_marlin.words import unpack_rows
    >>> words = np.random.default_rng(0).integers(0, 2**32, (8, 64), np.uint32)
    >>> bool((pack_words(words, 4) == pack_tiles(unpack_rows(words, 4), 4)).all())
    True
    """
    rows_of_tile = TILE * bits // 32  # 8 or 16
    rows, n = words.shape
    if rows % rows_of_tile or n % TILE:
        raise ValueError(
            f"pack_words: words have shape {words.shape}, expected multiples of {rows_of_tile} and "
            f"{TILE}; pad them first"
        )
    k_tiles, n_tiles = rows // rows_of_tile, n // TILE
    if out is None:
        out = np.empty((n_tiles, k_tiles, TILE * rows_of_tile), np.uint32)
    # A tile row of `out` is contiguous along K, so blocks are as long in K as they may be.
    k_step = min(k_tiles, max(1, _BLOCK_WORDS // (4 * TILE * rows_of_tile)))
    n_step = max(1, _BLOCK_WORDS // (k_step * TILE * rows_of_tile))
    for nt in range(0, n_tiles, n_step):
        for kt in range(0, k_tiles, k_step):
            block = words[
                kt * rows_of_tile : (kt + k_step) * rows_of_tile, nt * TILE : (nt + n_step) * TILE
            ]
            _pack_block(np.ascontiguousarray(block), bits, out[nt : nt + n_step, kt : kt + k_step])
    return out


def _pack_block(words: np.ndarray, bits: int, out: np.ndarray) -> None:
    rows, n = words.shape
    k_tiles, n_tiles = rows * 32 // bits // TILE, n // TILE
    last = 1 if bits == 4 else 2  # c1 stands in the row at 8 bit
    # parts[h, b]: [kt, j, c1, nt, w, g], moved as runs of four words along g
    runs = words.view(_RUN).reshape(k_tiles * 4, 2, last, n // 16, 2, 2)
    parts = np.empty((2, 2, k_tiles * 4, last, n // 16, 2), _RUN)
    for h, b, half in np.ndindex(2, 2, 2):
        parts[h, b, ..., half] = runs[:, h, :, :, b, half]
    (x0, x1), (x2, x3) = parts.view(np.uint32).reshape(2, 2, -1)
    scratch = np.empty_like(x0)
    for x, y in ((x0, x2), (x1, x3)):
        exchange(x, y, 16, scratch)
    for x, y in ((x0, x1), (x2, x3)):
        exchange(x, y, 8, scratch)
    for place, x in enumerate((x0, x1, x2, x3)):
        planes = x.reshape(k_tiles, 4 * last, n_tiles, 32)  # kt (j c1) nt wg
        if bits == 4:
            swap_places(x, 4, scratch)  # nibbles (h, b, l) to (h, l, b)
            swap_places(x, 8, scratch)  # (h, l, b) to (l, h, b)
            tiles = out.reshape(n_tiles, k_tiles, 32, 4, 4)[..., place, :]  # nt kt wg j
        else:
            tiles = out.reshape(n_tiles, k_tiles, 32, 2, 2, 4, 2)  # nt kt wg c1 c0 j l
            tiles = tiles[..., place // 2, :, place % 2]  # nt kt wg c1 j
        for j, c1 in np.ndindex(4, last):
            target = tiles[..., j] if bits == 4 else tiles[..., c1, j]
            target[...] = planes[:, j * last + c1].transpose(1, 0, 2)
