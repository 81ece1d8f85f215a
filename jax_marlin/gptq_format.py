"""The GPTQ tensor format (AutoGPTQ, GPTQModel, AutoRound): stored words to plain codes, and back.

A linear layer W [K, N] is stored so, P = 32 / bits codes in a word, G = ceil(K / group_size):

    qweight int32 [K / P, N]   P neighbours along K in a word, the first in the lowest bits
    qzeros  int32 [G, N / P]   P neighbours along N in a word, the first in the lowest bits
    scales  float [G, N]
    g_idx   int32 [K]          group of each row; k // group_size unless desc_act reordered the rows

    W[k, n] = scales[g_idx[k], n] * (q[k, n] - z[g_idx[k], n])

Version 1 of the format stores z - 1, written by subtracting 1 from every field of a word at once.
A true zero point of 0 then borrows from the next field, so the only exact inverse adds the same
constant to the whole word, modulo 2**32, before the fields are taken apart. `gptq_v2` stores z.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from jax_marlin.act_order import perm_from_g_idx
from jax_marlin.canonical import CanonicalLinear
from jax_marlin.host_arrays import host_array
from jax_marlin.quant_spec import QuantSpec
from jax_marlin.words import one_in_every_field, pack_rows, unpack_rows


def gptq_to_canonical(
    qweight: Any,
    scales: Any,
    qzeros: Any,
    g_idx: Any,
    bias: Any,
    *,
    bits: int,
    group_size: int,
    k: int | None,
    n: int | None,
    symmetric: bool | None,
    checkpoint_format: str,
    where: str,
) -> CanonicalLinear:
    """One GPTQ tensor set, its words as they are and the order that sorts its rows by group.

    Args:
        qweight, scales, qzeros, g_idx, bias: as in `load_gptq`.
        bits, group_size, k, n, symmetric, checkpoint_format: as in `load_gptq`.
        where: the function or module that errors are reported for.

    Raises:
        TypeError, ValueError, NotImplementedError: as `load_gptq`; messages start with `where`.
    """
    # bits are checked before K is derived from them
    bits = QuantSpec.create(bits=bits, group_size=-1, k=1, n=1, where=where).bits
    if symmetric is not None and not isinstance(symmetric, (bool, np.bool_)):
        raise TypeError(f"{where}: symmetric is {symmetric!r}, expected True, False or None")
    symmetric = None if symmetric is None else bool(symmetric)
    words = _words(qweight, "qweight", where)  # uint32 [ceil(K / P), N]
    groups = None if g_idx is None else host_array(g_idx, "g_idx", where)
    rows = words.shape[0] * 32 // bits if groups is None else groups.size
    spec = QuantSpec.create(
        bits=bits,
        group_size=group_size,
        k=rows if k is None else k,
        n=words.shape[1] if n is None else n,
        where=where,
    )
    expected = (-(-spec.k // spec.pack_factor), spec.n)
    if words.shape != expected:
        source = f"k={spec.k}" if groups is None or k is not None else f"K = {spec.k} of g_idx"
        raise ValueError(
            f"{where}: qweight has shape {words.shape}, expected (K * bits / 32, N) = {expected}; "
            f"is {source} right?"
        )
    scales = host_array(scales, "scales", where)
    if scales.shape != (spec.num_groups, spec.n):
        raise ValueError(
            f"{where}: scales has shape {scales.shape}, expected (ceil(K / group_size), N) = "
            f"{(spec.num_groups, spec.n)} for k={spec.k}; is group_size={group_size} right?"
        )
    perm = None
    if groups is not None:
        perm = perm_from_g_idx(groups, k=spec.k, group_size=spec.group_size, where=where)
    canonical = CanonicalLinear(
        words,
        scales,
        _zero_points(qzeros, spec, symmetric, checkpoint_format, where),
        perm,
        None if bias is None else host_array(bias, "bias", where),
        bits=bits,
        k=spec.k,
    )
    canonical.check(spec, where)
    return canonical


def canonical_to_gptq(
    canonical: CanonicalLinear, *, group_size: int, checkpoint_format: str
) -> dict[str, np.ndarray]:
    """The inverse of `gptq_to_canonical`.

    Args:
        canonical: one weight [K, N].
        group_size: its own, at most K.
        checkpoint_format: `"gptq"` (zeros stored minus one) or `"gptq_v2"`.

    Returns:
        `qweight`, `qzeros`, `scales`, `g_idx`, and `bias` if there is one, as the head of this file
        describes them. The last words of a K or N that is no multiple of 32 / bits are filled with
        code 0 and with the symmetric zero point.
    """
    bits, (k, n) = canonical.bits, canonical.shape
    codes, g_idx = canonical.codes, (np.arange(k) // group_size).astype(np.int32)
    if canonical.perm is not None:  # sorted row i is row perm[i] of the file
        order = np.argsort(canonical.perm)
        codes, g_idx = codes[order], g_idx[order]
    zeros = canonical.zero_points
    if zeros is None:
        zeros = np.full(canonical.scales.shape, 2 ** (bits - 1), np.uint8)
    fill = -n % (32 // bits)
    zeros = np.pad(zeros, ((0, 0), (0, fill)), constant_values=2 ** (bits - 1))
    words = np.ascontiguousarray(pack_rows(np.ascontiguousarray(zeros.T), bits).T)
    if checkpoint_format == "gptq":
        words -= one_in_every_field(bits)  # modulo 2**32, as the format's first writer did
    tensors = {
        "qweight": pack_rows(codes, bits).view(np.int32),
        "qzeros": words.view(np.int32),
        "scales": np.ascontiguousarray(canonical.scales),
        "g_idx": g_idx,
    }
    return tensors if canonical.bias is None else tensors | {"bias": canonical.bias}


def _zero_points(
    qzeros: Any, spec: QuantSpec, symmetric: bool | None, checkpoint_format: str, where: str
) -> np.ndarray | None:
    """uint8 [G, N], or None where all are `2**(bits - 1)`."""
    if checkpoint_format not in ("gptq", "gptq_v2"):
        raise ValueError(
            f"{where}: checkpoint_format is {checkpoint_format!r}, expected 'gptq' or 'gptq_v2'"
        )
    if qzeros is None:
        if symmetric is False:
            raise ValueError(f"{where}: qzeros is None, expected an array with symmetric=False")
        return None
    words = _words(qzeros, "qzeros", where)  # uint32 [G, ceil(N / P)]
    expected = (spec.num_groups, -(-spec.n // spec.pack_factor))
    if words.shape != expected:
        raise ValueError(
            f"{where}: qzeros has shape {words.shape}, expected (G, N * bits / 32) = {expected}"
        )
    middle = spec.symmetric_zero_point
    if symmetric:
        first = int(words[0, 0]) % 2**spec.bits
        reference = first if first in (middle - 1, middle) else middle - 1
        if bool((words == one_in_every_field(spec.bits) * np.uint32(reference)).all()):
            return None
        stored = _unpack_columns(words, spec.bits)[:, : spec.n]  # last words may hold fewer
        wrong = np.argwhere(stored != reference)
        if wrong.size:
            group, column = (int(i) for i in wrong[0])
            raise ValueError(
                f"{where}: qzeros stores {int(stored[group, column])} for group {group}, column "
                f"{column}, expected {middle - 1} or {middle} everywhere with symmetric=True; pass "
                "symmetric=None to take the zero points as stored"
            )
        return None
    if checkpoint_format == "gptq":
        words = words + one_in_every_field(spec.bits)  # modulo 2**32, undoes the writer's borrows
    zero_points = _unpack_columns(words, spec.bits)[:, : spec.n]
    if symmetric is None and bool((zero_points == middle).all()):
        return None
    return np.ascontiguousarray(zero_points)


def _unpack_columns(words: np.ndarray, bits: int) -> np.ndarray:
    """uint32 [G, C] to uint8 [G, C * P]."""
    return unpack_rows(words.T, bits).T


def _words(value: Any, name: str, where: str) -> np.ndarray:
    """`value` as uint32 words of rank 2."""
    array = host_array(value, name, where)
    if array.dtype not in (np.int32, np.uint32):
        raise TypeError(
            f"{where}: {name} has dtype {array.dtype}, expected int32 or uint32 (a pack_dtype of "
            "32 bits)"
        )
    if array.ndim != 2:
        raise ValueError(f"{where}: {name} has shape {array.shape}, expected two axes")
    # a transposed view stays one: the packing reads it block by block
    return array.view(np.uint32)
