"""What XLA partitions over inside `jax.shard_map` over some axes of a mesh: the other axes.

It then works on each group of devices that share a place on the manual axes, and numbers a group's
devices by themselves, in an order that it chooses. The shardings that it hands to
`custom_partitioning` are in those numbers and name no axis. So each call gets one operand more,
`ranks`, cut over all these axes in the mesh's order: how it lies tells which number stands where.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.custom_partitioning import (
    ArrayMapping,
    SdyShardingRule,
    custom_partitioning,
)
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


class Region(NamedTuple):
    """The axes that are left to partition over.

    Attributes:
        where: the op that errors name.
        mesh: of the whole program; collectives in one device's work are over its axes.
        axes: neither manual nor of one device, in the mesh's order.
    """

    where: str
    mesh: Mesh
    axes: tuple[str, ...]

    def partitioned(self, whole: Callable, rule: Callable, partition: Callable) -> Callable:
        """`whole` as XLA can partition it here; the others are as for `def_partition`."""

        def rule_with_ranks(mesh, operand_types, result_types):
            own = rule(mesh, operand_types[:-1], result_types)
            return SdyShardingRule(
                (*own.operand_mappings, ArrayMapping("ranks")), own.result_mappings,
                reduction_factors=own.reduction_factors, **own.factor_sizes,
            )  # fmt: skip

        def partition_group(_, operands, result):
            *operands, ranks = operands
            group = self.group_of(ranks)
            operands = tuple(self.named(operand, group) for operand in operands)
            _, local, placed, shardings = partition(group, operands, self.named(result, group))
            of_ranks = NamedSharding(group, PartitionSpec(self.axes))
            return self.mesh, lambda *shards: local(*shards[:-1]), placed, (*shardings, of_ranks)

        call = custom_partitioning(lambda *operands: whole(*operands[:-1]))
        call.def_partition(partition_group, sharding_rule=rule_with_ranks, decode_shardings=False)
        return lambda *operands: call(*operands, self.ranks())

    def sizes(self) -> tuple[int, ...]:
        return tuple(self.mesh.shape[axis] for axis in self.axes)

    def ranks(self) -> jax.Array:
        """int32 `[devices of a group]`, one on each; nothing reads the values."""
        ranks = jnp.arange(math.prod(self.sizes()), dtype=jnp.int32)
        sharding = NamedSharding(self.mesh, PartitionSpec(self.axes))
        return jax.lax.with_sharding_constraint(ranks, sharding)

    def group_of(self, ranks: Any) -> Mesh:
        """A mesh of one group, with its axes in the order in which XLA numbers the devices.

        Its devices stand for their numbers: which they are is never asked.
        """
        numbers = self._numbers(ranks)
        for order in itertools.permutations(range(len(self.axes))):
            sizes = tuple(self.sizes()[axis] for axis in order)
            by_rank = np.arange(numbers.size).reshape(sizes).transpose(np.argsort(order))
            if np.array_equal(by_rank.ravel(), numbers.ravel()):
                devices = self.mesh.devices.ravel()[: numbers.size].reshape(sizes)
                return Mesh(devices, tuple(self.axes[axis] for axis in order))
        raise self._refusal(f"XLA divides the axes {', '.join(self.axes)}")

    def named(self, array: Any, group: Mesh) -> jax.ShapeDtypeStruct:
        """An operand or result as `custom_partitioning` shows it, with the axes that cut it."""
        numbers = self._numbers(array)
        cuts = [self._cut(numbers, axis, group) or None for axis in range(len(array.shape))]
        sharding = NamedSharding(group, PartitionSpec(*cuts))
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

    def _cut(self, numbers: np.ndarray, axis: int, group: Mesh) -> tuple[str, ...]:
        """The mesh axes that cut one axis of an array."""
        part = np.empty(group.size, int)  # which of the axis' parts each device holds
        part[numbers.ravel()] = np.indices(numbers.shape)[axis].ravel()
        place = dict(zip(group.axis_names, np.indices(group.devices.shape), strict=True))
        for count in range(len(place) + 1):
            for names in itertools.permutations(place, count):
                expected = np.zeros(group.devices.shape, int)
                for name in names:
                    expected = expected * group.shape[name] + place[name]
                if np.array_equal(part, expected.ravel()):
                    return names
        raise self._refusal(f"an operand's axis {axis} is cut into {numbers.shape[axis]} parts")

    def _numbers(self, array: Any) -> np.ndarray:
        """Numbers of a group's devices: the array's axes in parts, then the copies of one part."""
        # Nothing public tells how a sharding without axis names lies.
        sharding = array.sharding._to_xla_hlo_sharding(len(array.shape))
        if sharding.is_replicated():
            return np.arange(math.prod(self.sizes())).reshape(*(1 for _ in array.shape), -1)
        return np.reshape(sharding.tile_assignment_devices(), sharding.tile_assignment_dimensions())

    def _refusal(self, got: str) -> NotImplementedError:
        sizes = dict(zip(self.axes, self.sizes(), strict=True))
        return NotImplementedError(
            f"{self.where}: inside jax.shard_map over some axes, {got}; expected whole axes of "
            f"{sizes}; reshard, or leave out axis_names, so that all axes are manual"
        )


def region_of(context: Any, where: str) -> Region | None:
    """The region of a lowering's axis context; None where no axis is left to partition over.

    Raises:
        NotImplementedError: the mesh is abstract.
    """
    mesh, manual = context.mesh, context.manual_axes
    axes = tuple(n for n in mesh.axis_names if n not in manual and mesh.shape[n] > 1)
    if not axes:
        return None
    if not isinstance(mesh, Mesh):  # as where jax.shard_map is nested
        raise NotImplementedError(
            f"{where}: inside jax.shard_map over axes {sorted(manual)} of a mesh without devices, "
            f"expected one with devices, over whose axes {list(axes)} to partition; call under "
            "jax.set_mesh(mesh)"
        )
    # Explicit axes, too, are partitioned by XLA.
    kinds = (AxisType.Auto,) * len(mesh.axis_names)
    return Region(where, Mesh(mesh.devices, mesh.axis_names, kinds), axes)
