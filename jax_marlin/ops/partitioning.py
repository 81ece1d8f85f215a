"""Runs a primitive on each device's shard where JAX partitions the program (automatic meshes).

XLA cannot look into a custom call or a loop over experts: left alone it gathers every operand on
every device. `custom_partitioning` tells it which axes of operands and result belong together (a
Shardy rule) and what each device does with its shard. It is applied where a primitive is lowered,
innermost, so that `vmap` and gradients never meet it, and only in programs that span several
devices: programs for one device, and bodies of `jax.shard_map` over all axes, lower as if it did
not exist.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.extend.core
import numpy as np
from jax.experimental.custom_partitioning import (
    ArrayMapping,
    CompoundFactor,
    SdyShardingRule,
    custom_partitioning,
)
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from jax_marlin.explicit_mesh import explicit_axes
from jax_marlin.ops.partition_region import region_of

Axes = dict[str, tuple[str, ...]]  # the mesh axes that cut each factor


class Scheme(NamedTuple):
    """What of a primitive's operands and result can be cut; factors are named by one letter.

    An axis is a factor times a rest that stays whole (64 columns of a tile, rows of a group), or
    None, which cannot be cut.
    """

    operands: tuple[tuple[str | None, ...], ...]
    result: tuple[str | None, ...]
    parts: dict[str, int]  # into how many equal parts a factor can be cut, at most
    names: tuple[str, ...]  # of the operands
    packed: frozenset[int]  # operands that are never moved between devices
    reasons: Mapping[str, str] = MappingProxyType({})  # why a factor has so few parts, the remedy


class Partitioning(NamedTuple):
    """How one primitive runs on shards.

    Attributes:
        where: the op that errors name, unless a parameter `where` does.
        scheme: (operands with shapes, parameters) -> Scheme.
        local: (axes, operands of one device, parameters) -> result of one device; reduces over the
            axes of factors that the result lacks.
    """

    where: str
    scheme: Callable[..., Scheme]
    local: Callable[..., jax.Array]

    def named(self, params: dict[str, Any]) -> str:
        return params.get("where", self.where)


def needs_devices() -> jax.extend.core.ClosedJaxpr | None:
    """A primitive's parameter by which JAX tells its lowering which devices the program is for.

    JAX does so for programs that hold `custom_partitioning`, in a parameter, too. Bodies of
    `jax.shard_map` are not partitioned and lower without devices (for an `AbstractMesh`, say).
    """
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.axis_types and set(mesh.axis_types) == {AxisType.Manual} else _marker()


@functools.cache
def _marker() -> jax.extend.core.ClosedJaxpr:
    call = custom_partitioning(lambda x: x)
    call.def_partition(lambda *_: None, sharding_rule="i -> i")  # never lowered
    return jax.make_jaxpr(call)(jax.ShapeDtypeStruct((1,), np.float32))


def partitioned(
    bind: Callable, partitioning: Partitioning, params: dict[str, Any], ctx: Any
) -> Callable | None:
    """`bind(*operands, **params)` as a function that XLA can partition.

    Args:
        ctx: the context of the lowering of one primitive.

    Returns:
        None where the program is not partitioned: it is for one device, or inside `jax.shard_map`
        over all axes.
    """
    rule = functools.partial(_sharding_rule, partitioning, params)
    partition = functools.partial(_partition, partitioning, params, ctx.avals_in)
    context = ctx.module_context.axis_context

    def whole(*operands):
        return bind(*operands, **params)

    if hasattr(context, "manual_axes"):  # inside shard_map
        region = region_of(context, partitioning.named(params))
        return region and region.partitioned(whole, rule, partition)
    if not getattr(context, "device_assignment", None) or context.num_devices == 1:
        return None
    call = custom_partitioning(whole)
    call.def_partition(partition, sharding_rule=rule)
    return call


def _sharding_rule(partitioning, params, mesh, operand_types, result_types) -> SdyShardingRule:
    del mesh
    shapes = [_Shape(tuple(t.shape)) for t in operand_types]
    scheme = partitioning.scheme(shapes, params)
    sizes: dict[str, int] = {}

    def mapping(array: str, shape, factors):
        return ArrayMapping(*(
            _dimension(f"{array}d{i}", size, factor, scheme.parts, sizes)
            for i, (size, factor) in enumerate(zip(shape, factors, strict=True))
        ))  # fmt: skip

    operands = tuple(
        mapping(f"o{i}", shape.shape, factors)
        for i, (shape, factors) in enumerate(zip(shapes, scheme.operands, strict=True))
    )
    result = mapping("r", result_types[0].shape, scheme.result)
    # Sizes are told of factors that stand in products alone.
    plain = {d for array in (*operands, result) for d in array if isinstance(d, str)}
    compound: dict[str, Any] = {n: size for n, size in sizes.items() if n not in plain}
    return SdyShardingRule(
        operands,
        (result,),
        reduction_factors=tuple(n for n in _used(operands) if n not in _used((result,))),
        **compound,
    )


def _used(mappings) -> list[str]:
    """Factors of the scheme (those of one letter) in some arrays, in the order they are met."""
    dimensions = [d for mapping in mappings for d in mapping]
    names = [n for d in dimensions for n in ((d,) if isinstance(d, str) else d)]
    return [name for name in dict.fromkeys(names) if len(name) == 1]


class _Shape(NamedTuple):
    shape: tuple[int, ...]


def _dimension(own: str, size: int, factor: str | None, parts, sizes):
    """One axis in Shardy's terms: a factor, a factor times a rest of its own, or its own."""
    count = 1 if factor is None else parts[factor]
    if factor is None or count == 1 or size == 0:
        return own
    if count == size:
        return factor
    sizes[factor], sizes[own] = count, size // count
    return CompoundFactor(factor, own)


