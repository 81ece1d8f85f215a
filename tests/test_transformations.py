"""Every op under scan, cond, checkpoint, donation, eval_shape, AOT and the compilation cache."""

import re
import subprocess
import sys
from pathlib import Path

import extension_stand_in
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxprs import packed_results
from operations import OPS, E, H, T, arguments

import jax_marlin as jm
from jax_marlin.ops import ffi_targets

LAYERS = 3


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


def gradient(op, operands):
    """Of x."""
    return jax.grad(lambda x: (OPS[op](*operands._replace(x=x)) ** 2).sum())


@pytest.mark.parametrize("op", OPS)
def test_jit_and_eager_agree(op):
    operands = arguments()
    close(jax.jit(OPS[op])(*operands), OPS[op](*operands))
    close(jax.jit(gradient(op, operands))(operands.x), gradient(op, operands)(operands.x))


@pytest.mark.parametrize("g_idx", ["shared", "per_expert"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_arguments_that_are_constants_of_the_program(dtype, g_idx):
    """As a jitted pull-back's are. XLA computes what it can of the act-order gather beforehand."""
    x, *rest = arguments(dtype=dtype, g_idx=g_idx)
    for op in OPS:
        folded = jax.jit(lambda op=op: OPS[op](x, *rest))()
        np.testing.assert_array_equal(folded, jax.jit(lambda x, op=op: OPS[op](x, *rest))(x))


@pytest.mark.parametrize("op", OPS)
def test_scan_over_stacked_layers(op):
    """Layers as leaves [L, E, ...], which scan slices: right, if not free."""
    layers = [arguments(seed) for seed in range(LAYERS)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)

    def step(x, layer):
        return x + OPS[op](*layer._replace(x=x))[:T] / 8, None

    got, _ = jax.lax.scan(step, layers[0].x, stacked)
    expected = layers[0].x
    for layer in layers:
        expected, _ = step(expected, layer)
    close(got, expected)


def all_layers(step, x, one_stack):
    """scan over a traced layer number; layer l's expert e is expert l * E + e of one stack."""
    numbers = jnp.arange(LAYERS, dtype=jnp.int32)
    return jax.lax.scan(lambda x, layer: (step(x, layer, *one_stack), None), x, numbers)[0]


def routed_layer(x, layer, stack, down):
    ids = jnp.array([[0, 3], [2, -1], [1, 0], [3, 3], [2, 1], [0, 2]])
    ids = jnp.where(ids < 0, -1, layer * E + ids)
    weights = jnp.full(ids.shape, 0.25)
    routing = jm.moe_align_block_size(ids, 8, LAYERS * E)
    rows = jm.moe_matmul(x, stack, *routing, moe_block_size=8, top_k=2, topk_weights=weights)
    return x + rows[::2] + jm.moe_ffn(x, ids, weights, stack, down)


def dense_layer(x, layer, stack, down):
    return x + jm.matmul(x, stack[layer * E + 1]) / 8


def ragged_layer(x, layer, stack, down):
    return x + jm.ragged_dot(x, stack, jnp.zeros(LAYERS * E, int).at[layer * E + 2].set(T)) / 8


BODIES = {"matmul": dense_layer, "ragged_dot": ragged_layer, "moe_matmul and moe_ffn": routed_layer}


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_scan_over_a_traced_layer_copies_no_packed_leaf(body, backward):
    """In the compiled program no instruction makes an array as large as a packed leaf."""
    operands = arguments(num_experts=LAYERS * E)
    stacks = (operands.stack, operands.down)

    def run(x, stacks):
        return all_layers(BODIES[body], x, stacks)

    def loss(x, stacks):
        return (run(x, stacks) ** 2).sum()

    function = jax.grad(loss) if backward else run
    compiled = jax.jit(function).lower(operands.x, stacks).compile()
    for stack in stacks:
        assert packed_results(compiled, stack.qweight.shape) == []
    if not backward:
        expected = operands.x
        for layer in range(LAYERS):
            expected = BODIES[body](expected, layer, *stacks)
        close(compiled(operands.x, stacks), expected)


def test_the_check_for_copies_sees_one():
    """A program that does copy a packed leaf: the assertion above can fail."""
    operands = arguments()
    leaf = operands.stack.qweight
    compiled = jax.jit(lambda a: a.at[1].add(1)).lower(leaf).compile()
    assert packed_results(compiled, leaf.shape) != []


def test_scan_over_experts_copies_no_packed_leaf():
    operands = arguments()

    def total(x, stack):
        add = lambda y, e: (y + jm.matmul(x, stack[e]), None)  # noqa: E731
        return jax.lax.scan(add, jnp.zeros((T, H)), jnp.arange(E))[0]

    compiled = jax.jit(total).lower(operands.x, operands.stack).compile()
    assert packed_results(compiled, operands.stack.qweight.shape) == []
    each = [jm.matmul(operands.x, operands.stack[e]) for e in range(E)]
    close(compiled(operands.x, operands.stack), sum(each[1:], each[0]))


def test_scan_on_cuda_hands_the_whole_leaf_to_the_call(monkeypatch):
    """The custom call reads what the loop carries or closes over, no slice of it."""
    if ffi_targets.cuda_unavailable_reason() is not None:
        extension_stand_in.install(monkeypatch, extension_stand_in.stand_in())
    operands = arguments(num_experts=LAYERS * E, dtype="bfloat16")
    stacks = (operands.stack, operands.down)

    def step(x, layer, stack, down):
        ids = jnp.where(operands.ids < 0, -1, layer * E + operands.ids % E)
        return x + jm.moe_ffn(x, ids, operands.weights, stack, down) + stack[layer * E](x)

    traced = jax.jit(lambda x, stacks: all_layers(step, x, stacks)).trace(operands.x, stacks)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@jax_marlin_moe_ffn_v1(") == text.count("@jax_marlin_matmul_v1(") == 1
    shape = "x".join(map(str, operands.stack.qweight.shape)) + "xui32"
    made = re.findall(rf"= (?:stablehlo\.)?(\w+) .*-> tensor<{shape}>", text)
    assert f"tensor<{shape}>" in text and not [name for name in made if "slice" in name], made


@pytest.mark.parametrize("op", OPS)
def test_cond(op):
    operands = arguments()

    def run(flag, x):
        apply = lambda x: OPS[op](*operands._replace(x=x))[:T]  # noqa: E731
        return jax.lax.cond(flag, apply, lambda x: x, x)

    close(jax.jit(run)(True, operands.x), OPS[op](*operands)[:T])
    close(jax.jit(run)(False, operands.x), operands.x)
    pulled = jax.jit(jax.grad(lambda x, flag: run(flag, x).sum()))
    close(pulled(operands.x, False), jnp.ones((T, H)))
    exact = jax.grad(lambda x: OPS[op](*operands._replace(x=x))[:T].sum())(operands.x)
    close(pulled(operands.x, True), exact)


@pytest.mark.parametrize("op", OPS)
def test_checkpoint(op):
    operands = arguments()
    loss = lambda x: (OPS[op](*operands._replace(x=jnp.sin(x))) ** 2).sum()  # noqa: E731
    expected = jax.grad(loss)(operands.x)
    close(jax.jit(jax.grad(jax.checkpoint(loss)))(operands.x), expected)
    saving_nothing = jax.checkpoint(loss, policy=jax.checkpoint_policies.nothing_saveable)
    close(jax.grad(saving_nothing)(operands.x), expected)


@pytest.mark.parametrize("op", OPS)
def test_donated_x_is_reused_for_the_result(op):
    operands = arguments(top_k=1)
    expected = OPS[op](*operands)
    donating = jax.jit(OPS[op], donate_argnums=0)
    text = donating.lower(*operands).as_text()
    assert "tf.aliasing_output" in text or "jax.buffer_donor" in text
    x = operands.x + 0
    close(donating(x, *operands[1:]), expected)
    assert x.is_deleted()


@pytest.mark.parametrize("op", OPS)
def test_eval_shape(op):
    operands = arguments()
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), operands)
    out = jax.eval_shape(OPS[op], *shapes)
    assert (out.shape, out.dtype) == (OPS[op](*operands).shape, jnp.float32)


@pytest.mark.parametrize("op", OPS)
def test_ahead_of_time(op):
    """Lowered and compiled from shapes alone, then called with arrays."""
    operands = arguments()
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), operands)
    close(jax.jit(OPS[op]).lower(*shapes).compile()(*operands), OPS[op](*operands))


