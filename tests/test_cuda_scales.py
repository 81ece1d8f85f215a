"""Scales far from one: bfloat16 kernels fold powers of two into them, which must cost no bit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_marlin as jm

K, N, EXPERTS = 320, 384, 3  # two and a half groups
rng = np.random.default_rng(7)
weights = jnp.asarray(rng.standard_normal((EXPERTS, K, N)), jnp.bfloat16)


def call(stack, x, kind):
    """Rows of one expert, or shared by all, or the gradient of x, in float32."""
    if kind == "dense":
        return jm.matmul(x, stack[1], preferred_element_type=jnp.float32, implementation="cuda")
    rows = x.shape[0]
    sizes = jnp.asarray([0, rows - rows // 3, rows // 3], jnp.int32)

    def routed(x):
        return jm.ragged_dot(
            x, stack, sizes, preferred_element_type=jnp.float32, implementation="cuda"
        )

    if kind == "routed":
        return routed(x)
    (grad,) = jax.vjp(routed, x.astype(jnp.bfloat16))[1](jnp.ones((rows, N), jnp.float32))
    return grad.astype(jnp.float32)


@pytest.mark.cuda
@pytest.mark.parametrize("exponent", [-50, 20])
@pytest.mark.parametrize("kind", ["dense", "routed", "gradient"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 6, 30, 100, 500])
def test_a_power_of_two_in_the_scales_is_one_in_the_result(rows, bits, kind, exponent):
    stack = jm.quantize(weights, bits=bits, group_size=128, dtype=jnp.bfloat16)
    factor = 2.0**exponent
    scaled = dataclasses.replace(stack, scales=stack.scales * jnp.bfloat16(factor))
    x = jnp.asarray(rng.standard_normal((rows, K)), jnp.bfloat16)
    got, expected = (np.asarray(call(s, x, kind)) for s in (scaled, stack))
    assert np.isfinite(expected).all() and (expected != 0).any()
    np.testing.assert_array_equal(got, expected * np.float32(factor))


@pytest.mark.cuda
@pytest.mark.parametrize("rows", [1, 30, 100])
def test_scales_past_the_range_are_no_silent_garbage(rows):
    stack = jm.quantize(weights, bits=4, group_size=128, dtype=jnp.bfloat16)
    scaled = dataclasses.replace(stack, scales=stack.scales * jnp.bfloat16(2.0**40))
    x = jnp.asarray(rng.standard_normal((rows, K)), jnp.bfloat16)
    got, expected = (np.asarray(call(s, x, "dense")) for s in (scaled, stack))
    right = got == expected * np.float32(2.0**40)
    # Few rows multiply codes, and scale sums in float32.
    assert right.all() if rows == 1 else (right | ~np.isfinite(got)).all()
