"""Runs a primitive on each device's shard where JAX partitions the program (automatic meshes).

XLA cannot look into a custom call or a loop over experts: left alone it gathers every operand on
every device. `custom_partitioning` tells it which axes of operands and result belong together (a
Shardy rule) and what each device does with its shard. It is applied where a primitive is lowered,
innermost, so that `vmap` and gradients never meet it, and only in programs that span several
devices: programs for one device, and bodies of `jax.shard_map`, lower as if it did not exist.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
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
from jax.sharding import AxisType, NamedSharding, PartitionSpec

Axes = dict[str, tuple[str, ...]]  # the mesh axes that cut each factor


class Scheme(NamedTuple):
    """What of a primitive's operands and result can be cut; factors are named by one letter.

    An axis is a factor times a rest that stays whole (64 columns of a tile, rows of a group), or
    None, which cannot be cut.
    """

    operands: tuple[tuple[str | None, ...], ...]
    result: tuple[str | None, ...]
    parts: dict[str, int]  # into how many equal parts a factor can be cut, at most
    packed: dict[int, str]  # operands that are never moved between devices -> their names


class Partitioning(NamedTuple):
    """How one primitive runs on shards.

    Attributes:
        where: the op that errors name.
        scheme: (operands with shapes, parameters) -> Scheme.
        local: (axes, operands of one device, parameters) -> result of one device; reduces over the
            axes of factors that the result lacks.
    """

    where: str
    scheme: Callable[..., Scheme]
    local: Callable[..., jax.Array]


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


def spans_devices(ctx: Any) -> bool:
    """Whether this lowering is of a program that XLA partitions."""
    context = ctx.module_context.axis_context
    if hasattr(context, "manual_axes"):  # inside shard_map: manual over all axes, or over some
        return set(context.manual_axes) != set(context.mesh.axis_names)
    return bool(getattr(context, "device_assignment", None)) and context.num_devices > 1


def partitioned(bind: Callable, partitioning: Partitioning, params: dict[str, Any]) -> Callable:
    """`bind(*operands, **params)` as a function that XLA can partition."""

    def whole(*operands):
        return bind(*operands, **params)

    call = custom_partitioning(whole)
    call.def_partition(
        functools.partial(_partition, partitioning, params),
        sharding_rule=functools.partial(_sharding_rule, partitioning, params),
    )
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
    count = parts.get(factor, 1)
    if count == 1 or size == 0:
        return own
    if count == size:
        return factor
    sizes[factor], sizes[own] = count, size // count
    return CompoundFactor(factor, own)


def _partition(partitioning: Partitioning, params, mesh, operands, result):
    shardings = [operand.sharding for operand in operands]
    if not all(isinstance(s, NamedSharding) for s in (*shardings, result.sharding)):
        raise ValueError(
            f"{partitioning.where}: the operands' shardings name no mesh; place arrays by "
            "NamedSharding on one mesh, or call inside jax.shard_map"
        )
    scheme = partitioning.scheme(operands, params)
    axes = _assign(partitioning.where, scheme, mesh, operands, result)

    def placed(factors):
        return NamedSharding(mesh, PartitionSpec(*(axes.get(f) or None for f in factors)))

    def local(*shards):
        return partitioning.local(axes, shards, params)

    return mesh, local, placed(scheme.result), tuple(placed(f) for f in scheme.operands)


def _assign(where: str, scheme: Scheme, mesh, operands, result) -> Axes:
    """The mesh axes of each factor: packed operands decide, then the others, then the result.

    Packed operands are used as they lie or refused; another operand or the result that asks for
    what the rest does not fit is moved (resharded) by XLA.
    """
    axes: Axes = {}
    arrays = [
        *((operands[i], scheme.operands[i], name) for i, name in scheme.packed.items()),
        *(
            (operands[i], factors, None)
            for i, factors in enumerate(scheme.operands)
            if i not in scheme.packed
        ),
        (result, scheme.result, None),
    ]
    for array, factors, name in arrays:
        spec = (*array.sharding.spec, *[None] * len(factors))[: len(factors)]
        for axis, (entry, factor) in enumerate(zip(spec, factors, strict=True)):
            names = entry if isinstance(entry, tuple) else (entry,) if entry else ()
            devices = math.prod(mesh.shape[n] for n in names)
            if devices == 1:
                continue
            taken = {n for other, used in axes.items() if other != factor for n in used}
            fits = scheme.parts.get(factor, 1) % devices == 0 and not taken & {*names}
            if fits and axes.setdefault(factor, names) == names:
                continue
            if name is not None:
                raise ValueError(
                    f"{where}: {name} {list(array.shape)} has sharding {array.sharding.spec}, and "
                    f"its axis {axis} cannot be cut {devices} ways here (at most "
                    f"{scheme.parts.get(factor, 1)} equal parts of whole tiles, groups and "
                    "gate|up pairs, each mesh axis once); place weights by jax_marlin.shard"
                )
    return axes
