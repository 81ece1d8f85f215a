"""`repack` and `repack_rows` by the compiled extension, where it is installed: one pass in place of
some twenty, several times as fast. NumPy does it elsewhere, with the same result."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from types import ModuleType

import numpy as np

from jax_marlin import repack, repack_rows


@functools.cache
def extension() -> ModuleType | None:
    """The extension, if it is installed and packs."""
    try:
        module = importlib.import_module("_jax_marlin")
    except ImportError:
        return None
    return module if hasattr(module, "pack_words") else None  # one of an older checkout


def pack_words(
    words: Sequence[np.ndarray],
    orders: Sequence[np.ndarray] | None,
    bits: int,
    out: np.ndarray,
) -> None:
    """`repack.pack_words`, or `repack_rows.pack_words_in_order` where there are `orders`."""
    if (module := extension()) is not None:
        for e, one in enumerate(words):
            order = None if orders is None else np.ascontiguousarray(orders[e], np.int64)
            module.pack_words(_readable(one, order is not None), order, bits, out[e])
    elif orders is None:
        repack.pack_words(words, bits, out)
    else:
        repack_rows.pack_words_in_order(words, orders, bits, out)


def pack_awq_words(words: Sequence[np.ndarray], out: np.ndarray) -> None:
    """`repack_rows.pack_awq_words`."""
    if (module := extension()) is None:
        return repack_rows.pack_awq_words(words, out)
    for e, one in enumerate(words):
        module.pack_awq_words(_readable(one), out[e])


def _readable(words: np.ndarray, by_rows: bool = False) -> np.ndarray:
    """`words` where they are, unless memory of a file is not aligned, or rows must be runs."""
    if by_rows:
        return np.ascontiguousarray(words, np.uint32)
    return np.require(words, np.uint32, "A")
