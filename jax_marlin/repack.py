"""Words along K, as files hold them, to packed tiles; no code is taken out of its word.

By index bits, named as in `layout`, with c = 2 c1 + c0:

    4 bit   word of row (kt, j, h), column (nt, w, b, g), holds nibbles (c1, c0, l)
            word of tile (nt, kt), place (w, g, c1, c0, j), holds nibbles (l, h, b)
    8 bit   word of row (kt, j, h, c1), column (nt, w, b, g), holds bytes (c0, l)
            word of tile (nt, kt), place (w, g, c1, c0, j, l), holds bytes (h, b)

An exchange swaps one bit that chooses a word with one that chooses a place, for all words at once.
At 4 bit three do it: b with l (which then chooses a word), l with c1, h with c0. At 8 bit two do: h
with c0, b with l. What remains is to store words in another order, in fours. All of it runs
on blocks that stay in the cache, where NumPy lets go of the interpreter's lock.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jax_marlin.layout import TILE
from jax_marlin.words import WORDS_AT_ONCE, exchange

_LINE = 16  # words of a line of the cache
_RUN = np.dtype("V32")  # eight words along g, which NumPy moves as one item
_QUAD = np.dtype(np.complex128)  # four words along j, likewise


def pack_words(words: Sequence[np.ndarray], bits: int, out: np.ndarray | None = None) -> np.ndarray:
    """`layout.pack_tiles` of the codes that `words` hold.

    Args:
        words: of each of E experts uint32 [K / P, N], P = 32 / bits codes along K in a word, the
            first lowest; K and N multiples of 64. May be views in any order.
        bits: 4 or 8.
        out: uint32 [E, N/64, K/64, 512 or 1024] to write to; None makes one.

    Returns:
        `out`.

    Raises:
        ValueError: K or N is not a multiple of 64.

    >>> from jax_marlin.layout import pack_tiles
    >>> from jax_marlin.words import unpack_rows
    >>> words = np.random.default_rng(0).integers(0, 2**32, (8, 64), np.uint32)
    >>> bool((pack_words([words], 4)[0] == pack_tiles(unpack_rows(words, 4), 4)).all())
    True
    """
    rows_of_tile = TILE * bits // 32  # 8 or 16
    rows, n = words[0].shape
    if rows % rows_of_tile or n % TILE:
        raise ValueError(
            f"pack_words: words have shape {(rows, n)}, expected multiples of {rows_of_tile} and "
            f"{TILE}; pad them first"
        )
    k_tiles, n_tiles = rows // rows_of_tile, n // TILE
    if out is None:
        out = np.empty((len(words), n_tiles, k_tiles, TILE * rows_of_tile), np.uint32)
    # A tile row of `out` is contiguous along K, so blocks are as long in K as they may be.
    tiles = max(1, WORDS_AT_ONCE // (len(words) * TILE * rows_of_tile))
    k_step = min(k_tiles, max(1, tiles // 4))
    n_step = max(1, tiles // k_step)
    for nt in range(0, n_tiles, n_step):
        for kt in range(0, k_tiles, k_step):
            height = slice(kt * rows_of_tile, (kt + k_step) * rows_of_tile)
            width = slice(nt * TILE, (nt + n_step) * TILE)
            blocks = [_contiguous(one[height, width]) for one in words]
            _pack_blocks(blocks, bits, out[:, nt : nt + n_step, kt : kt + k_step])
    return out


def _contiguous(block: np.ndarray) -> np.ndarray:
    """`block`, row after row in memory.

    A transposed one is copied twice: where its columns lie a power of two apart, they share a set
    of the cache, and reading across them would miss at each word.
    """
    if abs(block.strides[0]) < abs(block.strides[1]):
        rows, n = block.shape
        columns = np.empty((n, rows + _LINE), np.uint32)[:, :rows]
        columns[...] = block.T
        block = columns.T
    return np.ascontiguousarray(block)


def _pack_blocks(words: Sequence[np.ndarray], bits: int, out: np.ndarray) -> None:
    experts, n_tiles, k_tiles, _ = out.shape
    last = 1 if bits == 4 else 2  # c1 stands in the row at 8 bit
    # x[h, b]: [expert, kt, j, c1, nt, w, g]; below, kt counts on from expert to expert
    parts = np.empty((2, 2, experts, k_tiles * 4, last, n_tiles * 4), _RUN)
    for e, one in enumerate(words):
        runs = one.view(_RUN).reshape(k_tiles * 4, 2, last, n_tiles * 4, 2)
        parts[:, :, e] = runs.transpose(1, 4, 0, 2, 3)
    x = parts.view(np.uint32).reshape(2, 2, -1)
    scratch = np.empty_like(x[0])
    if bits == 4:
        exchange(x[:, 0], x[:, 1], 4, scratch)  # x[h, l], places (c1, c0, b)
        exchange(x[:, 0], x[:, 1], 16, scratch)  # x[h, c1], places (l, c0, b)
        exchange(x[0], x[1], 8, scratch)  # x[c0, c1], places (l, h, b)
        planes = x.reshape(2, 2, experts * k_tiles, 2, 2, -1)  # c0 c1 kt j1 j0 (nt w g)
        planes = planes.transpose(1, 0, 2, 5, 3, 4)  # c1 c0 kt (nt w g) j1 j0
    else:
        exchange(x[0], x[1], 16, scratch)  # x[c0, b], places (h, l)
        exchange(x[:, 0], x[:, 1], 8, scratch)  # x[c0, l], places (h, b)
        planes = x.reshape(2, 2, experts * k_tiles, 2, 2, 2, -1)  # c0 l kt j1 j0 c1 (nt w g)
        planes = planes.transpose(5, 0, 3, 2, 6, 4, 1)  # c1 c0 j1 kt (nt w g) j0 l
    *lead, rows, columns, _, _ = planes.shape
    quads = np.empty((*lead, rows, columns, 4), np.uint32)
    for place in range(4):  # one after the other, so that NumPy's inner loop is long
        quads[..., place] = planes[..., place // 2, place % 2]
    quads = quads.view(_QUAD).reshape(*lead, experts, k_tiles, n_tiles, 32)
    tiles = out.view(_QUAD).reshape(experts, n_tiles, k_tiles, 32, *lead)
    for place in np.ndindex(*lead):
        tiles[(..., *place)] = quads[place].swapaxes(1, 2)
