"""Bad input of moe_ffn: each message, and the nearest input that is accepted."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from moe_layers import build_layer, expected

from jax_marlin.ops.moe_ffn import moe_ffn

LAYER = build_layer("errors", dtype="float32")
GATE_UP, DOWN = LAYER.stacks()
ARGUMENTS = {
    "x": np.asarray(LAYER.x),
    "topk_ids": LAYER.gate_up.topk_ids,
    "topk_weights": LAYER.gate_up.topk_weights,
    "gate_up": GATE_UP,
    "down": DOWN,
}
X, IDS, WEIGHTS = (ARGUMENTS[name] for name in ("x", "topk_ids", "topk_weights"))
ERRORS = [
    (
        {"topk_ids": WEIGHTS, "topk_weights": IDS},
        TypeError,
        "topk_ids has dtype float32, expected integer; are topk_ids and topk_weights swapped",
    ),
    (
        {"topk_weights": IDS},
        TypeError,
        "topk_weights has dtype int32, expected floating; .*swapped",
    ),
    ({"topk_ids": IDS + 3}, ValueError, r"topk_ids holds \d, expected -1 \(dropped\) or 0 .. 4"),
    ({"topk_ids": IDS - 2}, ValueError, "topk_ids holds -2"),
    ({"topk_ids": IDS[:-1]}, ValueError, r"topk_ids has shape \(6, 3\), .*leading axes \(7,\)"),
    ({"topk_ids": IDS[:, :0]}, ValueError, r"topk_ids has shape \(7, 0\), .*top_k >= 1"),
    ({"topk_weights": WEIGHTS[:, :2]}, ValueError, r"topk_weights has shape \(7, 2\), expected"),
    ({"x": X[:, :95]}, ValueError, r"x has shape \(7, 95\)"),
    ({"x": X.astype(np.float16)}, TypeError, "x has dtype float16 .*w.astype"),
    ({"gate_up": DOWN, "down": GATE_UP}, ValueError, r"gate_up has shape .*expected \(E, H, 2I\)"),
    ({"gate_up": (GATE_UP, GATE_UP)}, ValueError, r"gate has shape .*expected \(E, H, I\)"),
    ({"gate_up": (GATE_UP,) * 3}, ValueError, "gate_up holds 3 stacks"),
    ({"gate_up": X}, TypeError, "gate_up is ndarray, expected a MarlinExpertStack"),
    (
        {"down": jax.tree.map(lambda a: a[0], DOWN)},
        TypeError,
        "down is MarlinExpertStack, expected",
    ),
    (
        {"down": DOWN[:4]},
        ValueError,
        r"gate_up has shape \(5, 96, 144\), expected .* \(4, 96, 144\)",
    ),
    ({"down": DOWN.astype(jnp.float16)}, TypeError, r".*down in float16; use gate_up.astype"),
    (
        {"down": jax.tree.map(lambda a: a[None], DOWN)},
        ValueError,
        r"the stack's qweight has shape \(1, 5, .*expected 4 axes",
    ),
    (
        {"gate_up": dataclasses.replace(GATE_UP, qweight=GATE_UP.qweight.astype(jnp.int32))},
        TypeError,
        "the stack's qweight is int32, expected uint32",
    ),
    ({"activation": "swish"}, ValueError, "activation is 'swish', expected one of .*'silu'"),
    ({"implementation": "cuda"}, NotImplementedError, "implementation='cuda'"),  # float32
]  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "message"), ERRORS)
def test_errors_name_the_argument(changes, error, message):
    with pytest.raises(error, match="^moe_ffn: " + message):
        moe_ffn(**(ARGUMENTS | changes))


def test_the_arguments_that_the_errors_change_are_accepted():
    oracle.assert_within(moe_ffn(**ARGUMENTS), *expected(LAYER))


# I = 80 is one call on CUDA, I = 72 is composed: both refuse while they are traced.
@pytest.mark.parametrize("intermediate", [80, 72])
def test_more_slots_than_int32_counts(intermediate):
    layer = build_layer("slots", intermediate=intermediate)
    tokens, top_k = 2**26, 64
    x = jax.ShapeDtypeStruct((tokens, layer.x.shape[1]), layer.x.dtype)
    ids = jax.ShapeDtypeStruct((tokens, top_k), jnp.int32)
    weights = jax.ShapeDtypeStruct((tokens, top_k), jnp.float32)
    with pytest.raises(ValueError, match="more than int32 counts; split T"):
        jax.eval_shape(moe_ffn, x, ids, weights, *layer.stacks())


@pytest.mark.parametrize("intermediate", [80, 72])
def test_leaves_of_another_rank_are_refused_while_traced(intermediate):
    layer = build_layer("leaves", intermediate=intermediate)
    gate_up, down = layer.stacks()
    down = jax.tree.map(lambda a: a[None], down)
    with pytest.raises(ValueError, match=r"^moe_ffn: .*expected 4 axes"):
        jax.eval_shape(moe_ffn, layer.x, *layer.routes, gate_up, down)
