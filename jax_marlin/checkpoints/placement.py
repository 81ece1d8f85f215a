"""Where a packed stack goes: the blocks of it that this process holds, and their global arrays."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jax_marlin.layout import TILE
from jax_marlin.quant_spec import QuantSpec
from jax_marlin.weights import MarlinExpertStack

_AXES = ("experts", "tiles of N", "tiles of K")
Leaves = dict[str, np.ndarray | None]


@dataclasses.dataclass(frozen=True)
class Block:
    """A part of a stack: some experts, columns of N and rows of K, and the devices that hold it."""

    experts: range
    columns: range
    rows: range
    devices: tuple[Any, ...] = ()  # jax.Device; none: the default device

    def spec(self, whole: QuantSpec) -> QuantSpec:
        """The spec of the block as a stack of its own."""
        k = len(self.rows)
        return dataclasses.replace(
            whole, n=len(self.columns), k=k, group_size=min(whole.group_size, k)
        )


class Placement:
    """One stack that is made block by block, each moved to its devices as soon as it is complete.

    Attributes:
        blocks: those that devices of this process hold, ordered by experts.
    """

    def __init__(
        self, sharding: NamedSharding | None, num_experts: int, spec: QuantSpec, where: str
    ) -> None:
        """Plans the blocks; touches no device.

        Args:
            sharding: of `qweight`, whose axes are experts, tiles of N and tiles of K; the other
                leaves follow it. None: one block, on the default device.
            num_experts: E.
            spec: of the whole stack.
            where: the function that errors are reported for.

        Raises:
            TypeError: not a NamedSharding.
            ValueError: an axis does not divide, a split of K cuts a group, or one of N a tile.
        """
        self._sharding, self._spec, self._where = sharding, spec, where
        self._num_experts = num_experts
        self._arrays: dict[str, list[jax.Array]] = collections.defaultdict(list)
        if sharding is None:
            self.blocks = [Block(range(num_experts), range(spec.n), range(spec.k))]
            return
        self._check(sharding)
        shape = (num_experts, spec.n_tiles, spec.k_tiles)
        held: dict[tuple[range, ...], list[Any]] = collections.defaultdict(list)
        of_device = NamedSharding(sharding.mesh, PartitionSpec(*self._axes(3)))
        for device, index in of_device.addressable_devices_indices_map(shape).items():
            parts = zip(index or (), shape, strict=True)
            held[tuple(range(*part.indices(size)) for part, size in parts)].append(device)
        self.blocks = [
            Block(
                experts,
                range(n.start * TILE, min(n.stop * TILE, spec.n)),
                range(k.start * TILE, min(k.stop * TILE, spec.k)),
                tuple(devices),
            )
            for (experts, n, k), devices in sorted(
                held.items(), key=lambda item: [r.start for r in item[0]]
            )
        ]

    def put(self, block: Block, leaves: Leaves) -> None:
        """Moves a block to its devices, leaf by leaf; `leaves` is empty afterwards."""
        for name in list(leaves):
            leaf = leaves.pop(name)
            if leaf is None:
                continue
            for device in block.devices or (None,):
                self._arrays[name].append(_to_device(leaf, device))

    def finish(self, spec: QuantSpec) -> MarlinExpertStack:
        """The stack, with `spec` as its metadata, once all blocks are in place."""
        whole: dict[str, Any] = {}
        for name in ("qweight", "scales", "zero_points", "perm", "bias"):
            arrays = self._arrays.pop(name, None)
            if arrays is None or self._sharding is None:
                whole[name] = None if arrays is None else arrays[0]
                continue
            mesh = self._sharding.mesh
            shape, axes = self._leaf(name)
            whole[name] = jax.make_array_from_single_device_arrays(
                shape, NamedSharding(mesh, PartitionSpec(*axes)), arrays
            )
        return MarlinExpertStack(**whole, spec=spec)

    @property
    def splits_k(self) -> bool:
        """Whether devices hold parts of K."""
        return self._sharding is not None and _parts(self._sharding.mesh, self._axes(3)[2]) > 1

    def _leaf(self, name: str) -> tuple[tuple[int, ...], tuple]:
        """Shape and mesh axes of a leaf; groups are split as K is, unless there is one for all."""
        e, n, k = self._axes(3)
        spec, experts = self._spec, self._num_experts
        if name == "qweight":
            return (experts, spec.n_tiles, spec.k_tiles, spec.words_per_tile), (e, n, k)
        if name == "perm":
            return (experts, spec.k), (e,)
        if name == "bias":
            return (experts, spec.n), (e, n)
        groups = k if spec.num_groups > 1 else None
        return (experts, spec.n_tiles, spec.num_groups, TILE), (e, n, groups)

    def _axes(self, count: int) -> tuple:
        """Mesh axes of the first axes of qweight, None where there are none."""
        given = () if self._sharding is None else tuple(self._sharding.spec)
        return (*given, *[None] * (count - len(given)))[:count]

    def _check(self, sharding: NamedSharding) -> None:
        if not isinstance(sharding, NamedSharding):
            raise TypeError(
                f"{self._where}: sharding is {sharding!r}, expected a jax.sharding.NamedSharding"
            )
        given = tuple(sharding.spec)
        if any(axes is not None for axes in given[3:]):
            raise ValueError(
                f"{self._where}: sharding has {sharding.spec}, expected at most three axes: "
                f"{', '.join(_AXES)}; the words of a tile stay together"
            )
        spec, axes = self._spec, self._axes(3)
        e, n, k = (_parts(sharding.mesh, part) for part in axes)
        if self._num_experts % e:
            raise ValueError(
                f"{self._where}: sharding splits {self._num_experts} experts into {e} parts, "
                f"expected a divisor"
            )
        if spec.n_parts % n:
            raise ValueError(
                f"{self._where}: sharding splits N = {spec.n} into {n} parts, expected parts of "
                f"whole tiles of {TILE} columns"
            )
        if spec.k_parts % k:
            raise ValueError(
                f"{self._where}: sharding splits K = {spec.k} into {k} parts, expected parts of "
                f"whole tiles of {TILE} rows and whole groups of {spec.group_size}"
            )


def place_experts(
    sharding: NamedSharding | None,
    num_experts: int,
    build: Callable[[range], Leaves],
    where: str,
) -> dict[str, Any]:
    """Leaves with experts first, made for the experts that devices of this process hold.

    Args:
        sharding: a `NamedSharding` that splits the first axis alone; None: the default device.
        num_experts: E.
        build: gives the leaves of some experts on the host; called once for each part.
        where: the function that errors are reported for.

    Raises:
        TypeError, ValueError: as `Placement`.
        NotImplementedError: another axis is split.
    """
    if sharding is None:
        leaves = build(range(num_experts))
        return {name: _to_device(leaves.pop(name), None) for name in list(leaves)}
    if not isinstance(sharding, NamedSharding):
        raise TypeError(f"{where}: sharding is {sharding!r}, expected a jax.sharding.NamedSharding")
    if any(axes is not None for axes in tuple(sharding.spec)[1:]):
        raise NotImplementedError(
            f"{where}: sharding has {sharding.spec}, and of experts that are not packed only the "
            f"first axis is split; use PartitionSpec({sharding.spec[0]!r})"
        )
    own = NamedSharding(sharding.mesh, PartitionSpec(*tuple(sharding.spec)[:1]))
    if num_experts % math.prod(_parts(own.mesh, axes) for axes in own.spec):
        raise ValueError(
            f"{where}: sharding {own.spec} does not divide {num_experts} experts, expected a "
            f"divisor"
        )
    held: dict[range, list[Any]] = collections.defaultdict(list)
    for device, index in own.addressable_devices_indices_map((num_experts,)).items():
        held[range(*(index or (slice(None),))[0].indices(num_experts))].append(device)
    arrays: dict[str, list[jax.Array]] = collections.defaultdict(list)
    names: tuple[str, ...] = ()
    for experts, devices in sorted(held.items(), key=lambda item: item[0].start):
        leaves = build(experts)
        names = tuple(leaves)
        for name in names:
            leaf = leaves.pop(name)
            if leaf is not None:
                arrays[name] += [_to_device(leaf, device) for device in devices]
    return {name: _joined(arrays[name], num_experts, own) if name in arrays else None
            for name in names}  # fmt: skip


def _joined(parts: list[jax.Array], num_experts: int, sharding: NamedSharding) -> jax.Array:
    shape = (num_experts, *parts[0].shape[1:])
    return jax.make_array_from_single_device_arrays(shape, sharding, parts)


def replicate(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """`tree` with each leaf on every device of `mesh`; every process must have the same values."""

    def put(leaf: jax.Array) -> jax.Array:
        host = np.asarray(leaf)
        everywhere = NamedSharding(mesh, PartitionSpec())
        return jax.make_array_from_callback(host.shape, everywhere, lambda index: host[index])

    return jax.tree.map(put, tree)


def _to_device(leaf: np.ndarray | None, device: Any) -> Any:
    """Waits, so that the host's copy can go before the next leaf starts to travel."""
    if leaf is None:
        return None
    return jax.block_until_ready(jax.device_put(leaf, device, may_alias=True))


def _parts(mesh: Mesh | AbstractMesh, axes: Any) -> int:
    """Into how many parts these mesh axes split: None, a name, or names."""
    names = () if axes is None else axes if isinstance(axes, tuple) else (axes,)
    return math.prod(mesh.shape[name] for name in names)
