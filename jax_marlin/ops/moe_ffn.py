"""moe_ffn: a whole mixture-of-experts layer: align, gate_up, activation, down, sum over top_k."""

import functools
from typing import NamedTuple

import jax
from jax.typing import ArrayLike

from jax_marlin.ops import checks, folding
from jax_marlin.ops.activations import ACTIVATIONS
from jax_marlin.ops.composition import composed_layer
from jax_marlin.ops.expert_numbers import check_own_experts
from jax_marlin.ops.gradients import differentiable, trained, vary_together
from jax_marlin.ops.layer_arguments import check_stacks, checked_routes
from jax_marlin.ops.layer_call import can_fuse, fused_layer
from jax_marlin.ops.layer_gradients import layer_gradients
from jax_marlin.ops.moe_matmul import ExpertStack
from jax_marlin.ops.parallel_layer import layer_over_devices

_WHERE = "moe_ffn"


def moe_ffn(
    x: ArrayLike,
    topk_ids: checks.Integers,
    topk_weights: ArrayLike,
    gate_up: ExpertStack | tuple[ExpertStack, ExpertStack],
    down: ExpertStack,
    *,
    activation: str = "silu",
    weights_on_input: bool = False,
    expert_axis: str | None = None,
    tensor_axis: str | None = None,
    exchange: str | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """sum over slots of topk_weights * down[id](act(gate_up[id](x))), for each token.

    Sums are float32; the activation's result is rounded to x's dtype once, and the output once. The
    CUDA kernels round down's weighted rows to bfloat16, too, when experts have some 30 rows of that
    dtype and more. Biases of the stacks are added to gate_up's and down's products. Expert ids that
    are negative or out of range contribute nothing.

    Reverse mode gives gradients of x, topk_weights and the biases (and of a `DenseExpertStack`'s
    weights). It keeps only the arguments and computes gate_up's product again: 5/3 of the forward
    pass's arithmetic, one dequantized expert in memory at a time. What is packed is frozen: scales
    get zeros, integers float0. Under `jax.vmap` a batch of tokens or of layers is one larger call.

    Inside `jax.shard_map` the ids count the experts that the device's own stacks hold, unless
    `expert_axis` is given. Ids of all experts beside packed stacks cut by expert are refused if ids
    and x are the same on the devices that the experts are cut over; if these have tokens of their
    own, or the stacks are dense, types cannot tell, and rows of other devices' experts are dropped.

    Args:
        x: `[..., H]` of the stacks' dtype.
        topk_ids: `[..., top_k]` integers, as `route` returns them.
        topk_weights: `[..., top_k]` floating point.
        gate_up: a stack `[E, H, 2I]`, columns first all of gate, then all of up; or the pair
            (gate, up) of stacks `[E, H, I]`, for act-order experts whose gate and up are permuted
            differently. Any stack may be a `DenseExpertStack`, which runs in plain JAX. Columns of
            one stack that devices share are paired by `shard(..., gate_up=True)`, no others.
        down: a stack `[E, I, N]`; N is H in every model.
        activation: "silu" (SwiGLU), "gelu" (exact, erf; torch's "gelu"), "gelu_tanh" (torch's
            "gelu_pytorch_tanh", the default of `jax.nn.gelu`), or gpt-oss's "swiglu_clamped":
            g = min(gate, 7), u = clip(up, -7, 7), g * sigmoid(1.702 g) * (u + 1).
        weights_on_input: multiply gate_up's input by the router weight, and not down's output
            (Llama-4).
        expert_axis: inside `jax.shard_map`, the mesh axis whose devices hold E / devices experts
            each (kind "expert" of `partition_specs`); `topk_ids` still count all experts. Tokens
            are each device's own, which then travel to their experts, or the same on all devices.
        tensor_axis: inside `jax.shard_map`, the mesh axis over which gate_up is cut by columns (in
            pairs, `shard(..., gate_up=True)`) and down by rows; tokens are the same on its devices.
        exchange: how tokens travel over `expert_axis`: "all_gather" or "all_to_all"; None chooses
            by static shapes. No token is ever dropped.
        implementation: None chooses; "cuda" or "xla" run or raise.

    Returns:
        `[..., N]`, x's dtype. Devices of an axis round their parts to it, and add in float32.

    Raises:
        TypeError: ids that are not integers or weights that are not floating point (perhaps they
            are swapped); stacks of another dtype than x.
        ValueError: shapes that do not fit, an unknown activation, host ids out of range, an axis
            over which an operand is not cut as it must be, ids that cannot count a device's own
            experts.
        NotImplementedError: `implementation="cuda"` cannot run here.

    Example:
        >>> import jax.numpy as jnp
        >>> import jax_marlin as jm
        >>> gate_up = jm.quantize(jnp.ones((3, 32, 128)) / 32, group_size=32)
        >>> down = jm.quantize(jnp.ones((3, 64, 32)) / 64, group_size=32)
        >>> x = jnp.ones((5, 32))
        >>> topk_weights, topk_ids = jm.route(jnp.ones((5, 3)), top_k=2)
        >>> out = jm.moe_ffn(x, topk_ids, topk_weights, gate_up, down, activation="silu")
        >>> out.shape, round(float(out[0, 0]), 2)
        ((5, 32), 0.73)
    """
    if expert_axis is not None or tensor_axis is not None:
        own_layer = functools.partial(
            moe_ffn, activation=activation, weights_on_input=weights_on_input,
            implementation=implementation,
        )  # fmt: skip
        return layer_over_devices(
            own_layer, x, topk_ids, topk_weights, gate_up, down,
            expert_axis=expert_axis, tensor_axis=tensor_axis, exchange=exchange,
        )  # fmt: skip
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"{_WHERE}: activation is {activation!r}, expected one of {sorted(ACTIVATIONS)}"
        )
    halves = tuple(gate_up) if isinstance(gate_up, tuple | list) else (gate_up,)
    check_stacks(halves, down, implementation)
    x = checks.check_x(x, halves[0].k, halves[0].dtype, _WHERE)
    checks.check_implementation(implementation, x.dtype, _WHERE)
    ids, weights = checked_routes(x.shape[:-1], topk_ids, topk_weights, down.num_experts)
    for stack in (*halves, down):
        of = "down" if stack is down else "gate_up"
        check_own_experts(stack, x, ids, "topk_ids", "expert_axis", _WHERE, of)

    x2 = checks.check_foldable(x, x.ndim - 1, "x", _WHERE).reshape(-1, x.shape[-1])
    layer = _Layer(activation, bool(weights_on_input), implementation)
    out = _product(layer, *vary_together(x2, ids, weights, halves, down))
    return out.reshape(*x.shape[:-1], down.n_per_expert)