def result_spec(partitioning: Partitioning, operands, params) -> PartitionSpec:
    """The result's type under an explicit mesh, where every operand must be used as it lies."""
    scheme = partitioning.scheme(operands, params)
    meshes = [operand.sharding.mesh for operand in operands]
    mesh = next((mesh for mesh in meshes if explicit_axes(mesh)), None)
    axes = {}
    if mesh is not None:
        every = frozenset(range(len(operands)))
        axes = _assign(partitioning.named(params), scheme, mesh, operands, every)
    return PartitionSpec(*(axes.get(f or "") or None for f in scheme.result))


def _partition(partitioning: Partitioning, params, types, mesh, operands, result):
    shardings = [operand.sharding for operand in operands]
    if not all(isinstance(s, NamedSharding) for s in (*shardings, result.sharding)):
        raise ValueError(
            f"{partitioning.named(params)}: the operands' shardings name no mesh; place arrays by "
            "NamedSharding on one mesh (one operand is enough, say by with_sharding_constraint), "
            "or call inside jax.shard_map"
        )
    scheme = partitioning.scheme(operands, params)
    _check_not_gathered(partitioning.named(params), types, operands, scheme.names)
    axes = _assign(partitioning.named(params), scheme, mesh, operands, scheme.packed, result)

    def placed(factors):
        return NamedSharding(mesh, PartitionSpec(*(axes.get(f or "") or None for f in factors)))

    def local(*shards):
        # JAX traces this where the user's `jax.set_mesh` still holds; a shard knows no mesh.
        with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
            return partitioning.local(axes, shards, params)

    return mesh, local, placed(scheme.result), tuple(placed(f) for f in scheme.operands)


def _check_not_gathered(where: str, types, operands, names: tuple[str, ...]) -> None:
    """What explicit axes cut must come cut, as its type says."""
    for typed, operand, name in zip(types, operands, names, strict=True):
        mesh = operand.sharding.mesh
        lost = _cutting(typed.sharding.spec, mesh) - _cutting(operand.sharding.spec, mesh)
        if lost:
            raise ValueError(
                f"{where}: {name} has type {typed} and was gathered over {', '.join(sorted(lost))} "
                f"before this call, as jax {jax.__version__} does where jax.shard_map leaves "
                "explicit axes out of axis_names; use automatic axes, all axes manual, or jax "
                "0.11.2 or later"
            )


def _cutting(spec: PartitionSpec, mesh) -> set[str]:
    entries = [entry if isinstance(entry, tuple) else (entry,) for entry in spec]
    return {name for entry in entries for name in entry if mesh.shape.get(name, 1) > 1}


def _assign(
    where: str, scheme: Scheme, mesh, operands, kept: frozenset[int], result: Any = None
) -> Axes:
    """The mesh axes of each factor: packed operands decide, then the others, then the result.

    The operands `kept` are used as they lie or refused; another, or the result, that asks for what
    does not fit the rest is moved (resharded) by XLA.
    """
    axes: Axes = {}
    order = sorted(range(len(operands)), key=lambda i: i not in scheme.packed)
    arrays = [(operands[i], scheme.operands[i], scheme.names[i], i in kept) for i in order]
    if result is not None:
        arrays.append((result, scheme.result, "the result", False))
    for array, factors, name, is_kept in arrays:
        spec = (*array.sharding.spec, *[None] * len(factors))[: len(factors)]
        for axis, (entry, factor) in enumerate(zip(spec, factors, strict=True)):
            names = entry if isinstance(entry, tuple) else (entry,) if entry else ()
            devices = math.prod(mesh.shape[n] for n in names)
            if devices == 1:
                continue
            parts = 1 if factor is None else scheme.parts[factor]
            taken = {n for other, used in axes.items() if other != factor for n in used}
            if factor is not None and parts % devices == 0 and not taken & {*names}:
                if axes.setdefault(factor, names) == names:
                    continue
            if is_kept:
                reason = scheme.reasons.get(factor or "") if parts % devices else None
                reason = reason or (
                    f"it has at most {parts} equal parts (of whole tiles, quantization groups and "
                    "gate|up pairs; rows in act-order are one), and must be cut as the other "
                    "operands are, by a mesh axis of its own; place weights by jax_marlin.shard "
                    "(gate|up with gate_up=True), or reshard"
                )
                raise ValueError(
                    f"{where}: {name} {list(array.shape)} has sharding {array.sharding.spec}, and "
                    f"its axis {axis} cannot be cut over {', '.join(names)} here: {reason}"
                )
    return axes
