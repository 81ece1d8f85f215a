"""moe_matmul: the contract on every backend, poisoned memory, transformations, each error."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import problems
import pytest
from jax.sharding import Mesh, PartitionSpec
from jaxprs import equations

from jax_marlin.ops.moe_matmul import TARGET, Routing, moe_matmul, routed_matmul


@functools.cache
def small() -> tuple[problems.Case, tuple, np.ndarray]:
    """float32 experts, routing in blocks of 8, and the routed rows they mean."""
    problem = problems.Problem(
        "routed", m=7, k=96, n=72, group_size=32, dtype="float32", bias=True, num_experts=4
    )
    case = problems.build(problem)
    routing = problems.align(case.topk_ids, 8, 4)
    return case, routing, oracle.routed_rows(case.x, case.weights, case.topk_ids, case.bias)


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-4)


def row_budgets(problem, case):
    """Error budget of every routed row; rows that no expert computes must be exactly zero."""
    budget = np.zeros((problem.m * problem.top_k, problem.n))
    for row, expert in enumerate(case.topk_ids.ravel()):
        if 0 <= expert < problem.num_experts:
            bias = None if case.bias is None else case.bias[expert]
            x = case.x[row // problem.top_k][None]
            budget[row] = oracle.matmul_budget(x, case.weights[expert], problem.dtype, bias)[0]
    return budget


@pytest.mark.parametrize("problem", problems.PROBLEMS, ids=str)
def test_contract_with_poisoned_memory(problem, backend):
    case = problems.build(problem)
    stack = problems.poison(case.stack(), case.topk_ids)
    routed = ((case.topk_ids >= 0) & (case.topk_ids < problem.num_experts)).any(axis=1)
    x = np.where(routed[:, None], case.x, np.array(np.nan, case.x.dtype))
    routing = problems.align(case.topk_ids, problem.moe_block_size, problem.num_experts)
    y = routed_matmul(
        jnp.asarray(x),
        stack,
        Routing(*map(jnp.asarray, routing)),
        moe_block_size=problem.moe_block_size,
        top_k=problem.top_k,
        implementation=problems.implementation(backend, problem.dtype),
    )
    assert y.dtype == problem.dtype
    expected = oracle.routed_rows(case.x, case.weights, case.topk_ids, case.bias)
    oracle.assert_within(y, expected, row_budgets(problem, case), problem.name)


@pytest.mark.parametrize("weights_before_bias", [False, True], ids=["after_bias", "before_bias"])
def test_router_weights(backend, weights_before_bias):
    problem = problems.Problem("router_weights", m=13, bias=True, dtype="bfloat16", num_experts=4)
    case = problems.build(problem)
    routing = problems.align(case.topk_ids, 8, 4)
    y = routed_matmul(
        jnp.asarray(case.x),
        case.stack(),
        Routing(*routing),
        moe_block_size=8,
        top_k=2,
        topk_weights=case.topk_weights,
        weights_before_bias=weights_before_bias,
        preferred_element_type=jnp.float32,
        implementation=backend,
    )
    assert y.dtype == jnp.float32 and case.bias is not None
    row_weights = case.topk_weights.reshape(-1, 1)
    bias = case.bias.astype(np.float64)[case.topk_ids.ravel()]
    product = oracle.routed_rows(case.x, case.weights, case.topk_ids)
    if weights_before_bias:
        expected = product * row_weights + bias
    else:
        expected = (product + bias) * row_weights
    oracle.assert_within(y, expected, row_budgets(problem, case), "router weights")


def test_down_projection_reads_its_own_rows(backend):
    problem = problems.Problem("down", m=24, top_k=1, num_experts=5, routing="skips")
    case = problems.build(problem)
    routing = problems.align(case.topk_ids, 8, 5)
    y = routed_matmul(
        jnp.asarray(case.x), case.stack(), Routing(*map(jnp.asarray, routing)),
        moe_block_size=8, top_k=1, zero_output=False, implementation=backend,
    )  # fmt: skip
    expected = oracle.routed_rows(case.x, case.weights, case.topk_ids)
    named = (case.topk_ids.ravel() >= 0) & (case.topk_ids.ravel() < 5)
    budget = row_budgets(problem, case)[named]
    oracle.assert_within(np.asarray(y)[named], expected[named], budget, "down")


def test_nothing_to_do_is_zero():
    case, (slots, expert_ids, used), _ = small()
    call = functools.partial(moe_matmul, moe_block_size=8, top_k=2)
    assert not np.any(call(case.x, case.stack(), slots, expert_ids, np.array([0], np.int32)))
    empty = call(case.x, case.stack(), slots[:0], expert_ids[:0], np.array([0], np.int32))
    assert empty.shape == (14, 72) and not np.any(empty)
    assert call(case.x[:0], case.stack(), slots, expert_ids, used).shape == (0, 72)


def test_ids_outside_the_rows_are_padding():
    case, (slots, expert_ids, used), expected = small()
    odd = np.where(slots == 14, np.resize([-5, 14, 2**31 - 1, 99], slots.shape), slots)
    y = moe_matmul(
        case.x, case.stack(), odd.astype(np.int32), expert_ids, used, moe_block_size=8, top_k=2
    )
    close(y, expected)


def test_more_used_slots_than_blocks_stay_in_bounds():
    case, _, _ = small()
    slots, expert_ids = np.arange(14, dtype=np.int32), np.array([2, 2], np.int32)
    y = moe_matmul(
        case.x,
        case.stack(),
        slots,
        expert_ids,
        np.array([2**31 - 1], np.int32),
        moe_block_size=8,
        top_k=2,
    )
    assert case.bias is not None
    close(y, oracle.matmul(np.repeat(case.x, 2, axis=0), case.weights[2], case.bias[2]))


def test_shared_permutation_is_gathered_once():
    problem = problems.Problem("shared", g_idx="shared", dtype="float32", num_experts=4)
    case = problems.build(problem)
    stack, routing = case.stack(), problems.align(case.topk_ids, 8, 4)
    call = functools.partial(moe_matmul, moe_block_size=8, top_k=2)
    calls = equations(call, case.x, stack, *map(jnp.asarray, routing))
    (perm,) = [e.invars[4] for e in calls if e.primitive.name == TARGET]
    assert np.shape(perm.aval) == (0,)  # no permutation left for the routed rows
    close(call(case.x, stack, *routing), oracle.routed_rows(case.x, case.weights, case.topk_ids))


def test_jit_scan_and_vmap_over_x():
    case, routing, expected = small()
    stack, device_routing = case.stack(), tuple(map(jnp.asarray, routing))
    call = functools.partial(moe_matmul, moe_block_size=8, top_k=2)
    close(jax.jit(call)(case.x, stack, *device_routing), expected)
    xs = jnp.asarray(np.stack([case.x, case.x], axis=1))
    batched = jax.vmap(lambda x: call(x, stack, *device_routing), in_axes=1)
    close(batched(xs), np.stack([expected] * 2))
    _, ys = jax.lax.scan(lambda c, x: (c, call(x, stack, *device_routing)), 0, xs.swapaxes(0, 1))
    close(ys, np.stack([expected] * 2))


def test_vmap_over_stacks_and_routing():
    case, routing, expected = small()
    stacks = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf[::-1]]), case.stack())
    slots, expert_ids, used = map(jnp.asarray, routing)
    ids = jnp.stack([expert_ids, jnp.where(expert_ids < 0, -1, 3 - expert_ids)])
    y = jax.vmap(
        lambda stack, i: moe_matmul(case.x, stack, slots, i, used, moe_block_size=8, top_k=2)
    )(stacks, ids)
    close(y, np.stack([expected] * 2))


def test_shard_map_types_the_result():
    case, routing, expected = small()
    mesh = Mesh(np.array(jax.devices()[:1]), ("experts",))
    split, whole = PartitionSpec("experts"), PartitionSpec()

    def sharded(out_specs):
        call = functools.partial(moe_matmul, moe_block_size=8, top_k=2)
        in_specs = (whole, split, whole, whole, whole)
        return jax.jit(jax.shard_map(call, mesh=mesh, in_specs=in_specs, out_specs=out_specs))

    arguments = (case.x, case.stack(), *map(jnp.asarray, routing))
    close(sharded(split)(*arguments), expected)
    with pytest.raises(ValueError, match="out_specs"):
        sharded(whole)(*arguments)


class TestErrors:
    """Each refused argument; the call below is the accepted twin of all of them."""

    def call(self, **changes):
        case, (slots, expert_ids, used), expected = small()
        arguments = {
            "x": case.x, "stack": case.stack(), "sorted_token_ids": slots,
            "expert_ids": expert_ids, "num_tokens_past_padded": used,
            "moe_block_size": 8, "top_k": 2, "topk_weights": np.ones((7, 2), np.float32),
        }  # fmt: skip
        return moe_matmul(**arguments | changes), expected

    def test_the_twin_is_accepted(self):
        close(*self.call())

    def test_host_expert_ids_out_of_range(self):
        _, (_, expert_ids, _), _ = small()
        for bad in (4, -2):
            ids = expert_ids.copy()
            ids[1] = bad
            with pytest.raises(ValueError, match=f"expert_ids contains {bad}, expected -1"):
                self.call(expert_ids=ids)
            with pytest.raises(ValueError, match=f"expert_ids contains {bad}, expected -1"):
                self.call(expert_ids=ids.tolist())
            self.call(expert_ids=jnp.asarray(ids))  # on the device: skipped

    def test_lists_are_host_arrays(self):
        _, (slots, expert_ids, used), _ = small()
        close(
            *self.call(
                sorted_token_ids=slots.tolist(),
                expert_ids=expert_ids.tolist(),
                num_tokens_past_padded=used.tolist(),
            )
        )

    def test_block_size_of_another_alignment(self):
        with pytest.raises(ValueError, match=r"expert_ids has shape .* another moe_block_size"):
            self.call(moe_block_size=16)

    def test_float_ids(self):
        _, (slots, _, _), _ = small()
        with pytest.raises(TypeError, match="sorted_token_ids has dtype float32, expected int"):
            self.call(sorted_token_ids=slots.astype(np.float32))

    def test_shapes(self):
        case, (slots, _, used), _ = small()
        with pytest.raises(ValueError, match=r"moe_matmul: x has shape \(7, 95\), expected \[T"):
            self.call(x=case.x[:, :95])
        with pytest.raises(ValueError, match=r"expected \[T, 96\]"):
            self.call(x=case.x[None])
        with pytest.raises(ValueError, match=r"sorted_token_ids has shape .* expected one axis"):
            self.call(sorted_token_ids=slots[None])
        with pytest.raises(ValueError, match=r"num_tokens_past_padded has shape \(2,\)"):
            self.call(num_tokens_past_padded=np.resize(used, 2))
        with pytest.raises(
            ValueError, match=r"topk_weights has shape \(7,\), expected .* = \(7, 2\)"
        ):
            self.call(topk_weights=np.ones(7, np.float32))

    @pytest.mark.parametrize("name", ["moe_block_size", "top_k"])
    @pytest.mark.parametrize("value", [0, -1, 2.0, True])
    def test_sizes_that_are_no_positive_ints(self, name, value):
        with pytest.raises(ValueError, match=f"{name} is {value}, expected a static int"):
            self.call(**{name: value})

    def test_swapped_ids_and_weights(self):
        with pytest.raises(TypeError, match=r"topk_weights has dtype int32, .* swapped"):
            self.call(topk_weights=np.ones((7, 2), np.int32))

    def test_x_of_another_dtype(self):
        case, _, _ = small()
        with pytest.raises(TypeError, match="x has dtype bfloat16 but the weight computes in f"):
            self.call(x=jnp.asarray(case.x, jnp.bfloat16))

    def test_what_is_no_stack(self):
        case, _, _ = small()
        with pytest.raises(TypeError, match="expected a MarlinExpertStack of experts"):
            self.call(stack=case.stack()[0])
        with pytest.raises(TypeError, match="expected a MarlinExpertStack of experts"):
            self.call(stack=jax.tree.map(lambda leaf: leaf[0], case.stack()))
        with pytest.raises(TypeError, match=r"^moe_matmul: stack is ndarray, expected a Marlin"):
            self.call(stack=case.weights)


def test_wide_padding_ids_do_not_wrap_into_rows():
    case, routing, expected = small()
    slots, expert_ids, used = (np.asarray(a, np.int64) for a in routing)
    rows = case.x.shape[0] * case.topk_ids.shape[1]
    slots = np.where((slots < 0) | (slots >= rows), 2**32, slots)
    actual = moe_matmul(
        jnp.asarray(case.x), case.stack(), slots, expert_ids, used,
        moe_block_size=8, top_k=case.topk_ids.shape[1],
    )  # fmt: skip
    close(actual, expected)


def test_transposed_router_weights_are_refused():
    case, routing, _ = small()
    top_k = case.topk_ids.shape[1]
    arguments = (jnp.asarray(case.x), case.stack(), *(jnp.asarray(a) for a in routing))
    weights = jnp.asarray(case.topk_weights)
    moe_matmul(*arguments, moe_block_size=8, top_k=top_k, topk_weights=weights)
    with pytest.raises(ValueError, match=r"topk_weights has shape .*, expected \(T, top_k\)"):
        moe_matmul(*arguments, moe_block_size=8, top_k=top_k, topk_weights=weights.T)


def test_leaves_that_tree_map_has_cast_are_refused():
    case, routing, _ = small()
    stack = jax.tree.map(lambda a: a.astype(jnp.float16), case.stack())
    arguments = (jnp.asarray(case.x, jnp.float16), stack, *(jnp.asarray(a) for a in routing))
    with pytest.raises(TypeError, match=r"use|stack\.astype"):
        moe_matmul(*arguments, moe_block_size=8, top_k=case.topk_ids.shape[1])
