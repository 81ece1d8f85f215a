"""Act-order (desc_act): from a checkpoint's g_idx to a row order, and down's order into gate_up.

GPTQ with `desc_act` quantizes the rows of K in order of falling activation energy and forms its
groups in that order: `g_idx[k]` names the group of row k and may be any map with `group_size` rows
a group. Sorting the rows by group (stably) makes the groups contiguous again, which is what kernels
want, and leaves a permutation of the activations, `x[:, perm] @ W[perm]`.

That gather is free for the second product of a MoE layer. Its input is the output of the first one,
so the first one can write its columns in the order in which the second reads its rows:
`(a * b)[perm] = a[perm] * b[perm]` for gate and up alike, whatever the activation.
"""

from __future__ import annotations

import dataclasses
from typing import Any, overload

import jax
import numpy as np
from jax.core import Tracer

from jax_marlin import layout
from jax_marlin.weights import MarlinExpertStack


def perm_from_g_idx(g_idx: np.ndarray, *, k: int, group_size: int, where: str) -> np.ndarray | None:
    """The row order that makes the groups of `g_idx` contiguous.

    Args:
        g_idx: integers [K], the group of each row.
        k: rows, K.
        group_size: rows of one group, `1 <= group_size <= k`; the last group may be short.
        where: the function or module that errors are reported for.

    Returns:
        int32 [K], `perm[i]` is the original row of sorted row i, rows of one group in their
        original order; None when the rows are in group order already (desc_act with static groups).

    Raises:
        TypeError: `g_idx` does not hold integers.
        ValueError: wrong shape, a group out of range, or a group with too many or too few rows.

    >>> import numpy as np
    >>> perm_from_g_idx(np.array([1, 0, 1, 0]), k=4, group_size=2, where="example").tolist()
    [1, 3, 0, 2]
    >>> perm_from_g_idx(np.array([0, 0, 1, 1]), k=4, group_size=2, where="example") is None
    True
    """
    if g_idx.dtype.kind not in "iu":
        raise TypeError(f"{where}: g_idx has dtype {g_idx.dtype}, expected int32")
    if g_idx.shape != (k,):
        raise ValueError(f"{where}: g_idx has shape {g_idx.shape}, expected (K,) = ({k},)")
    if bool((g_idx == np.arange(k) // group_size).all()):  # as most files have it
        return None
    num_groups = -(-k // group_size)
    outside = np.flatnonzero((g_idx < 0) | (g_idx >= num_groups))
    if outside.size:
        row = int(outside[0])
        raise ValueError(
            f"{where}: g_idx[{row}] is {int(g_idx[row])}, expected a group in [0, {num_groups}); "
            f"is group_size={group_size} right?"
        )
    rows_of_group = np.bincount(g_idx, minlength=num_groups)
    expected = np.full(num_groups, group_size)
    expected[-1] = k - (num_groups - 1) * group_size
    unbalanced = np.flatnonzero(rows_of_group != expected)
    if unbalanced.size:
        group = int(unbalanced[0])
        raise ValueError(
            f"{where}: g_idx gives group {group} {int(rows_of_group[group])} rows, expected "
            f"{int(expected[group])}; is group_size={group_size} right?"
        )
    if num_groups <= 2**16:
        g_idx = g_idx.astype(np.uint16)  # of which NumPy's stable sort takes a third of the time
    perm = np.argsort(g_idx, kind="stable").astype(np.int32)
    return None if bool((perm == np.arange(k)).all()) else perm


@overload
def fold_act_order(
    gate_up: MarlinExpertStack, down: MarlinExpertStack
) -> tuple[MarlinExpertStack, MarlinExpertStack]: ...


@overload
def fold_act_order(
    gate_up: tuple[MarlinExpertStack, MarlinExpertStack], down: MarlinExpertStack
) -> tuple[tuple[MarlinExpertStack, MarlinExpertStack], MarlinExpertStack]: ...


def fold_act_order(gate_up: Any, down: Any) -> Any:
    """Moves down's act-order permutation into gate_up's columns, so that down gathers nothing.

    The layer's outputs stay what they were, bit for bit: each column is computed as before, only
    elsewhere. Runs on the host, one expert at a time beside one copy of gate_up (two where several
    devices hold it).

    Args:
        gate_up: a stack [E, H, 2 I] (first all of gate, then all of up), or a pair (gate, up) of
            stacks [E, H, I].
        down: a stack [E, I, H].

    Returns:
        `(gate_up, down)` in the form they came in: new leaves for gate_up, `down.perm` None. Both
        come back unchanged when down has no permutation.

    Raises:
        TypeError: not expert stacks, or called under `jax.jit`.
        ValueError: numbers of experts or sizes disagree.

    Source: GPTQ `desc_act` as in this file's head; vLLM and SGLang gather before both products.

    >>> import jax_marlin as jm, numpy as np
    >>> rng = np.random.default_rng(0)
    >>> g_idx = rng.permutation(np.repeat(np.arange(2, dtype=np.int32), 32))
    >>> word = lambda *shape: rng.integers(0, 2**32, shape, dtype=np.uint32)
    >>> ones = lambda *shape: np.ones(shape, np.float16)
    >>> gate_up = jm.load_gptq_stacked(word(3, 4, 128), ones(3, 1, 128), group_size=32)
    >>> down = jm.load_gptq_stacked(word(3, 8, 32), ones(3, 2, 32), g_idx=g_idx, group_size=32)
    >>> gate_up, folded = jm.fold_act_order(gate_up, down)
    >>> down.perm.shape, folded.perm
    ((3, 64), None)
    """
    is_pair = isinstance(gate_up, (tuple, list))
    halves = list(gate_up) if is_pair else [gate_up]
    _check_layer(halves, down, is_pair)
    if down.perm is None:
        return (tuple(halves) if is_pair else gate_up), down
    perm = np.asarray(down.perm)  # [E, I]
    if is_pair:
        folded: Any = tuple(_take_columns(half, perm) for half in halves)
    else:
        folded = _take_columns(gate_up, np.concatenate([perm, perm + down.k], axis=1))
    spec = dataclasses.replace(down.spec, shared_perm=False)
    return folded, dataclasses.replace(down, perm=None, spec=spec)


def _take_columns(stack: MarlinExpertStack, columns: np.ndarray) -> MarlinExpertStack:
    """The stack whose column i of expert e is column `columns[e, i]`; `columns` is int [E, N]."""
    n = stack.spec.n

    def groups(packed: np.ndarray, order: np.ndarray) -> np.ndarray:
        rows = layout.unpack_columns(packed).copy()  # [G, padded N]
        rows[:, :n] = rows[:, order]
        return layout.pack_columns(rows)

    def per_expert(leaf: Any, permute: Any) -> Any:
        if leaf is None:
            return None
        out = np.empty(leaf.shape, leaf.dtype)
        sharding = getattr(leaf, "sharding", None)
        # An expert at a time; of a leaf that an explicit mesh has cut JAX takes none by its index.
        held = leaf if sharding is None or sharding.num_devices == 1 else np.asarray(leaf)
        for expert, order in enumerate(columns):
            out[expert] = permute(np.asarray(held[expert]), order)
        return jax.device_put(out, sharding)

    return dataclasses.replace(
        stack,
        qweight=per_expert(
            stack.qweight, lambda tiles, order: _take_tiles(tiles, order, stack.spec.bits)
        ),
        scales=per_expert(stack.scales, groups),
        zero_points=per_expert(stack.zero_points, groups),
        bias=per_expert(stack.bias, lambda row, order: row[order]),
    )


def _take_tiles(tiles: np.ndarray, order: np.ndarray, bits: int) -> np.ndarray:
    """Packed tiles [N/64, K/64, words] whose column i is column `order[i]`; later ones stay.

    A word holds two columns, b = 0 and 1, in its even and odd fields (`layout`), so columns move as
    runs of half-filled words along K and no code is unpacked.
    """
    n_tiles, k_tiles, words = tiles.shape
    even_fields = np.uint32(0x0F0F0F0F if bits == 4 else 0x00FF00FF)
    threads = tiles.reshape(n_tiles, k_tiles, 4, 1, 8, words // 32)  # nt, kt, w, b, g, words
    shifts = np.array([0, bits], np.uint32).reshape(2, 1, 1)  # b
    columns = ((threads >> shifts) & even_fields).transpose(0, 2, 3, 4, 1, 5)  # nt w b g kt words
    columns = columns.reshape(n_tiles * 64, k_tiles, words // 32)
    columns[: order.size] = columns[order]
    columns = columns.reshape(n_tiles, 4, 2, 8, k_tiles, words // 32).transpose(0, 4, 1, 2, 3, 5)
    return (columns[:, :, :, 0] | (columns[:, :, :, 1] << np.uint32(bits))).reshape(tiles.shape)


def _check_layer(halves: list[Any], down: Any, is_pair: bool) -> None:
    """Raises unless the stacks are the two products of one MoE layer, with concrete leaves."""
    if is_pair and len(halves) != 2:
        raise ValueError(
            f"fold_act_order: gate_up holds {len(halves)} stacks, expected a stack or (gate, up)"
        )
    names = ["gate", "up"] if is_pair else ["gate_up"]
    for name, stack in [*zip(names, halves, strict=True), ("down", down)]:
        if not isinstance(stack, MarlinExpertStack) or stack.is_single:
            is_array = isinstance(stack, np.ndarray | jax.Array)  # whose repr is a page of numbers
            got = type(stack).__name__ if is_array else repr(stack)
            raise TypeError(
                f"fold_act_order: {name} is {got}, expected a MarlinExpertStack with an expert axis"
            )
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(stack)):
            raise TypeError(
                f"fold_act_order: {name} is traced, expected concrete arrays; fold once after "
                "loading, outside jax.jit"
            )
        if stack.spec.pair_width is not None:
            raise ValueError(
                f"fold_act_order: {name}'s columns are paired for several devices; fold before "
                "jax_marlin.shard"
            )
    for name, stack in zip(names, halves, strict=True):
        expected = (down.num_experts, down.k * (1 if is_pair else 2))
        got = (stack.num_experts, stack.n_per_expert)
        if got != expected:
            raise ValueError(
                f"fold_act_order: {name} has (experts, N) = {got}, expected {expected}: down has "
                f"{down.num_experts} experts with K = {down.k}"
            )
