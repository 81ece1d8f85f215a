"""On a GPU: command-buffer replays, poisoned memory, concurrent calls, stacks past 2^31 bytes.

The contract suites prove each op right once; these prove that it stays right when XLA replays a
captured call, reuses memory full of NaN, or runs two programs at the same time.
"""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import problems
import pytest
from layers import LAYERS, bits, build_layer, inputs, run_layers
from thunks import AFTER_PASSES, OPTIMIZED, all_captured, calls_of, dump_options, texts, written

import jax_marlin as jm
from jax_marlin.weights import MarlinExpertStack

pytestmark = pytest.mark.cuda

REPLAYS = 1000


def assert_captured(folder, program: str) -> None:
    """The one program that was compiled makes all its calls from command buffers."""
    (optimized,) = texts(folder, program, OPTIMIZED)
    calls = {"jax_marlin_moe_ffn_v1": LAYERS, "jax_marlin_matmul_v1": 1}
    assert {target: calls_of(target, optimized) for target in calls} == calls
    after = texts(folder, program, AFTER_PASSES)
    assert len(after) == 1 and all_captured(after[0]), written(folder, program)


@pytest.mark.parametrize("rows", [1, 21])
@pytest.mark.parametrize("g_idx", ["none", "per_expert"])
def test_replays_with_changing_routing(rows, g_idx, tmp_path):
    layer = build_layer(zeros="v1", g_idx=g_idx)
    function = jax.jit(run_layers, compiler_options=dump_options(tmp_path))
    xs = inputs(5, rows)
    first = [function(x, layer) for x in xs]
    assert_captured(tmp_path, run_layers.__name__)
    same = jax.jit(lambda a, b: jnp.all(a == b))
    wrong = [
        replay
        for replay in range(REPLAYS)
        if not same(function(xs[replay % 5], layer), first[replay % 5])
    ]
    assert not wrong
    assert len({bits(y).tobytes() for y in first}) == 5  # the inputs did differ
    assert all(np.isfinite(np.asarray(y, np.float32)).all() for y in first)


def fill_free_memory_with_nan(megabytes: int = 512) -> None:
    """What XLA hands out next, as results and as scratch, was NaN a moment ago."""
    sizes = (1 << 8, 1 << 12, 1 << 16, 1 << 20, 1 << 24)
    arrays = [jnp.full((size,), jnp.nan, jnp.float32) for size in sizes for _ in range(8)]
    arrays += [jnp.full((megabytes << 18,), jnp.nan, jnp.float32)]
    jax.block_until_ready(arrays)
    for array in arrays:
        array.delete()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    ("m", "k", "n"),
    [(4097, 200, 4104), pytest.param(200, 11264, 6400, id="split_k")],
)
def test_tiles_of_256_rows(m, k, n, dtype):
    """Many rows, of which the last tile holds a single one; and few rows, whose K is split."""
    problem = problems.Problem(
        "tall", m=m, k=k, n=n, group_size=-1, num_experts=1, top_k=1, dtype=dtype, bias=True
    )
    case = problems.build(problem)
    fill_free_memory_with_nan()
    out = jm.matmul(jnp.asarray(case.x), case.stack()[0], implementation="cuda")
    assert case.bias is not None
    weight, bias = case.weights[0], case.bias[0].astype(float)
    x = case.x.astype(np.float64)
    budget = oracle.matmul_budget(x, weight, dtype, bias)
    oracle.assert_within(out, oracle.matmul(x, weight, bias), budget)


@pytest.mark.parametrize("problem", problems.PROBLEMS[::3], ids=str)
def test_results_and_scratch_in_poisoned_memory(problem):
    if problem.dtype == "float32" or problem.m == 0:
        pytest.skip("float32 and empty products run no kernel")
    case = problems.build(problem)
    stack, x = case.stack(), jnp.asarray(case.x)
    routing = problems.align(case.topk_ids, problem.moe_block_size, problem.num_experts)
    slots, expert_ids, used = (jnp.asarray(a) for a in routing)

    def run():
        routed = jm.moe_matmul(
            x, stack, slots, expert_ids, used,
            moe_block_size=problem.moe_block_size, top_k=problem.top_k,
        )  # fmt: skip
        return routed, jm.matmul(x, stack[1], implementation="cuda")

    clean = run()
    fill_free_memory_with_nan()
    for expected, actual in zip(clean, run(), strict=True):
        assert np.isfinite(np.asarray(actual, np.float32)).all()
        assert np.array_equal(bits(actual), bits(expected))


def test_threads_that_call_at_the_same_time():
    layer = build_layer(zeros="v2")
    functions = [jax.jit(lambda *a, scale=s: run_layers(*a) * scale) for s in (1, 2)]
    xs = inputs(2, 33)
    expected = [bits(f(x, layer)) for f, x in zip(functions, xs, strict=True)]
    wrong = []

    def call(i):
        for _ in range(200):
            if not np.array_equal(bits(functions[i](xs[i], layer)), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=call, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_stack_past_two_to_the_31_bytes():
    """The last experts lie past 2^31 bytes; each must equal itself as a stack of its own."""
    num_experts, k, n = 80, 4096, 14336
    spec = jm.QuantSpec.create(bits=4, group_size=128, k=k, n=n)
    keys = jax.random.split(jax.random.key(3), 3)
    shape = (num_experts, spec.n_tiles, spec.k_tiles)
    stack = MarlinExpertStack(
        qweight=jax.random.bits(keys[0], (*shape, spec.words_per_tile), jnp.uint32),
        scales=jax.random.uniform(
            keys[1], (*shape[:2], spec.num_groups, 64), jnp.bfloat16, 0.01, 0.02
        ),
        zero_points=None,
        perm=None,
        bias=None,
        spec=spec,
    )
    assert stack.qweight.nbytes > 2**31
    x = jax.random.normal(keys[2], (3, k), jnp.bfloat16)
    ids = jnp.array([[num_experts - 1, 0], [1, num_experts - 2], [77, 40]], jnp.int32)
    routing = jm.moe_align_block_size(ids, 8, num_experts)
    routed = jm.moe_matmul(x, stack, *routing, moe_block_size=8, top_k=2)
    for row, expert in enumerate(np.asarray(ids).ravel()):
        alone = jax.tree.map(lambda leaf, e=int(expert): leaf[e : e + 1], stack)
        slots = jnp.full((8,), 6, jnp.int32).at[0].set(row)
        own = jm.moe_matmul(
            x, alone, slots, jnp.zeros(1, jnp.int32), jnp.full(1, 8), moe_block_size=8, top_k=2
        )
        assert np.abs(np.asarray(own[row], np.float32)).max() > 0
        # Split K may differ between the two calls: the last rounding of bfloat16 may, too.
        difference = np.abs(np.asarray(routed[row] - own[row], np.float32))
        assert np.all(difference <= 2**-7 * np.abs(np.asarray(own[row], np.float32)) + 1e-2)
