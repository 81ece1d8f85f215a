"""The packed layout: codes [K, N] <-> words in tensor-core register order, as exact inverses.

Kernels compute Y^T = W^T X^T with `mma.sync.m16n8k16` or `wgmma.m64nNk16`: the weights are operand
A, 16 columns of W by 16 rows of K for each warp w of four, held in registers. In that operand the
thread of row group g (0..7) and column pair c (0..3) holds in register r = b + 2 h two neighbours
along K:

    n = 16 w + 8 b + g        w: n bits 5,4   b: bit 3   g: bits 2,1,0
    k = 16 j + 8 h + 2 c + l  j: k bits 5,4   h: bit 3   c: bits 2,1   l: bit 0

So 12 bits name a code in a 64 x 64 tile: (w, g, c) choose the thread t = 32 w + 4 g + c, j the k16
step, and (b, h, l) a place among the eight codes of that thread and step. A width says only where:

    4 bit: word 4 t + j,          nibble (b + 2 h) + 4 l
    8 bit: word 8 t + 2 j + l,    byte   (b + 2 h)

A thread's words are 16 (or 32) contiguous bytes, one vector load. At 4 bit the two codes of
register b + 2 h lie 16 bits apart, so one AND with 0x000f000f << 4 (b + 2 h) yields both; at 8 bit
they are the same byte of two words. A tile is 2 KiB (4 KiB), and tiles along K follow one another:
uint32 [N/64, K/64, 512 or 1024].

Scales and zero points hold a thread's two columns (b = 0, 1) side by side: [N/64, G, 64] with
column n = 16 w + 8 b + g at 16 w + 2 g + b.

Only operators and methods that NumPy and JAX arrays share are used, so the same code packs on the
host and unpacks under jit.
"""

from __future__ import annotations

from typing import Any

import numpy as np

TILE = 64
PACKED_VERSION = 1  # changes with any change of what packed leaves hold: they are kept on disk

# `Any` below is "a NumPy or JAX array, or a tracer"; what comes out is of the same kind.


