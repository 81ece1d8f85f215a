"""Reverse-mode gradients of routed products, from the packed weights; what the ops' VJPs share.

For y[r] = w[r] (x[t] W[e] + b[e]), t = r // top_k, one product is needed, as large as the forward
one: u[r] = g[r] W[e]^T. The rest are sums over rows: dx[t] = sum of w[r] u[r], db[e] = sum of
w[r] g[r], and dw[r] = x[t] . u[r] + g[r] . b[e], which does not need x W again.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jax_marlin.dense_stack import DenseExpertStack
from jax_marlin.explicit_mesh import explicit_axes
from jax_marlin.ops.transposed_product import transposed_product
from jax_marlin.ops.weight_gradient import weight_gradient
from jax_marlin.weights import MarlinExpertStack


def routed_gradients(
    g: jax.Array,
    x: jax.Array,
    ids: jax.Array,
    row_weights: jax.Array | None,
    stack: MarlinExpertStack | DenseExpertStack,
    *,
    top_k: int,
    weights_before_bias: bool = False,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array | None, Any]:
    """Cotangents of x, the row weights and the stack, given those of the routed rows.

    Args:
        g: float `[R, N]`, R = T * top_k; of rows whose id names no expert nothing is used.
        x: float `[T, K]`.
        ids: int32 `[R]`.
        row_weights: float32 `[R]`, or None for ones.
        stack: E experts `[K, N]`.
        top_k: routed rows of one row of x.
        weights_before_bias: y[r] = w[r] x[t] W[e] + b[e].
        implementation: None, "cuda" or "xla".

    Returns:
        (float32 `[T, K]`, float32 `[R]` or None, a stack of cotangents): what is packed is frozen,
        its cotangents are None, which JAX reads as zero.
    """
    num_experts, bias = stack.num_experts, stack.bias
    routed = ((ids >= 0) & (ids < num_experts))[:, None]
    u = transposed_product(
        g, ids, stack, out_dtype=jnp.dtype(jnp.float32), implementation=implementation
    )
    u = u.reshape(x.shape[0], top_k, x.shape[1])
    wide = jnp.where(routed, g.astype(jnp.float32), 0.0)  # of the rows y, then of y / w
    weighted, d_weights = wide, None
    if row_weights is not None:
        weights = jnp.where(routed, row_weights[:, None], 0.0)
        d_weights = jnp.sum(u * x.astype(jnp.float32)[:, None, :], axis=2).reshape(-1)
        if bias is not None and not weights_before_bias:
            own_bias = bias.at[ids].get(mode="clip").astype(jnp.float32)
            d_weights = d_weights + jnp.sum(wide * own_bias, axis=1)
        d_weights = jnp.where(routed[:, 0], d_weights, 0.0)
        u, weighted = u * weights.reshape(x.shape[0], top_k, 1), wide * weights
    d_bias = None
    if bias is not None:
        d_rows = wide if weights_before_bias else weighted
        d_bias = _sums_by_expert(d_rows, ids, num_experts).astype(bias.dtype)
    d_stack = dataclasses.replace(frozen(stack), bias=d_bias)
    if isinstance(stack, DenseExpertStack):
        d_weight = weight_gradient(
            x, weighted, ids, num_experts=num_experts, top_k=top_k, out_dtype=stack.dtype
        )
        d_stack = dataclasses.replace(d_stack, weight=d_weight)
    return jnp.sum(u, axis=1), d_weights, d_stack


def frozen(stack: MarlinExpertStack | DenseExpertStack) -> Any:
    """The stack with None, a cotangent of zero, for each of its leaves."""
    fields = dataclasses.fields(stack)
    leaves = [field.name for field in fields if not field.metadata.get("static")]
    return dataclasses.replace(stack, **dict.fromkeys(leaves))


def trained(stack: MarlinExpertStack | DenseExpertStack) -> Any:
    """The stack with None for what is frozen: as its cotangents are."""
    trains = {"bias": stack.bias}
    if isinstance(stack, DenseExpertStack):
        trains["weight"] = stack.weight
    return dataclasses.replace(frozen(stack), **trains)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Placement:
    """How the arrays that have a gradient lie on an explicit mesh; kept for the backward pass."""

    leaves: tuple[NamedSharding, ...]
    tree: Any

    @classmethod
    def of(cls, primals: Any) -> Placement | None:
        """None where no mesh is explicit: cotangents have then no placement in their types."""
        leaves, tree = jax.tree.flatten(primals)
        shardings = [jax.typeof(leaf).sharding for leaf in leaves]
        mesh = next((s.mesh for s in shardings if explicit_axes(s.mesh)), None)
        if mesh is None:
            return None
        # What lies on no mesh is the same on all devices.
        whole = NamedSharding(mesh, PartitionSpec())
        return cls(tuple(whole if s.mesh.empty else s for s in shardings), tree)

    def call(self, backward: Callable[..., Any], *operands: Any) -> Any:
        """`backward(*operands)`, partitioned by XLA; its results are placed as the primals were."""
        out = jax.tree.unflatten(self.tree, self.leaves)
        axes = explicit_axes(self.leaves[0].mesh)
        return jax.sharding.auto_axes(backward, axes=axes, out_sharding=out)(*operands)


def _sums_by_expert(rows: jax.Array, ids: jax.Array, num_experts: int) -> jax.Array:
    """float32 `[E, N]`; a product with zeros and ones, which GPUs add up in a fixed order."""
    chosen = jax.nn.one_hot(ids, num_experts, dtype=jnp.float32)
    return lax.dot_general(chosen, rows, (((0,), (0,)), ((), ())), precision=lax.Precision.HIGHEST)


def vary_together(*operands: Any) -> tuple[Any, ...]:
    """Operands with a gradient, typed to vary over every manual axis that any operand does.

    Inside `jax.shard_map` a replicated x that meets sharded experts gets a cotangent from each
    device; the transpose of this cast sums them. Without it, the cotangent has the wrong type.
    """
    leaves, tree = jax.tree.flatten(operands)
    varying = [jax.typeof(leaf).manual_axis_type.varying for leaf in leaves]
    union = frozenset().union(*varying)
    cast = [
        lax.pcast(leaf, tuple(sorted(union - own, key=str)), to="varying")
        if union - own and jnp.issubdtype(leaf.dtype, jnp.floating)
        else leaf
        for leaf, own in zip(leaves, varying, strict=True)
    ]
    return jax.tree.unflatten(tree, cast)


def differentiable(compute: Callable, backward: Callable, primals: Callable, keep: Callable):
    """`compute(static, *operands)` with `backward(static, residuals, g)` as its reverse mode.

    Args:
        compute: the forward pass; `static` is hashable.
        backward: returns a cotangent for each operand.
        primals: of the operands, those parts that get a cotangent, None for the rest.
        keep: of the operands, those that backward needs.
    """

    def forward(static, *operands):
        return function(static, *operands), (keep(*operands), Placement.of(primals(*operands)))

    def reverse(static, residuals, g):
        kept, placement = residuals
        if placement is None:
            return backward(static, kept, g)
        return placement.call(functools.partial(backward, static), kept, g)

    function = jax.custom_vjp(compute, nondiff_argnums=(0,))
    function.defvjp(forward, reverse)
    return function
