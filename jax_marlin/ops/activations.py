"""The activations of gated experts, by the names that `moe_ffn` takes."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def _swiglu_clamped(gate: jax.Array, up: jax.Array) -> jax.Array:
    """gpt-oss: gate clipped above at 7, up to -7 .. 7."""
    gate, up = jnp.minimum(gate, 7.0), jnp.clip(up, -7.0, 7.0)
    return gate * jax.nn.sigmoid(1.702 * gate) * (up + 1.0)


# (gate, up) float32 -> float32
ACTIVATIONS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "silu": lambda gate, up: jax.nn.silu(gate) * up,
    "gelu": lambda gate, up: jax.nn.gelu(gate, approximate=False) * up,
    "gelu_tanh": lambda gate, up: jax.nn.gelu(gate, approximate=True) * up,
    "swiglu_clamped": _swiglu_clamped,
}

# The kernels' numbers of them (`Activation` in cpp/kernel/params.h).
KERNEL_ACTIVATIONS = {name: 1 + i for i, name in enumerate(ACTIVATIONS)}
