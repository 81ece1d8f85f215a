"""fold_act_order: down's row order moves into gate_up's columns and no output changes."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gptq_tensors import random_tensors, stacked
from jax.sharding import AxisType

from jax_marlin.act_order import fold_act_order, perm_from_g_idx
from jax_marlin.gptq import load_gptq_stacked
from jax_marlin.sharding import shard

E, H, I = 3, 64, 96  # I is off the tile, so that up starts inside one


def stack_of(seed: int, *, share=False, num_experts=E, **case):
    rng = np.random.default_rng(seed)
    arguments = stacked([random_tensors(rng, **case) for _ in range(num_experts)])
    if share:
        arguments["g_idx"] = arguments["g_idx"][0]
    return load_gptq_stacked(**arguments)


def layer(*, share=False, **case):
    """gate_up [E, H, 2 I] and down [E, I, H], all of it act-order."""
    gate_up = stack_of(1, k=H, n=2 * I, act_order=True, **case)
    return gate_up, stack_of(2, k=I, n=H, act_order=True, share=share, **case)


def rows_in_order(down, original: np.ndarray) -> np.ndarray:
    """[E, I, ...] along down's sorted rows."""
    perm = np.asarray(down.perm)
    return np.stack([original[e][perm[e]] for e in range(len(perm))])


def columns_in_order(down, original: np.ndarray) -> np.ndarray:
    """[E, ..., I] along down's sorted rows."""
    return np.swapaxes(rows_in_order(down, np.swapaxes(original, 1, -1)), 1, -1)