class _Layer(NamedTuple):
    activation: str
    weights_on_input: bool
    implementation: str | None


def _compute(static: _Layer, x, ids, weights, halves, down) -> jax.Array:
    """Checked arguments, tokens on one axis, to `[T, N]`."""
    return _foldable(static)(x, ids, weights, halves, down)


def _backward(static, operands, g):
    x, ids, weights, halves, down = operands
    activation, weights_on_input, implementation = static
    activate = ACTIVATIONS[activation]
    return layer_gradients(
        g, x, ids, weights, halves, down, activate, weights_on_input, implementation, _WHERE
    )


def _primals(x, ids, weights, halves, down):
    return x, None, weights, tuple(map(trained, halves)), trained(down)


_product = differentiable(_compute, _backward, _primals, keep=lambda *operands: operands)


@functools.cache
def _foldable(static: _Layer):
    """The layer, with the rule that a batch of tokens or of layers is one larger layer."""
    activation, weights_on_input, implementation = static

    @jax.custom_batching.custom_vmap
    def layer(x, ids, weights, halves, down):
        if implementation != "xla" and can_fuse(halves, down):
            return fused_layer(
                x, ids, weights, halves[0], down, activation, weights_on_input, implementation
            )
        activate = ACTIVATIONS[activation]
        return composed_layer(
            x, ids, weights, halves, down, activate, weights_on_input, implementation, _WHERE
        )

    @layer.def_vmap
    def _(axis_size, in_batched, x, ids, weights, halves, down):
        batched = set(jax.tree.leaves(in_batched[3:]))
        # Shared leaves beside batched ones would have to be repeated: weights, copied.
        if len(batched) == 2 or (True in batched and axis_size == 0):
            return _one_by_one(layer, in_batched, x, ids, weights, halves, down), True
        x, ids, weights = (
            folding.to_front(a, 0 if b else None, axis_size)
            for a, b in zip((x, ids, weights), in_batched, strict=False)
        )
        num_experts = jax.tree.leaves(down)[0].shape[1 if True in batched else 0]
        if True in batched:
            halves, down = tuple(map(folding.fold_stack, halves)), folding.fold_stack(down)
        ids = folding.fold_ids(ids, num_experts, True in batched)
        tokens = (
            checks.check_foldable(a, 2, f"{name}, its mapped axis first,", _WHERE)
            .reshape(axis_size * a.shape[1], a.shape[2])
            for name, a in (("x", x), ("topk_ids", ids), ("topk_weights", weights))
        )  # fmt: skip
        out = layer(*tokens, halves, down)
        return out.reshape(axis_size, ids.shape[1], out.shape[1]), True

    return layer


def _one_by_one(layer, in_batched, *args):
    """`layer` for each element of the batch, where `in_batched` says which leaves have one."""
    leaves, tree = jax.tree.flatten(args)
    flags = jax.tree.leaves(in_batched)

    def one(slices):
        rest = iter(slices)
        filled = [next(rest) if flag else leaf for leaf, flag in zip(leaves, flags, strict=True)]
        return layer(*jax.tree.unflatten(tree, filled))

    return jax.lax.map(one, [leaf for leaf, flag in zip(leaves, flags, strict=True) if flag])
