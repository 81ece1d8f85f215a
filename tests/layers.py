"""A few MoE layers and a dense product in a row, which XLA may capture: built, fed and run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import problems

import jax_marlin as jm
from jax_marlin.weights import MarlinExpertStack

LAYERS = 3  # more custom calls in a row than XLA's smallest command buffer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layer:
    router: jax.Array
    gate_up: MarlinExpertStack
    down: MarlinExpertStack


def build_layer(dtype: str = "bfloat16", **fields) -> Layer:
    """hidden 128, experts 96 wide: K and N off the tile, one permutation an expert."""
    fields = {"dtype": dtype, "num_experts": 7, "group_size": 32, "bias": True} | fields
    gate_up = problems.build(problems.Problem("runtime_gate_up", k=128, n=192, **fields)).stack()
    down = problems.build(problems.Problem("runtime_down", k=96, n=128, **fields)).stack()
    router = jax.random.normal(jax.random.key(0), (128, 7), jnp.dtype(dtype))
    return Layer(router, gate_up, down)


def run_layers(x: jax.Array, layer: Layer, implementation: str | None = "cuda") -> jax.Array:
    """`[M, 192]`; the routing follows x."""
    for _ in range(LAYERS):
        topk_weights, topk_ids = jm.route(x @ layer.router, 2)
        y = jm.moe_ffn(
            x, topk_ids, topk_weights, layer.gate_up, layer.down, implementation=implementation
        )
        x = x + y / (1 + jnp.max(jnp.abs(y)))
    return jm.matmul(x, layer.gate_up[1], implementation=implementation)


def inputs(count: int, rows: int, dtype: str = "bfloat16") -> list[jax.Array]:
    """Inputs whose tokens choose different experts."""
    keys = jax.random.split(jax.random.key(7), count)
    return [jax.random.normal(key, (rows, 128), jnp.dtype(dtype)) for key in keys]


def bits(x) -> np.ndarray:
    return np.asarray(x).view(np.uint16)
