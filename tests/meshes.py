"""Meshes of the CPU devices that conftest asks for, and the collectives of a compiled program."""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from problems import Case, Problem, build

from jax_marlin.bench.collectives import Collective, collectives_of

P = PartitionSpec


def cpu_mesh(kind: AxisType = AxisType.Auto) -> Mesh:
    """data 2, expert 2, tensor 2."""
    devices = np.array(jax.devices("cpu")[:8]).reshape(2, 2, 2)
    return Mesh(devices, ("data", "expert", "tensor"), axis_types=(kind,) * 3)


def put(mesh: Mesh, array, *axes) -> jax.Array:
    return jax.device_put(array, NamedSharding(mesh, P(*axes)))


def run(function, *arguments) -> tuple[jax.Array, list[Collective]]:
    """The result, and the collectives of the compiled program except those of token ids."""
    compiled = jax.jit(function).lower(*arguments).compile()
    return compiled(*arguments), collectives(compiled)


def collectives(compiled: jax.stages.Compiled) -> list[Collective]:
    """What travels in a program, except token ids."""
    return [c for c in collectives_of(compiled.as_text() or "") if {*c.dtypes} != {"s32"}]


def kinds(found: list[Collective]) -> list[str]:
    return [c.kind for c in found]


def case(name: str, **fields) -> Case:
    """K and N of four tiles each, four experts, eight tokens: every axis divides by 4."""
    sizes: dict[str, Any] = {
        "m": 8,
        "k": 256,
        "n": 256,
        "group_size": 64,
        "num_experts": 4,
        "top_k": 2,
    }
    sizes |= {"dtype": "float32", **fields}
    return build(Problem(name, **sizes))