def pack_tiles(codes: Any, bits: int) -> Any:
    """Packs codes into tiles.

    Args:
        codes: integers [..., K, N], each below `2**bits` (not checked: a larger one spills into its
            neighbours); K and N multiples of 64.
        bits: 4 or 8.

    Returns:
        uint32 [..., N/64, K/64, 512] at 4 bit, [..., N/64, K/64, 1024] at 8 bit.

    Raises:
        ValueError: K or N is not a multiple of 64, or `bits` is neither 4 nor 8.

    >>> import numpy as np
    >>> codes = np.zeros((64, 128), np.uint8)
    >>> codes[0, 8] = 5  # n = 8: b = 1, so thread 0, word 0, nibble 1
    >>> hex(pack_tiles(codes, bits=4)[0, 0, 0])
    '0x50'
    """
    _check_bits(bits, "pack_tiles")
    *lead, k, n = codes.shape
    if k % TILE or n % TILE:
        raise ValueError(
            f"pack_tiles: codes have shape {tuple(codes.shape)}, expected K and N to be multiples "
            f"of {TILE}; pad them first"
        )
    k_tiles, n_tiles = k // TILE, n // TILE
    # [..., kt, j, h, c, l, N]: words grow along whole rows, which NumPy does at full vector width
    rows = codes.astype(np.uint32).reshape(*lead, k_tiles, 4, 2, 4, 2, n)
    h0, h1 = rows[..., 0, :, :, :], rows[..., 1, :, :, :]  # [..., kt, j, c, l, N]
    if bits == 4:
        h01 = h0 | (h1 << np.uint32(8))
        words = h01[..., 0, :] | (h01[..., 1, :] << np.uint32(16))
        words_of_step = 1  # l is inside the word
    else:
        words = h0 | (h1 << np.uint32(16))
        words_of_step = 2  # l chooses the word
    words = words.reshape(*lead, k_tiles, 4, 4, words_of_step, n_tiles, 4, 2, 8)
    words = words[..., 0, :] | (words[..., 1, :] << np.uint32(bits))  # [..., kt, j, c, l, nt, w, g]
    words = _permute(words, len(lead), (4, 0, 5, 6, 2, 1, 3))  # [..., nt, kt, w, g, c, j, l]
    return words.reshape(*lead, n_tiles, k_tiles, TILE * TILE * bits // 32)


def unpack_tiles(qweight: Any, bits: int) -> Any:
    """The inverse of `pack_tiles`.

    Args:
        qweight: uint32 [..., N/64, K/64, 512 or 1024].
        bits: 4 or 8.

    Returns:
        uint8 [..., K, N].

    Raises:
        ValueError: the last axis is not one tile of `bits`, or `bits` is neither 4 nor 8.

    >>> import numpy as np
    >>> codes = np.arange(64 * 64, dtype=np.uint8).reshape(64, 64) % 16
    >>> bool((unpack_tiles(pack_tiles(codes, 4), 4) == codes).all())
    True
    """
    _check_bits(bits, "unpack_tiles")
    *lead, n_tiles, k_tiles, words = qweight.shape
    if words != TILE * TILE * bits // 32:
        raise ValueError(
            f"unpack_tiles: qweight has shape {tuple(qweight.shape)}, expected "
            f"[..., N/64, K/64, {TILE * TILE * bits // 32}] at {bits} bit"
        )
    k, n = k_tiles * TILE, n_tiles * TILE
    # little endian: byte h + 2 l of a 4-bit word holds both b; an 8-bit word has byte b + 2 h
    data = qweight.view(np.uint8)
    if bits == 8:
        data = data.reshape(*lead, n_tiles, k_tiles, 4, 8, 4, 4, 2, 2, 2)  # nt kt w g c j l h b
        data = _permute(data, len(lead), (1, 5, 7, 4, 6, 0, 2, 8, 3))  # kt j h c l nt w b g
        return data.reshape(*lead, k, n)
    data = data.reshape(*lead, n_tiles, k_tiles, 4, 8, 4, 4, 2, 2)  # nt kt w g c j l h
    data = _permute(data, len(lead), (1, 5, 7, 4, 6, 0, 2, 3))  # kt j h c l nt w g
    data = data.reshape(*lead, k, n // 16, 1, 8)
    shifts = np.array([0, 4], np.uint8).reshape(*[1] * (data.ndim - 2), 2, 1)  # b
    nibbles = (data >> shifts) & np.uint8(15)  # [..., K, N/16, b, g]
    return nibbles.reshape(*lead, k, n)


def pack_columns(a: Any) -> Any:
    """Puts per-column values (scales, zero points) into the order in which threads read them.

    Args:
        a: any dtype [..., G, N], N a multiple of 64.

    Returns:
        [..., N/64, G, 64]: column n = 16 w + 8 b + g of a tile at 16 w + 2 g + b.

    Raises:
        ValueError: N is not a multiple of 64.

    >>> import numpy as np
    >>> pack_columns(np.arange(64)[None])[0, 0, :6].tolist()
    [0, 8, 1, 9, 2, 10]
    """
    *lead, groups, n = a.shape
    if n % TILE:
        raise ValueError(
            f"pack_columns: array has shape {tuple(a.shape)}, expected N to be a multiple of "
            f"{TILE}; pad it first"
        )
    a = a.reshape(*lead, groups, n // TILE, 4, 2, 8)  # [..., G, nt, w, b, g]
    a = _permute(a, len(lead), (1, 0, 2, 4, 3))  # [..., nt, G, w, g, b]
    return a.reshape(*lead, n // TILE, groups, TILE)


def unpack_columns(a: Any) -> Any:
    """The inverse of `pack_columns`: [..., N/64, G, 64] to [..., G, N].

    Args:
        a: any dtype [..., N/64, G, 64].

    Returns:
        [..., G, N].

    Raises:
        ValueError: the last axis is not 64.

    >>> import numpy as np
    >>> a = np.arange(3 * 128).reshape(3, 128)
    >>> bool((unpack_columns(pack_columns(a)) == a).all())
    True
    """
    *lead, n_tiles, groups, columns = a.shape
    if columns != TILE:
        raise ValueError(
            f"unpack_columns: array has shape {tuple(a.shape)}, expected [..., N/64, G, {TILE}]"
        )
    a = a.reshape(*lead, n_tiles, groups, 4, 8, 2)  # [..., nt, G, w, g, b]
    a = _permute(a, len(lead), (1, 0, 2, 4, 3))  # [..., G, nt, w, b, g]
    return a.reshape(*lead, groups, n_tiles * TILE)


def _permute(a: Any, num_lead: int, order: tuple[int, ...]) -> Any:
    """Transposes the axes behind the first `num_lead` ones, which stay."""
    return a.transpose(*range(num_lead), *(num_lead + axis for axis in order))


def _check_bits(bits: int, where: str) -> None:
    if bits not in (4, 8):
        raise ValueError(f"{where}: bits is {bits}, expected 4 or 8")


def pair_columns(columns: Any, pairs: int) -> Any:
    """[all of gate | all of up] to `pairs` blocks [part of gate | the same part of up].

    Args:
        columns: [..., N], or [..., N/64] tiles; 2 * pairs must divide the last axis.
        pairs: blocks, one for each device that is to hold some of both.

    Returns:
        The same shape.

    >>> import numpy as np
    >>> pair_columns(np.arange(8), 2).tolist()
    [0, 1, 4, 5, 2, 3, 6, 7]
    """
    return _swap_major(columns, 2, pairs)


def unpair_columns(columns: Any, pairs: int) -> Any:
    """The inverse of `pair_columns`."""
    return _swap_major(columns, pairs, 2)


def _swap_major(columns: Any, first: int, second: int) -> Any:
    """The last axis read as [first, second, rest] and written as [second, first, rest]."""
    if first == 1 or second == 1:
        return columns
    *lead, n = columns.shape
    blocks = columns.reshape(*lead, first, second, n // (first * second))
    return blocks.swapaxes(-3, -2).reshape(*lead, n)