CASES = {
    "symmetric": {},
    "shared": {"share": True},
    "v1_zeros_bias": {"zeros": "v1", "bias": True},
    "8_bit_bfloat16_v2_zeros_bias": {"bits": 8, "dtype": "bfloat16", "zeros": "v2", "bias": True},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_columns_of_both_halves_follow_downs_rows(case):
    gate_up, down = layer(**case)
    folded, plain_down = fold_act_order(gate_up, down)
    before, after = np.asarray(gate_up.dequantize()), np.asarray(folded.dequantize())
    for half in (slice(0, I), slice(I, 2 * I)):
        np.testing.assert_array_equal(after[..., half], columns_in_order(down, before[..., half]))
        if gate_up.bias is not None:
            bias = np.asarray(gate_up.bias)[:, half]
            new_bias = np.asarray(folded.bias)[:, half]
            np.testing.assert_array_equal(new_bias, rows_in_order(down, bias))
    np.testing.assert_array_equal(folded.perm, gate_up.perm)
    assert folded.spec == gate_up.spec
    # down's stored rows now stand in the order of their input
    np.testing.assert_array_equal(
        plain_down.dequantize(), rows_in_order(down, np.asarray(down.dequantize()))
    )
    assert plain_down.perm is None
    assert plain_down.spec == dataclasses.replace(down.spec, shared_perm=False)
    assert plain_down.qweight is down.qweight


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_outputs_are_the_same(case):
    gate_up, down = layer(**case)
    folded, plain_down = fold_act_order(gate_up, down)
    x = jnp.asarray(np.random.default_rng(3).standard_normal((5, H)), gate_up.dtype)
    for expert in range(E):
        before, after = (np.asarray(stack[expert](x)) for stack in (gate_up, folded))
        gate, up = before[:, :I], before[:, I:]
        hidden = np.asarray(gate * up)
        after_hidden = after[:, :I] * after[:, I:]
        np.testing.assert_array_equal(after_hidden, hidden[:, np.asarray(down.perm)[expert]])
        y, folded_y = down[expert](hidden), plain_down[expert](after_hidden)
        np.testing.assert_array_equal(folded_y, y)


@pytest.mark.parametrize("share", [False, True], ids=["per_expert", "shared"])
def test_pair_of_stacks(share):
    gate = stack_of(4, k=H, n=I, act_order=True, zeros="v1", bias=True)
    up = stack_of(5, k=H, n=I, act_order=True)
    _, down = layer(share=share)
    (folded_gate, folded_up), plain_down = fold_act_order((gate, up), down)
    for before, after in ((gate, folded_gate), (up, folded_up)):
        expected = columns_in_order(down, np.asarray(before.dequantize()))
        np.testing.assert_array_equal(after.dequantize(), expected)
    np.testing.assert_array_equal(folded_gate.bias, rows_in_order(down, np.asarray(gate.bias)))
    assert folded_up.bias is None
    assert plain_down.perm is None


def test_nothing_to_fold_returns_what_came():
    gate_up, _ = layer()
    down = stack_of(6, k=I, n=H)
    assert fold_act_order(gate_up, down) == (gate_up, down)


def test_fold_leaves_its_arguments_alone():
    gate_up, down = layer(zeros="v1", bias=True)
    before = jax.tree.map(np.array, (gate_up, down))
    fold_act_order(gate_up, down)
    jax.tree.map(np.testing.assert_array_equal, before, (gate_up, down))


def test_host_leaves_are_accepted():
    gate_up, down = layer()
    on_host = jax.tree.map(np.asarray, (gate_up, down))
    folded, _ = fold_act_order(*on_host)
    np.testing.assert_array_equal(folded.qweight, fold_act_order(gate_up, down)[0].qweight)


def test_experts_of_several_devices_stay_on_them():
    mesh = jax.make_mesh((E,), ("experts",), (AxisType.Explicit,), devices=jax.devices()[:E])
    stacks = layer()
    folded, _ = fold_act_order(*shard(stacks, mesh, "expert", "experts"))
    assert folded.qweight.sharding.spec[0] == "experts"
    np.testing.assert_array_equal(folded.qweight, fold_act_order(*stacks)[0].qweight)


def test_bad_layers_are_refused_by_name():
    gate_up, down = layer()
    gate = stack_of(4, k=H, n=I)
    other = stack_of(7, k=I, n=H, num_experts=2, act_order=True)
    single = jax.tree.map(lambda leaf: leaf[0], down)
    cases = {
        "gate_up has (experts, N) = (3, 192), expected (2, 192): down has 2 experts with K = 96": (
            ValueError, gate_up, other,
        ),
        "gate_up has (experts, N) = (3, 96), expected (3, 192)": (ValueError, gate, down),
        "up has (experts, N) = (3, 192), expected (3, 96)": (ValueError, (gate, gate_up), down),
        "gate_up holds 3 stacks": (ValueError, (gate, gate, gate), down),
        "down is MarlinExpertStack(": (TypeError, gate_up, single),
        "gate_up is MarlinLinear(": (TypeError, gate_up[0], down),
        "gate_up is ndarray, expected a MarlinExpertStack": (TypeError, np.ones((2, 3)), down),
    }  # fmt: skip
    for message, (error, first, second) in cases.items():
        with pytest.raises(error, match=re.escape(f"fold_act_order: {message}")):
            fold_act_order(first, second)
    with pytest.raises(TypeError, match=r"fold_act_order: gate_up is traced, .* outside"):
        jax.jit(fold_act_order)(gate_up, down)


def test_rows_of_a_group_keep_their_order():
    g_idx = np.array([2, 0, 1, 0, 2, 1, 1, 0], np.int32)
    perm = perm_from_g_idx(g_idx, k=8, group_size=3, where="here")
    assert perm is not None
    assert perm.dtype == np.int32
    assert perm.tolist() == [1, 3, 7, 2, 5, 6, 0, 4]


@pytest.mark.parametrize("k, group_size", [(96, 32), (160, 64), (70, 70)])
def test_rows_in_group_order_need_no_permutation(k, group_size):
    g_idx = np.arange(k) // group_size
    assert perm_from_g_idx(g_idx, k=k, group_size=group_size, where="here") is None
