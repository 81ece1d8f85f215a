"""Words of one row to packed tiles: AWQ's, and those that act-order takes in another order.

A word holds P = 32 / bits columns of one row, so that rows are runs of memory. By index bits, named
as in `layout`, with c = 2 c1 + c0, w = 2 w1 + w0, g = 4 g2 + 2 g1 + g0:

    AWQ, 4 bit          word of row k, column (nt, w, b), holds nibbles (g0, g2, g1)
    in order, 4 bit     word of row k, column (nt, g), holds nibbles (w1, w0, b)
              8 bit     word of row k, column (nt, w1, g), holds bytes (w0, b)

A word of a tile holds (l, h, b), or (h, b). With b for g1 in AWQ's words, it is rows that exchange
the rest: l with the first nibble, and h with the next (`repack` says what an exchange is). Rows are
then kept in the order of a thread's words, so that what remains is a transpose.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jax_marlin.layout import TILE
from jax_marlin.words import WORDS_AT_ONCE, exchange, exchange_neighbours, transpose_fields

_RUN = np.dtype("V32")  # eight words along g, which NumPy moves as one item


def pack_awq_words(words: Sequence[np.ndarray], out: np.ndarray) -> None:
    """`layout.pack_tiles` of the codes that AWQ's words hold.

    Args:
        words: of each of E experts uint32 [K, N / 8], 8 codes along N in a word, in AWQ's order; K
            and N multiples of 64.
        out: uint32 [E, N/64, K/64, 512] to write to.

    >>> out = np.empty((1, 1, 1, 512), np.uint32)
    >>> pack_awq_words([np.full((64, 8), 0x77777777, np.uint32)], out)
    >>> hex(out[0, 0, 0, 9])
    '0x77777777'
    """
    experts, n_tiles, k_tiles, _ = out.shape
    k_step = max(1, WORDS_AT_ONCE // (experts * n_tiles * 8 * TILE))
    for kt in range(0, k_tiles, k_step):
        steps = min(k_step, k_tiles - kt)
        x = np.empty((2, 2, experts, steps, 4, 4, n_tiles * 8), np.uint32)
        for e, one in enumerate(words):
            rows = one[kt * TILE : (kt + steps) * TILE]
            rows = rows.reshape(steps, 4, 2, 4, 2, n_tiles * 8)  # kt j h c l (nt w b)
            x[:, :, e] = rows.transpose(4, 2, 0, 3, 1, 5)  # l h kt c j (nt w b)
        exchange_neighbours(x, 4)  # columns (nt, w, g1), nibbles (g0, g2, b)
        _exchange_rows(x, 4)  # x[g0, g2]
        tiles = out[:, :, kt : kt + steps].reshape(experts, n_tiles, steps, 4, 2, 2, 2, 16)
        tiles = tiles.transpose(6, 4, 0, 2, 7, 1, 3, 5)  # g0 g2 expert kt (c j) nt w g1
        tiles[...] = x.reshape(tiles.shape)


def pack_words_in_order(
    words: Sequence[np.ndarray], orders: Sequence[np.ndarray], bits: int, out: np.ndarray
) -> None:
    """`layout.pack_tiles` of the codes that words along K hold, rows in another order.

    Args:
        words: of each of E experts uint32 [K / P, N], P codes along K in a word, the first lowest;
            K and N multiples of 64. May be views in any order.
        orders: of each expert integers [K], row i of the tiles is row `order[i]` of the codes.
        bits: 4 or 8.
        out: uint32 [E, N/64, K/64, 512 or 1024] to write to.

    >>> from jax_marlin.layout import unpack_tiles
    >>> from jax_marlin.words import unpack_rows
    >>> words = np.random.default_rng(0).integers(0, 2**32, (8, 64), np.uint32)
    >>> order, out = np.arange(64)[::-1], np.empty((1, 1, 1, 512), np.uint32)
    >>> pack_words_in_order([words], [order], 4, out)
    >>> bool((unpack_tiles(out[0], 4) == unpack_rows(words, 4)[order]).all())
    True
    """
    (experts, n_tiles, k_tiles, _), rows, fields = out.shape, words[0].shape[0], 32 // bits
    order = np.stack(orders)  # [expert, K]
    source = order % fields * experts + np.arange(experts)[:, None]
    source = source * rows + order // fields  # where transposed rows stand
    source = source.reshape(experts, k_tiles, 4, 2, 4, 2)  # expert kt j h c l
    source = source.transpose(*((5, 3, 0, 1, 4, 2) if bits == 4 else (3, 0, 1, 4, 2, 5)))
    n_step = max(1, WORDS_AT_ONCE // (experts * rows * TILE))
    for nt in range(0, n_tiles, n_step):
        steps = min(n_step, n_tiles - nt)
        matrix = np.empty((fields, experts, rows, steps * 8 // fields), _RUN)
        for e, one in enumerate(words):
            block = np.ascontiguousarray(one[:, nt * TILE : (nt + steps) * TILE])
            runs = block.view(_RUN).reshape(rows, -1, fields)
            matrix[:, e] = runs.transpose(2, 0, 1)
        matrix = matrix.view(np.uint32)
        transpose_fields(matrix, bits)
        x = matrix.reshape(fields * experts * rows, -1).take(source, axis=0, mode="clip")
        _exchange_rows(x, bits)  # x[w1, w0], or x[w0]
        tiles = out[:, nt : nt + steps].reshape(experts, steps, k_tiles, 2, 2, 8, -1)
        if bits == 4:
            tiles = tiles.transpose(3, 4, 0, 2, 6, 1, 5)  # w1 w0 expert kt (c j) nt g
        else:
            tiles = tiles.transpose(4, 0, 2, 6, 1, 3, 5)  # w0 expert kt (c j l) nt w1 g
        tiles[...] = x.reshape(tiles.shape)


def _exchange_rows(x: np.ndarray, bits: int) -> None:
    """Brings l and h of x[l, h], or h of x[h], into the upper places of words, in place."""
    scratch = np.empty_like(x[0])
    exchange(x[0], x[1], 16, scratch)
    if bits == 4:
        exchange(x[:, 0], x[:, 1], 8, scratch.reshape(x[:, 0].shape))
