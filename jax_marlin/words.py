"""32-bit words of codes, as GPTQ and AWQ store them, and the exchanges that move codes in words.

Along K P = 32 / bits codes of one column share a word, the first in the lowest bits: uint32
[ceil(K/P), N], what most files hold. AWQ's words hold 8 codes of one row: uint32 [K, N/8]. Weights
wait to be packed in the form of their file, half a byte a code.

Moving a code between words never takes it out of its word. Call the index bits of a code inside a
word its places, and let a bit of the row index choose between two arrays x and y of words. Then
`exchange` swaps that row bit with one place bit, for all words at once: a transpose of a 2 x 2
matrix of half-words, bytes or nibbles in six vector instructions for two words.
"""

from __future__ import annotations

import numpy as np

# every second field of `shift` bits in a word, the lower ones
_LOWER = {4: 0x0F0F0F0F, 8: 0x00FF00FF, 16: 0x0000FFFF}

# Words packed at once, of one expert or of several. Smaller blocks stay in a core's own cache, but
# threads then hand the interpreter's lock to and fro so often that two are slower than one.
WORDS_AT_ONCE = 2**19
AWQ_COLUMNS = 8  # of a word
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # column j of them stands in bits 4 * places[j] and three on


def pack_rows(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes to words.

    Args:
        codes: uint8 [K, N], below `2**bits`.
        bits: 4 or 8.

    Returns:
        uint32 [ceil(K / P), N]; the last word of a column is filled with zeros.

    >>> [hex(word) for word in pack_rows(np.arange(1, 10, dtype=np.uint8)[:, None], 4)[:, 0]]
    ['0x87654321', '0x9']
    """
    k, n = codes.shape
    fill = -k % (32 // bits)
    if fill:
        codes = np.concatenate([codes, np.zeros((fill, n), np.uint8)])
    if bits == 4:
        codes = codes[0::2] | (codes[1::2] << np.uint8(4))  # bytes of two rows
    words = np.empty((codes.shape[0] // 4, n, 4), np.uint8)
    for place in range(4):
        words[..., place] = codes[place::4]
    return words.view("<u4")[..., 0]


def unpack_rows(words: np.ndarray, bits: int) -> np.ndarray:
    """Words to codes, uint32 [R, N] to uint8 [R * P, N]; the inverse of `pack_rows`.

    >>> unpack_rows(np.array([[0x87654321]], np.uint32), 4)[:, 0].tolist()
    [1, 2, 3, 4, 5, 6, 7, 8]
    """
    rows, n = words.shape
    pieces = np.ascontiguousarray(words, "<u4").view(np.uint8).reshape(rows, n, 4)
    codes = np.empty((rows, 4, 8 // bits, n), np.uint8)
    for place in range(4):
        if bits == 8:
            codes[:, place, 0] = pieces[..., place]
            continue
        both = np.ascontiguousarray(pieces[..., place])  # the arithmetic then runs on full vectors
        np.bitwise_and(both, np.uint8(15), out=codes[:, place, 0])
        np.right_shift(both, np.uint8(4), out=codes[:, place, 1])
    return codes.reshape(-1, n)


def pack_awq(codes: np.ndarray) -> np.ndarray:
    """Codes to AWQ's words, uint8 [R, N] to uint32 [R, N / 8]; N a multiple of 8.

    >>> hex(pack_awq(np.arange(1, 9, dtype=np.uint8)[None])[0, 0])
    '0x86427531'
    """
    words = np.zeros((codes.shape[0], codes.shape[1] // AWQ_COLUMNS), np.uint32)
    for column, place in enumerate(_AWQ_PLACES):
        words |= codes[:, column::AWQ_COLUMNS].astype(np.uint32) << np.uint32(4 * place)
    return words


def unpack_awq(words: np.ndarray) -> np.ndarray:
    """AWQ's words to codes, uint32 [R, N / 8] to uint8 [R, N]; the inverse of `pack_awq`.

    >>> unpack_awq(np.array([[0x86427531]], np.uint32))[0].tolist()
    [1, 2, 3, 4, 5, 6, 7, 8]
    """
    codes = np.empty((*words.shape, AWQ_COLUMNS), np.uint8)
    for column, place in enumerate(_AWQ_PLACES):
        codes[..., column] = (words >> np.uint32(4 * place)) & np.uint32(15)
    return codes.reshape(words.shape[0], -1)


def one_in_every_field(bits: int) -> np.uint32:
    """0x11111111 at 4 bit, 0x01010101 at 8: times a code, that code everywhere."""
    return np.uint32(sum(1 << place for place in range(0, 32, bits)))


def exchange(x: np.ndarray, y: np.ndarray, shift: int, scratch: np.ndarray) -> None:
    """Swaps, in place, the upper fields of x with the lower fields of y, `shift` bits each.

    Args:
        x, y: uint32 of one shape.
        shift: 4, 8 or 16.
        scratch: uint32 of that shape; its contents are lost.

    >>> x, y = np.array([0x1111AAAA], np.uint32), np.array([0xBBBB2222], np.uint32)
    >>> exchange(x, y, 16, np.empty_like(x))
    >>> hex(x[0]), hex(y[0])
    ('0x2222aaaa', '0xbbbb1111')
    """
    by, lower = np.uint32(shift), np.uint32(_LOWER[shift])
    np.right_shift(x, by, out=scratch)
    np.bitwise_xor(scratch, y, out=scratch)
    np.bitwise_and(scratch, lower, out=scratch)  # where the two differ
    np.bitwise_xor(y, scratch, out=y)
    np.left_shift(scratch, by, out=scratch)
    np.bitwise_xor(x, scratch, out=x)


def exchange_neighbours(words: np.ndarray, shift: int) -> None:
    """`exchange`, in place, of each word at an even index of the last axis with the next.

    Args:
        words: uint32 [..., even], contiguous.
        shift: 4, 8 or 16.

    >>> words = np.array([0x1111AAAA, 0xBBBB2222], np.uint32)
    >>> exchange_neighbours(words, 16)
    >>> [hex(word) for word in words]
    ['0x2222aaaa', '0xbbbb1111']
    """
    pairs = words.view("<u8")  # the word at the even index is the lower half
    upper, by = np.uint64(_LOWER[shift] << shift), np.uint64(32 - shift)
    scratch = pairs >> by
    np.bitwise_xor(scratch, pairs, out=scratch)
    np.bitwise_and(scratch, upper, out=scratch)  # where the two differ
    np.bitwise_xor(pairs, scratch, out=pairs)
    np.left_shift(scratch, by, out=scratch)
    np.bitwise_xor(pairs, scratch, out=pairs)


def transpose_fields(matrix: np.ndarray, bits: int) -> None:
    """Swaps, in place, field j of word i with field i of word j, for i, j < P.

    Args:
        matrix: uint32 [P, ...], contiguous, P = 32 / bits.
        bits: of a field, 4 or 8.

    >>> matrix = np.array([0x03020100, 0x13121110, 0x23222120, 0x33323130], np.uint32)
    >>> transpose_fields(matrix, 8)
    >>> [hex(word) for word in matrix]
    ['0x30201000', '0x31211101', '0x32221202', '0x33231303']
    """
    count = 32 // bits
    scratch = np.empty(matrix.size // 2, np.uint32)
    distance = count // 2
    while distance:  # each bit of i changes places with the same bit of j
        pairs = matrix.reshape(count // (2 * distance), 2, distance, -1)
        x, y = pairs[:, 0], pairs[:, 1]
        exchange(x, y, bits * distance, scratch.reshape(x.shape))
        distance //= 2
