"""The four ops as functions of the same arguments, for tests that put each through JAX."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from problems import Problem, build

import jax_marlin as jm

T, H, E, TOP_K = 6, 96, 4, 2


class Arguments(NamedTuple):
    """H is the width of x, and of every op's result."""

    x: jax.Array  # float32[T, H]
    ids: jax.Array  # int32[T, top_k], some -1
    weights: jax.Array  # float32[T, top_k]
    stack: jm.MarlinExpertStack  # [E, H, H], gate_up of the layer
    down: jm.MarlinExpertStack  # [E, H / 2, H]


def arguments(seed: int = 0, top_k: int = TOP_K, **changes) -> Arguments:
    rng = np.random.default_rng(seed)
    fields: dict[str, Any] = {"dtype": "float32", "num_experts": E, "bias": True} | changes
    stack = build(Problem(f"gate_up {seed}", k=H, n=H, group_size=32, **fields)).stack()
    fields["g_idx"] = "none"
    down = build(Problem(f"down {seed}", k=H // 2, n=H, group_size=-1, **fields)).stack()
    x = rng.standard_normal((T, H)).astype(fields["dtype"])
    ids = rng.integers(-1, E, (T, top_k)).astype(np.int32)
    weights = rng.uniform(0.5, 1.5, (T, top_k)).astype(np.float32)
    return Arguments(jnp.asarray(x), jnp.asarray(ids), jnp.asarray(weights), stack, down)


def matmul(x, ids, weights, stack, down):
    return jm.matmul(x, stack[2])


def ragged_dot(x, ids, weights, stack, down):
    return jm.ragged_dot(x, stack, jnp.array([2, 0, 1, 2]))


def moe_matmul(x, ids, weights, stack, down):
    routing = jm.moe_align_block_size(ids, 8, E)
    return jm.moe_matmul(
        x, stack, *routing, moe_block_size=8, top_k=ids.shape[1], topk_weights=weights
    )


def moe_ffn(x, ids, weights, stack, down):
    return jm.moe_ffn(x, ids, weights, stack, down)


OPS: dict[str, Callable[..., jax.Array]] = {
    f.__name__: f for f in (matmul, ragged_dot, moe_matmul, moe_ffn)
}
# The primitive that multiplies, and where its packed weights stand among the operands.
PRIMITIVES = {
    "matmul": ("jax_marlin_matmul_v1", 1),
    "ragged_dot": ("jax_marlin_moe_matmul_v1", 1),
    "moe_matmul": ("jax_marlin_moe_matmul_v1", 1),
    "moe_ffn": ("jax_marlin_moe_ffn_v1", 3),
}
STACKED = [op for op in OPS if op != "matmul"]  # which take a whole stack
