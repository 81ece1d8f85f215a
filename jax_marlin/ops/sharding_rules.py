"""What each primitive does with shards of its operands, and which axes belong together.

Factors: t rows (tokens), e experts, k rows of a weight, n columns of a weight, i the columns of
gate and up that are rows of down. Sums over e, k and i are float32 sums over devices (`psum`).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jax_marlin.ops.moe_align_block_size import align_routed_rows, expert_of_row
from jax_marlin.ops.partitioning import Axes, Partitioning, Scheme
from jax_marlin.quant_spec import QuantSpec

_WEIGHT = ("qweight", "scales", "zero_points")
_LEAVES = (*_WEIGHT, "perm", "bias")
_ROUTING = ("sorted_token_ids", "expert_ids", "num_tokens_past_padded", "topk_weights")
_PACKED = frozenset({1, 2, 3})
PAIR = (
    "a device needs a part of gate and the same part of up; place gate_up by "
    "jax_marlin.shard(..., gate_up=True), or pass the pair (gate, up)"
)


def matmul(bind: Callable) -> Partitioning:
    """Operands: x [M, K], qweight, scales, zero_points, bias [E, N] or a view's own [n], expert."""

    def scheme(operands, params):
        x, qweight, scales, zero_points, bias, _ = (operand.shape for operand in operands)
        spec = _spec(params)
        whole = params["first_tile"] == 0 and qweight[1] == spec.n_tiles
        parts = {"t": x[0], "e": qweight[0], "k": spec.k_parts, "n": spec.n_parts if whole else 1}
        own_bias = (None,) if bias[0] == 0 else ("n",)
        return Scheme(
            (
                ("t", "k"), ("e", "n", "k", None),
                *grouped(spec, "e", "n", "k", scales, zero_points),
                ("e", "n") if len(bias) == 2 else own_bias, (),
            ),
            ("t", "n"), parts, ("x", *_WEIGHT, "bias", "expert"), _PACKED,
        )  # fmt: skip

    def local(axes: Axes, operands, params):
        x, qweight, scales, zero_points, bias, expert = operands
        first, own = span(axes, "e", qweight.shape[0])
        experts = qweight.shape[0] * size(axes, "e")
        expert = jnp.clip(expert, 0, experts - 1) - first
        held = (expert >= 0) & (expert < own)
        spec = _spec(params).held_by(-(-params["n"] // 64) // size(axes, "n"), qweight.shape[2])
        sums = summed_axes(axes, "e", "k")
        out = bind(
            x, qweight, scales, zero_points, _once(axes, "k", bias), expert,
            **params | _sizes(spec) | accumulated(sums),
        )  # fmt: skip
        if axes.get("e"):
            out = jnp.where(held, out, jnp.zeros((), out.dtype))
        return summed(out, sums, params["out_dtype"])

    return Partitioning("matmul", scheme, local)


def moe_matmul(bind: Callable) -> Partitioning:
    """Operands: x [T, K], qweight, scales, zero_points, perm, bias, three of routing, weights."""

    def scheme(operands, params):
        x, qweight, scales, zero_points, perm, bias, *_ = (operand.shape for operand in operands)
        spec = _spec(params)
        columns, reasons = _columns(params["pairs"], spec.n_parts)
        parts = {
            "t": x[0], "e": qweight[0], "n": columns,
            "k": 1 if perm[0] else spec.k_parts,  # in act-order a device needs the whole row of x
        }  # fmt: skip
        row_weights = operands[9].shape
        return Scheme(
            (
                ("t", "k"), ("e", "n", "k", None),
                *grouped(spec, "e", "n", "k", scales, zero_points),
                ("e", None)[: len(perm)], ("e", "n")[: len(bias)],
                (None,), (None,), (None,), ("t" if row_weights[0] else None,),
            ),
            ("t", "n"), parts,
            ("x", *_LEAVES, *_ROUTING), _PACKED, reasons,
        )  # fmt: skip

    def local(axes: Axes, operands, params):
        x, qweight, scales, zero_points, perm, bias, *routing, row_weights = operands
        routing = _own_routing(axes, x, qweight.shape[0], routing, params)
        spec = _spec(params).held_by(qweight.shape[1], qweight.shape[2])
        sums = summed_axes(axes, "e", "k")
        zero_output = params["zero_output"] or bool(axes.get("e"))
        out = bind(
            x, qweight, scales, zero_points, perm, _once(axes, "k", bias), *routing, row_weights,
            **params | _sizes(spec) | accumulated(sums) | {"zero_output": zero_output},
        )  # fmt: skip
        return summed(out, sums, params["out_dtype"])

    return Partitioning("moe_matmul", scheme, local)


def dense_moe_matmul(bind: Callable) -> Partitioning:
    """Operands: x [T, K], weight [E, K, N], bias [E, N], three of routing, weights."""

    def scheme(operands, params):
        x, weight, bias, *_, row_weights = (operand.shape for operand in operands)
        columns, reasons = _columns(params["pairs"], weight[2])
        return Scheme(
            (
                ("t", "k"), ("e", "k", "n"), ("e", "n")[: len(bias)] if bias[0] else (None,),
                (None,), (None,), (None,), ("t" if row_weights[0] else None,),
            ),
            ("t", "n"), {"t": x[0], "e": weight[0], "k": weight[1], "n": columns},
            ("x", "weight", "bias", *_ROUTING), frozenset({1}), reasons,
        )  # fmt: skip

    def local(axes: Axes, operands, params):
        x, weight, bias, *routing, row_weights = operands
        routing = _own_routing(axes, x, weight.shape[0], routing, params)
        sums = summed_axes(axes, "e", "k")
        out = bind(
            x, weight, _once(axes, "k", bias), *routing, row_weights,
            **params | accumulated(sums),
        )  # fmt: skip
        return summed(out, sums, params["out_dtype"])

    return Partitioning("moe_matmul", scheme, local)


def moe_ffn(bind: Callable) -> Partitioning:
    """Operands: x [T, H], ids and weights [T, top_k], five leaves of gate_up, five of down."""

    def scheme(operands, params):
        shapes = [operand.shape for operand in operands]
        gate_up, down = params["gate_up_spec"], params["down_spec"]
        pairs = gate_up.pairs  # a device holds whole pairs, and down's rows for them
        act_order = shapes[11][0] > 0
        fits = down.k_parts % pairs == 0 and not act_order
        parts = {
            "t": shapes[0][0], "e": shapes[3][0], "i": pairs if fits else 1, "n": down.n_parts,
        }  # fmt: skip

        def leaves(spec, first, n, k):
            _, scales, zero_points, perm, bias = shapes[first : first + 5]
            return (
                ("e", n, k, None), *grouped(spec, "e", n, k, scales, zero_points),
                ("e", None)[: len(perm)], ("e", n)[: len(bias)],
            )  # fmt: skip

        names = [f"{stack}.{leaf}" for stack in ("gate_up", "down") for leaf in _LEAVES]
        return Scheme(
            (
                ("t", None), ("t", None), ("t", None),
                *leaves(gate_up, 3, "i", None), *leaves(down, 8, "n", "i"),
            ),
            ("t", "n"), parts, ("x", "topk_ids", "topk_weights", *names),
            frozenset({3, 4, 5, 8, 9, 10}), {"i": _paired_for(pairs)} if fits else {},
        )  # fmt: skip

    def local(axes: Axes, operands, params):
        x, ids, weights, *leaves = operands
        ids = own_ids(axes, ids, leaves[0].shape[0])
        leaves[9] = _once(axes, "i", leaves[9])
        specs = {
            "gate_up_spec": params["gate_up_spec"].held_by(*leaves[0].shape[1:3]),
            "down_spec": params["down_spec"].held_by(*leaves[5].shape[1:3]),
        }
        out = bind(x, ids, weights, *leaves, **params | specs)
        return summed(out, summed_axes(axes, "e", "i"), x.dtype)

    return Partitioning("moe_ffn", scheme, local)


def _spec(params) -> QuantSpec:
    return QuantSpec(params["bits"], params["group_size"], params["k"], params["n"])


def _columns(pairs: int | None, parts: int) -> tuple[int, dict[str, str]]:
    """Into how many parts columns can be cut, gate|up's into whole pairs, and why."""
    return (parts, {}) if pairs is None else (pairs, {"n": _paired_for(pairs)})


def _paired_for(pairs: int) -> str:
    paired = f"paired for {pairs} devices" if pairs > 1 else "not paired"
    return f"gate_up's columns are {paired}, and {PAIR}"


def _sizes(spec: QuantSpec) -> dict[str, int]:
    return {"k": spec.k, "n": spec.n, "group_size": spec.group_size}


def grouped(spec: QuantSpec, e, n, k, *shapes):
    """Factors of scales and zero points [E, N/64, G, 64], which may be empty."""
    groups = k if spec.num_groups > 1 else None  # one group is every device's
    return (((e, n, groups, None) if len(shape) == 4 else (None,)) for shape in shapes)


def size(axes: Axes, factor: str) -> int:
    return jax.lax.axis_size(axes[factor]) if axes.get(factor) else 1


def span(axes: Axes, factor: str, own: int):
    """(first, number) of what this device holds of a factor; `own` of them."""
    return (jax.lax.axis_index(axes[factor]) * own if axes.get(factor) else 0), own


def own_ids(axes: Axes, ids: jax.Array, experts: int) -> jax.Array:
    """Ids among this device's experts, of which it has so many; -1 for those of other devices."""
    if not axes.get("e"):
        return ids
    first, _ = span(axes, "e", experts)
    return jnp.where((ids >= first) & (ids < first + experts), ids - first, -1)


def _once(axes: Axes, factor: str, bias: jax.Array) -> jax.Array:
    """The bias on the first device of those whose sums meet, zero on the others."""
    if not (axes.get(factor) and bias.size):
        return bias
    return jnp.where(jax.lax.axis_index(axes[factor]) == 0, bias, jnp.zeros((), bias.dtype))


def summed_axes(axes: Axes, *factors: str) -> tuple[str, ...]:
    return tuple(axis for factor in factors for axis in axes.get(factor, ()))


def accumulated(sums: tuple[str, ...]) -> dict:
    return {"out_dtype": jnp.dtype(jnp.float32)} if sums else {}


def summed(out: jax.Array, sums: tuple[str, ...], dtype) -> jax.Array:
    return jax.lax.psum(out.astype(jnp.float32), sums).astype(dtype) if sums else out


def _own_routing(axes: Axes, x: jax.Array, experts: int, routing, params):
    """Routing tables of this device's rows and experts, from those of all."""
    if not (axes.get("t") or axes.get("e")):
        return routing
    rows, moe_block_size = x.shape[0] * params["top_k"], params["moe_block_size"]
    first_row, _ = span(axes, "t", rows)
    ids = expert_of_row(*routing, num_rows=rows * size(axes, "t"), moe_block_size=moe_block_size)
    ids = own_ids(axes, jax.lax.dynamic_slice_in_dim(ids, first_row, rows), experts)
    return align_routed_rows(
        ids[:, None], moe_block_size, experts, implementation=params["implementation"]
    )
