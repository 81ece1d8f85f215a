"""Act-order stacks whose experts an explicit mesh cuts, their permutations with them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import AxisType
from meshes import case, cpu_mesh, put
from moe_layers import Layer, expected
from operations import OPS

import jax_marlin as jm
from jax_marlin.bench.collectives import collectives_of

MESH = cpu_mesh(AxisType.Explicit)
CALLS = OPS | {
    "composed": lambda *a: jm.moe_ffn(*a, implementation="xla"),
    "dispatches": lambda x, i, w, stack, d: stack.gemm_phase_batched(
        x, jnp.array([[3, 0, 1, 4], [1, 2, 5, 3]])
    ),
    "vmap": lambda x, i, w, stack, d: jax.vmap(lambda e: jm.matmul(x, stack[e]))(jnp.array([3, 0])),
}
WHOLE = ("dispatches", "matmul")  # x is on no mesh; the first takes no part of its rows


def layer_of(g_idx: str) -> Layer:
    sizes: dict[str, Any] = {"bias": True, "g_idx": g_idx}
    return Layer(case("act_order", **sizes), case("act_order_down", k=128, n=192, **sizes))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("g_idx", ["shared", "per_expert"])
def test_permutations_are_cut_with_their_experts(g_idx, call):
    layer, function = layer_of(g_idx), CALLS[call]
    stacks = layer.stacks()
    assert stacks[0].spec.shared_perm == (g_idx == "shared")
    placed = jm.shard(stacks, MESH, "expert", "expert")
    arrays = (layer.x, *layer.routes)
    tokens = [a if call in WHOLE else put(MESH, a, "data") for a in arrays]

    def both(x, *rest):
        loss = lambda x: (function(x, *rest) ** 2).sum()  # noqa: E731
        return function(x, *rest), jax.grad(loss)(x)

    compiled = jax.jit(both).lower(*tokens, *placed).compile()
    for got, same in zip(compiled(*tokens, *placed), jax.jit(both)(*arrays, *stacks), strict=True):
        np.testing.assert_allclose(got, same, rtol=1e-3, atol=1e-3 * np.abs(same).max())
    if call.startswith(("moe_ffn", "composed")):
        oracle.assert_within(compiled(*tokens, *placed)[0], *expected(layer))
    # One row of a permutation may travel: that of all experts, or of the one that is asked for.
    sent = [c for c in collectives_of(compiled.as_text() or "") if c.shape[-1:] in ((256,), (128,))]
    assert all(np.prod(c.shape[:-1]) <= 2 for c in sent if c.dtype == "s32")


def test_rows_that_dispatches_cannot_have_cut_are_refused():
    layer = layer_of("none")
    stack, dispatches = layer.gate_up.stack(), jnp.array([[1, 0, 2, 3]])
    x, out = jnp.asarray(layer.x), jnp.zeros((8, 256))
    for name, arguments in {
        "x": (put(MESH, x, "data"), dispatches),
        "dispatches": (x, put(MESH, jnp.repeat(dispatches, 2, 0), "data")),
    }.items():
        with pytest.raises(
            ValueError, match=rf"gemm_phase_batched: {name} has type .*@data.* use jax.sh.*reshard"
        ):
            jax.jit(stack.gemm_phase_batched).lower(*arguments)
    same = stack.gemm_phase_batched(x, dispatches, out)
    arguments = put(MESH, x), put(MESH, dispatches), put(MESH, out, "data")
    np.testing.assert_allclose(jax.jit(stack.gemm_phase_batched)(*arguments), same, rtol=1e-5)
