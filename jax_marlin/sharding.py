"""Shardings of packed weights over a mesh: which axis of each leaf is cut, and what cannot be."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_marlin.dense_stack import DenseExpertStack
from jax_marlin.layout import TILE, pair_columns
from jax_marlin.linear import MarlinLinear
from jax_marlin.weights import MarlinExpertStack

Axis: TypeAlias = str | tuple[str, ...]
_Stack: TypeAlias = MarlinExpertStack | DenseExpertStack
_KINDS = ("expert", "column", "row")


def partition_specs(tree: Any, kind: Any, axis: Axis) -> Any:
    """The `PartitionSpec` of every leaf of weights that are cut over one mesh axis.

    Args:
        tree: a `MarlinLinear`, `MarlinExpertStack` or `DenseExpertStack`, or any pytree that holds
            them (a tuple, a model). Leaves may be abstract: only shapes are read.
        kind: "expert" (axis E of the stacks; linears are whole on each device), "column" (N), "row"
            (K: the caller adds up the devices' results), or a prefix of `tree` of these, say
            ("column", "row") for (gate_up, down).
        axis: the mesh axis, or several, major first.

    Returns:
        `tree` with a `PartitionSpec` for each leaf, `PartitionSpec()` for leaves of anything else:
        `in_specs` of `jax.shard_map`; `jax.tree.map` makes `NamedSharding`s of it.

    Raises:
        ValueError: an unknown kind; a weight that cannot be cut so (no whole tiles, a quantization
            group, act-order rows without the whole x, a view of some columns), by its path.

    Example:
        >>> import jax_marlin as jm
        >>> stack = jm.quantize(np.ones((4, 128, 192), np.float32), group_size=32)
        >>> tuple(jm.partition_specs(stack, "column", "model").qweight)
        (None, 'model', None, None)
    """
    return _map_weights(
        lambda path, w, kind: _specs(path, w, kind, axis, None, "partition_specs"),
        lambda _: PartitionSpec(), tree, kind, "partition_specs",
    )  # fmt: skip


def shard(
    tree: Any, mesh: Mesh, kind: Any, axis: Axis | None = None, *, gate_up: bool = False
) -> Any:
    """Places weights on a mesh, cut as `partition_specs` says.

    Args:
        tree: as for `partition_specs`, with arrays; arrays of anything else are copied to each
            device, and what is no array (a function, a name) stays as it is.
        mesh: the devices; of any axis types.
        kind: "expert", "column", "row", or a prefix of `tree` of these.
        axis: the mesh axis, or several, major first; None is the mesh's only axis.
        gate_up: what is cut by columns is gate|up (first all of gate, then all of up): the columns
            are stored anew so that each device holds a part of gate and the same part of up. All
            ops keep giving the columns in their old order; `moe_ffn` on a device finds its pair.

    Returns:
        `tree` on the mesh.

    Raises:
        ValueError: as `partition_specs`, and where the axis does not divide what it cuts.

    Example:
        >>> import jax_marlin as jm
        >>> stack = jm.quantize(np.ones((4, 128, 192), np.float32), group_size=32)
        >>> mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
        >>> tuple(jm.shard(stack, mesh, "expert").scales.sharding.spec)
        ('model', None, None, None)
    """
    where = "shard"
    if axis is None and len(mesh.axis_names) != 1:
        raise ValueError(
            f"{where}: axis is None, expected one of the mesh's axes {mesh.axis_names}"
        )
    along: Axis = mesh.axis_names[0] if axis is None else axis
    names = along if isinstance(along, tuple) else (along,)
    unknown = [name for name in names if name not in mesh.axis_names]
    if unknown or not names:
        raise ValueError(
            f"{where}: axis is {along!r}, expected one of the mesh's axes {mesh.axis_names}"
        )
    devices = math.prod(mesh.shape[name] for name in names)

    def paired(path: str, w: Any, kind: str) -> Any:
        return pair_gate_up(w, devices, f"{where}: {path}") if kind == "column" else w

    def placed(path: str, w: Any, kind: str) -> Any:
        specs = _specs(path, w, kind, along, devices, where)
        return jax.device_put(w, jax.tree.map(lambda s: NamedSharding(mesh, s), specs))

    if gate_up:
        tree = _map_weights(paired, lambda leaf: leaf, tree, kind, where)
    everywhere = NamedSharding(mesh, PartitionSpec())

    def copied(leaf: Any) -> Any:
        try:
            jax.typeof(leaf)
        except TypeError:
            return leaf
        return jax.device_put(leaf, everywhere)

    return _map_weights(placed, copied, tree, kind, where)


def pair_gate_up(w: Any, parts: int, where: str = "pair_gate_up") -> Any:
    """gate|up columns stored as `parts` blocks [part of gate | the same part of up].

    `shard(..., gate_up=True)` does this; call it where weights are placed by other means (device by
    device, from a checkpoint), before `partition_specs`.

    Args:
        w: a stack or a linear of all columns.
        parts: how many devices share the columns.
        where: what errors are reported for.

    Returns:
        The weight with a new order of columns, which its metadata names.

    Raises:
        ValueError: columns that cannot be paired so; columns paired otherwise before.
    """
    if isinstance(w, MarlinLinear):
        bias = None if w.bias is None else pair_columns(w.bias, parts)
        return dataclasses.replace(w, stack=pair_gate_up(w.stack, parts, where), bias=bias)
    n, packed = w.n_per_expert, isinstance(w, MarlinExpertStack)
    width = w.pair_width
    if width is not None and n // width != parts:
        raise ValueError(f"{where}: columns are paired for {n // width} devices, got {parts}")
    if n % (2 * parts * (TILE if packed else 1)):
        raise ValueError(
            f"{where}: gate|up has {n} columns, expected a multiple of 2 * {parts}"
            f"{f' * {TILE}' if packed else ''}, a part of gate and of up for each of {parts} "
            "devices; cut experts instead, or over fewer devices"
        )
    if width is not None or parts == 1:
        return w
    bias = None if w.bias is None else pair_columns(w.bias, parts)
    if not packed:
        weight = pair_columns(w.weight, parts)
        return dataclasses.replace(w, weight=weight, bias=bias, pair_width=n // parts)

    def tiles(leaf: Any) -> Any:  # [..., N/64, K/64 or G, words or 64]
        if leaf is None:
            return None
        *lead, count, rows, words = leaf.shape
        blocks = leaf.reshape(*lead, 2, parts, count // (2 * parts), rows, words)
        return blocks.swapaxes(-5, -4).reshape(leaf.shape)

    return dataclasses.replace(
        w, qweight=tiles(w.qweight), scales=tiles(w.scales), zero_points=tiles(w.zero_points),
        bias=bias, spec=dataclasses.replace(w.spec, pair_width=n // parts),
    )  # fmt: skip


def bias_on_first(w: Any, axis_name: Axis) -> Any:
    """The weight whose bias is zero on all devices of `axis_name` but the first.

    Inside `jax.shard_map`, before a product of row shards whose results are added up (`psum`): the
    bias is then added once, and not once for each device.

    Args:
        w: a stack or a linear.
        axis_name: the mesh axis, or several, that cuts the rows.

    Returns:
        The weight; itself if it has no bias.

    Example:
        >>> import jax_marlin as jm
        >>> jm.bias_on_first(jm.quantize(np.ones((64, 128), np.float32)), "model").shape
        (64, 128)
    """
    if isinstance(w, MarlinLinear):
        w = dataclasses.replace(w, stack=bias_on_first(w.stack, axis_name))
    if w.bias is None:
        return w
    first = jax.lax.axis_index(axis_name) == 0
    return dataclasses.replace(w, bias=jnp.where(first, w.bias, jnp.zeros((), w.bias.dtype)))


def _is_weight(node: Any) -> bool:
    return isinstance(node, MarlinLinear | MarlinExpertStack | DenseExpertStack)


def _map_weights(of_weight: Callable, of_leaf: Callable, tree: Any, kind: Any, where: str) -> Any:
    """`of_weight(path, weight, kind)` for each weight of `tree`, `of_leaf` for other leaves."""

    def of_subtree(path: Any, kind: str, subtree: Any) -> Any:
        if kind not in _KINDS:
            raise ValueError(f"{where}: kind is {kind!r}, expected one of {_KINDS}")

        def of_node(below: Any, node: Any) -> Any:
            name = jax.tree_util.keystr((*path, *below)) or "the weight"
            return of_weight(name, node, kind) if _is_weight(node) else of_leaf(node)

        return jax.tree_util.tree_map_with_path(of_node, subtree, is_leaf=_is_weight)

    if isinstance(kind, str):
        return of_subtree((), kind, tree)
    return jax.tree_util.tree_map_with_path(of_subtree, kind, tree)


def _specs(path: str, w: Any, kind: str, axis: Axis, devices: int | None, where: str) -> Any:
    """The weight with its leaves' specs. `devices` None: any number that divides."""
    if isinstance(w, MarlinLinear):
        stack: Any = w.stack
        if kind == "expert":
            return jax.tree.map(lambda _: PartitionSpec(), w)
        if w.columns != (0, stack.spec.n):
            raise ValueError(
                f"{where}: {path} is a view of columns {w.columns} of {stack.spec.n}, which has no "
                "leaves of its own to cut; cut the stack, then take columns"
            )
        bias = None if w.bias is None else PartitionSpec(axis if kind == "column" else None)
        specs = _stack_specs(path, stack, kind, axis, devices, where)
        return dataclasses.replace(w, stack=specs, expert=PartitionSpec(), bias=bias)
    if kind == "expert" and w.is_single:
        return jax.tree.map(lambda _: PartitionSpec(), w)
    return _stack_specs(path, w, kind, axis, devices, where)


def _stack_specs(path: str, w: _Stack, kind: str, axis: Axis, devices, where: str) -> Any:
    _check(f"{where}: {path}", w, kind, devices)

    def spec(leaf: Any, *axes: str | None) -> PartitionSpec | None:
        """The leaf's trailing axes by kind; leading ones (layers) are whole."""
        if leaf is None:
            return None
        ndim = len(leaf.shape)
        names = [axis if name == kind else None for name in axes][-ndim:]
        return PartitionSpec(*[None] * (ndim - len(names)), *names)

    bias = spec(w.bias, "expert", "column")
    if isinstance(w, DenseExpertStack):
        weight = spec(w.weight, "expert", "row", "column")
        return dataclasses.replace(w, weight=weight, bias=bias)
    groups = "row" if w.spec.num_groups > 1 else None  # one group is every device's
    return dataclasses.replace(
        w,
        qweight=spec(w.qweight, "expert", "column", "row", None),
        scales=spec(w.scales, "expert", "column", groups, None),
        zero_points=spec(w.zero_points, "expert", "column", groups, None),
        perm=spec(w.perm, "expert", None),
        bias=bias,
    )


def _check(where: str, w: _Stack, kind: str, devices: int | None) -> None:
    """Refuses cuts that no device could compute with."""
    packed = isinstance(w, MarlinExpertStack)
    over = "several devices" if devices is None else f"{devices} devices"
    if kind == "expert":
        # Leading axes (layers) are whole: experts are the fourth from the end, of dense weights
        # the third.
        size = w.qweight.shape[-4] if packed else w.weight.shape[-3]
        parts, unit, rest = size, "experts", "over another number of devices"
    elif kind == "column":
        size, parts = w.n_per_expert, w.spec.n_parts if packed else w.n_per_expert
        unit = f"columns in whole tiles of {TILE}" if packed else "columns"
        rest = "experts instead"
        if w.pairs > 1 and devices is not None and w.pairs % devices:
            raise ValueError(
                f"{where}'s gate|up columns are paired for {w.pairs} devices, got {devices}"
            )
    else:
        size, parts = w.k, w.spec.k_parts if packed else w.k
        unit, rest = "rows", "columns or experts instead"
        if packed and w.spec.num_groups > 1:
            unit = f"rows in whole tiles of {TILE} and groups of {w.spec.group_size}"
        if packed and w.perm is not None and devices != 1:
            raise ValueError(
                f"{where} is in act-order: its rows need the whole x, and K = {size} cannot be cut "
                f"over {over}; use jax_marlin.fold_act_order (for down), or cut {rest}"
            )
    if parts % devices if devices is not None else parts == 1 < size:
        raise ValueError(
            f"{where} has {size} {unit}, which cannot be cut into equal parts for {over}; "
            f"cut {rest}"
        )
