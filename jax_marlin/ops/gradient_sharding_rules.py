"""What the products of the backward pass do with shards of their operands; see sharding_rules.py.

Sums over e and n, and over t of a weight's gradient, are float32 sums over devices (`psum`).
"""

from __future__ import annotations

from collections.abc import Callable

import jax

from jax_marlin.ops.partitioning import Axes, Partitioning, Scheme
from jax_marlin.ops.sharding_rules import accumulated, grouped, own_ids, summed, summed_axes


def transposed_product(bind: Callable) -> Partitioning:
    """Operands: g [R, N], ids [R], then qweight, scales, zero_points, perm or a dense weight."""

    def scheme(operands, params):
        g, _, weight, *leaves = (operand.shape for operand in operands)
        spec = params["spec"]
        if spec is None:
            parts = {"t": g[0], "e": weight[0], "k": weight[1], "n": weight[2]}
            return Scheme(
                (("t", "n"), ("t",), ("e", "k", "n")),
                ("t", "k"), parts, ("the cotangent", "ids", "weight"), frozenset({2}),
            )  # fmt: skip
        scales, zero_points, perm = leaves
        whole = params["first_column"] == 0 and g[1] == spec.n
        parts = {
            "t": g[0], "e": weight[0], "n": spec.n_parts if whole else 1,
            "k": 1 if perm[0] else spec.k_parts,  # in act-order a device writes the whole row
        }  # fmt: skip
        names = ("the cotangent", "ids", "qweight", "scales", "zero_points", "perm")
        return Scheme(
            (
                ("t", "n"), ("t",), ("e", "n", "k", None),
                *grouped(spec, "e", "n", "k", scales, zero_points), ("e", None)[: len(perm)],
            ),
            ("t", "k"), parts, names, frozenset({2, 3, 4}),
        )  # fmt: skip

    def local(axes: Axes, operands, params):
        g, ids, *leaves = operands
        ids = own_ids(axes, ids, leaves[0].shape[0])
        spec, k = params["spec"], leaves[0].shape[1]
        if spec is not None:
            spec = spec.held_by(*leaves[0].shape[1:3])
            k = spec.k
        sums = summed_axes(axes, "e", "n")
        out = bind(g, ids, *leaves, **params | {"spec": spec, "k": k} | accumulated(sums))
        return summed(out, sums, params["out_dtype"])

    return Partitioning("transposed_product", scheme, local)


def weight_gradient(bind: Callable) -> Partitioning:
    """Operands: x [T, K], g [T * top_k, N], ids [T * top_k]; result [E, K, N]."""

    def scheme(operands, params):
        x, g, _ = (operand.shape for operand in operands)
        parts = {"t": x[0], "e": params["num_experts"], "k": x[1], "n": g[1]}
        names = ("x", "the cotangent", "ids")
        return Scheme(
            (("t", "k"), ("t", "n"), ("t",)), ("e", "k", "n"), parts, names, frozenset()
        )  # fmt: skip

    def local(axes: Axes, operands, params):
        x, g, ids = operands
        experts = params["num_experts"]
        if axes.get("e"):
            experts //= jax.lax.axis_size(axes["e"])
        sums = summed_axes(axes, "t")
        out = bind(
            x, g, own_ids(axes, ids, experts),
            **params | {"num_experts": experts} | accumulated(sums),
        )  # fmt: skip
        return summed(out, sums, params["out_dtype"])

    return Partitioning("weight_gradient", scheme, local)