CACHED = """
import collections, jax, jax.monitoring
from operations import OPS, arguments
counts = collections.Counter()
jax.monitoring.register_event_listener(lambda name, **_: counts.update([name]))
operands = arguments()
prefix = "/jax/compilation_cache/cache_"
for op, function in OPS.items():
    for run in range(2):
        counts.clear()
        gradient = jax.grad(lambda x: function(x, *operands[1:]).sum())
        compiled = jax.jit(lambda x: (function(x, *operands[1:]), gradient(x)))
        compiled.lower(operands.x).compile()
        print(op, run, counts[prefix + "hits"], counts[prefix + "misses"])
        jax.clear_caches()
"""


def test_persistent_compilation_cache(tmp_path):
    """Compiled once, then found on disk, by every op and its gradient."""
    package, tests = Path(jm.__file__).parent.parent, Path(__file__).parent
    environment = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path), "JAX_PLATFORMS": "cpu",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "PYTHONPATH": f"{package}:{tests}",
    }  # fmt: skip
    run = subprocess.run(
        [sys.executable, "-c", CACHED], env=environment, capture_output=True, text=True, check=True
    )
    rows = [line.split() for line in run.stdout.splitlines()]
    assert [row[:2] for row in rows] == [[op, str(run)] for op in OPS for run in (0, 1)]
    for op, run_number, hits, misses in rows:
        assert (int(hits) >= 1 and misses == "0") or (run_number == "0" and int(misses) >= 1), op
