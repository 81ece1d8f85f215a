"""What every primitive shares: result types, the pair of lowerings, sequential vmap."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.sharding import ManualAxisType, NamedSharding, PartitionSpec

from jax_marlin.ops import checks, ffi_targets
from jax_marlin.ops.partitioning import (
    Partitioning,
    partitioned,
    result_spec,
)


def result_aval(shape, dtype, operands):
    """Result type for a shape rule: varies over every manual axis that any operand varies over.

    Without that union, `jax.shard_map` would accept `out_specs` that are wrong.
    """
    varying = frozenset().union(*(a.manual_axis_type.varying for a in operands))
    # Under shard_map some operands (constants) carry no mesh: take the one that does.
    mesh = next((a.sharding.mesh for a in operands if not a.sharding.mesh.empty), None)
    mesh = operands[0].sharding.mesh if mesh is None else mesh
    return operands[0].update(
        shape=shape,
        dtype=jnp.dtype(dtype),
        weak_type=False,
        sharding=NamedSharding(mesh, PartitionSpec(*(None for _ in shape))),
        manual_axis_type=ManualAxisType(varying=varying),
    )


def register_partitioned(
    primitive: Primitive,
    shape_rule: Callable,
    default: Callable,
    custom_call: Callable,
    has_kernel: Callable[..., bool],
    partitioning: Partitioning,
) -> None:
    """Shape rule and lowerings of a primitive that runs on shards of its operands.

    The arguments are as for `register_lowerings`. The shape rule's result gets the sharding that it
    has under an explicit mesh.
    """

    def typed_result(*operands, **params):
        aval = shape_rule(*operands, **params)
        spec = result_spec(partitioning, operands, params)
        return aval.update(sharding=NamedSharding(aval.sharding.mesh, spec))

    primitive.def_abstract_eval(typed_result)
    register_lowerings(primitive, default, custom_call, has_kernel, partitioning)


def register_lowerings(
    primitive: Primitive,
    default: Callable,
    custom_call: Callable,
    has_kernel: Callable[..., bool],
    partitioning: Partitioning | None = None,
) -> None:
    """Lowers `primitive` to `custom_call` on CUDA where `has_kernel`, to `default` elsewhere.

    Args:
        primitive: takes a parameter `implementation`: None, "cuda" or "xla"; with a `partitioning`,
            also `devices`, see `partitioning.needs_devices`, and perhaps `where`, the op that
            errors name in place of the partitioning's, and `pairs` of gate|up columns.
        default: plain JAX; called with the operands and the other parameters.
        custom_call: the same in terms of `jax.ffi.ffi_call`.
        has_kernel: `(result avals, *operand avals, **parameters)` to whether our kernels take it.
        partitioning: what each device does where a program spans several; None leaves it to XLA.
    """

    def lower_function(function, ctx, operands, params):
        # Inside shard_map the avals are typed with manual axes. The bodies are shard-local and
        # build constants (loop counters, empty outputs) of the plain type: drop the types.
        ctx = ctx.replace(avals_in=[_untyped(a) for a in ctx.avals_in])
        lowered = mlir.lower_fun(function, multiple_results=primitive.multiple_results)
        return lowered(ctx, *operands, **params)

    def lower_default(ctx, *operands, implementation, **params):
        if implementation == "cuda":
            raise NotImplementedError(
                f"{primitive.name}: implementation='cuda' was asked for, but the program is "
                f"lowered for {', '.join(ctx.module_context.platforms)}; use implementation=None"
            )
        return lower_function(default, ctx, operands, params)

    def lower_cuda(ctx, *operands, implementation, **params):
        usable = ffi_targets.cuda_unavailable_reason() is None
        usable = usable and has_kernel(ctx.avals_out, *ctx.avals_in, **params)
        if implementation == "xla" or not usable:
            return lower_function(default, ctx, operands, params)
        ffi_targets.ensure_registered()
        return lower_function(custom_call, ctx, operands, params)

    for rule, platform in ((lower_default, None), (lower_cuda, "cuda")):
        rule = rule if partitioning is None else _on_each_device(primitive, rule, partitioning)
        mlir.register_lowering(primitive, rule, platform=platform)


def _on_each_device(primitive: Primitive, rule: Callable, partitioning: Partitioning) -> Callable:
    """The lowering rule that, where a program spans devices, lowers each one's shard by `rule`."""

    def lower(ctx, *operands, **params):
        call = partitioned(primitive.bind, partitioning, params, ctx)
        if call is None:
            own = {n: v for n, v in params.items() if n not in ("devices", "where", "pairs")}
            return rule(ctx, *operands, **own)
        return mlir.lower_fun(call, multiple_results=False)(ctx, *operands)

    return lower


def map_sequentially(primitive: Primitive, operands, dims, params):
    """Batching rule: one bind after another (`lax.map`) over the mapped operands."""
    mapped = [jnp.moveaxis(a, d, 0) for a, d in zip(operands, dims, strict=True) if d is not None]

    def one(slices):
        rest = iter(slices)
        args = [a if d is None else next(rest) for a, d in zip(operands, dims, strict=True)]
        return primitive.bind(*args, **params)

    results = jax.lax.map(one, mapped)
    return results, jax.tree.map(lambda _: 0, results)


def set_batching(primitive: Primitive, rule: Callable) -> None:
    """Registers `rule(operands, dims, **parameters)`."""
    batching.primitive_batchers[primitive] = rule


def or_empty(leaf, dtype) -> jax.Array:
    """An absent optional operand is an empty array: every primitive has one operand list."""
    return jnp.zeros((0,), dtype) if leaf is None else leaf


def has_kernel(results, x, *_, **__) -> bool:
    """Whether our GEMM kernels take the call: 16-bit x, and something to compute."""
    return x.dtype in checks.KERNEL_DTYPES and not any(is_zero(d) for d in results[0].shape)


def align_rows(x):
    """Pads columns so that rows of 16-bit values start at multiples of 16 bytes.

    Kernels take `x.shape[1]` as the row stride and never read past the logical K.
    """
    padding = -x.shape[1] % 8
    return jnp.pad(x, ((0, 0), (0, padding))) if padding else x


def is_zero(dim):
    return isinstance(dim, int) and dim == 0  # a symbolic batch is at least 1


def _untyped(aval):
    if not aval.manual_axis_type.varying:
        return aval
    return aval.update(manual_axis_type=ManualAxisType())
