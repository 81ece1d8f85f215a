"""Several devices, threads and programs at once; memory that runs out; calls that are refused.

What a CPU can stand in for runs there, too: devices, threads and programs are JAX's own.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layers import Layer, bits, build_layer, inputs, run_layers

import jax_marlin as jm

PLATFORMS = {"xla": "cpu", "cuda": "cuda"}


def devices(backend: str, count: int) -> list:
    """The platform's first devices; skips where there are fewer."""
    found = jax.local_devices(backend=PLATFORMS[backend])
    if len(found) < count:
        pytest.skip(f"{count} {PLATFORMS[backend]} devices are needed, there is {len(found)}")
    return found[:count]


def on(device, rows: tuple[int, ...] = (21,)) -> tuple[Layer, list[jax.Array]]:
    """A layer and an input for each number of rows, all of them committed to a device."""
    layer = build_layer(zeros="v1", g_idx="per_expert")
    xs = [x for i, m in enumerate(rows) for x in inputs(i + 1, m)[i:]]
    return jax.device_put((layer, xs), device)


def program(backend: str) -> Callable[[jax.Array, Layer], jax.Array]:
    """A compiled program of its own, shared with nobody."""
    return jax.jit(lambda x, layer: run_layers(x, layer, backend))


def at_once(*calls: Callable[[], None]) -> None:
    """Runs each in a thread of its own, all at the same time; what one of them raises is raised."""
    barrier = threading.Barrier(len(calls))

    def run(call):
        barrier.wait()
        call()

    with ThreadPoolExecutor(len(calls)) as threads:
        for future in [threads.submit(run, call) for call in calls]:
            future.result()


def repeat(times: int, function, arguments, expected: np.ndarray) -> Callable[[], None]:
    """Calls a function again and again; every result has the expected bits."""

    def call():
        wrong = [
            i for i in range(times) if not np.array_equal(bits(function(*arguments)), expected)
        ]
        assert not wrong

    return call


def eager_calls(layer: Layer, x: jax.Array, implementation: str):
    """Each op outside `jax.jit`: (a function of nothing, its result's bits)."""
    stack = layer.gate_up
    ids = jax.device_put(jnp.arange(2 * len(x), dtype=jnp.int32).reshape(-1, 2) % 7, x.device)
    sizes = jax.device_put(jnp.full((7,), len(x) // 7, jnp.int32), x.device)
    weights = jnp.full_like(ids, 0.5, jnp.float32)
    routing = jm.moe_align_block_size(ids, 8, 7)
    functions = [
        lambda: jm.matmul(x, stack[3], implementation=implementation),
        lambda: jm.ragged_dot(x, stack, sizes, implementation=implementation),
        lambda: jm.moe_matmul(x, stack, *routing, moe_block_size=8, top_k=2),
        lambda: jm.moe_ffn(x, ids, weights, stack, layer.down, implementation=implementation),
    ]
    return [(function, bits(function())) for function in functions]


def test_a_device_that_is_not_the_first(backend):
    first, second = devices(backend, 2)
    results = []
    for device in (first, second):
        layer, (x,) = on(device)
        outputs = [program(backend)(x, layer), jm.matmul(x, layer.gate_up[2])]
        assert all(y.devices() == {device} for y in outputs)
        results.append([*map(bits, outputs), *(b for _, b in eager_calls(layer, x, backend))])
    for ours, theirs in zip(*results, strict=True):
        assert np.array_equal(ours, theirs) and ours.any()


def test_devices_that_work_at_the_same_time(backend):
    """One function, compiled once for each device, and eager calls beside it."""
    function, calls = program(backend), []
    for device in devices(backend, 2):
        layer, (x,) = on(device)
        calls.append(repeat(50, function, (x, layer), bits(function(x, layer))))
        calls += [repeat(10, f, (), expected) for f, expected in eager_calls(layer, x, backend)]
    at_once(*calls)


def test_threads_that_share_a_stack_in_programs_and_eager_calls(backend):
    layer, (x,) = on(devices(backend, 1)[0])
    calls = [repeat(20, f, (), expected) for f, expected in eager_calls(layer, x, backend)]
    for _ in range(2):
        function = program(backend)
        calls.append(repeat(50, function, (x, layer), bits(function(x, layer))))
    at_once(*calls)


def test_threads_that_compile_at_the_same_time(backend):
    """The first calls of one function, which nobody has traced yet, for other shapes each."""
    rows = (1, 3, 40)
    layer, xs = on(devices(backend, 1)[0], rows)
    expected = [bits(program(backend)(x, layer)) for x in xs]
    function = program(backend)
    at_once(*(repeat(5, function, (x, layer), y) for x, y in zip(xs, expected, strict=True)))


def test_programs_share_a_stack_and_are_traced_again_for_new_shapes(backend):
    rows = (1, 3, 40)
    layer, xs = on(devices(backend, 1)[0], rows)
    before = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(layer)]
    traced = []

    def traced_layers(x, layer):
        traced.append(x.shape[0])
        return run_layers(x, layer, backend)

    shared = jax.jit(traced_layers)
    product = jax.jit(lambda x, stack: jm.matmul(x, stack[1], implementation=backend))
    expected = [bits(program(backend)(x, layer)) for x in xs]
    products = [bits(product(x, layer.gate_up)) for x in xs]
    for order in ((0, 1, 2), (2, 0, 1)):
        for i in order:
            assert np.array_equal(bits(shared(xs[i], layer)), expected[i])
            assert np.array_equal(bits(product(xs[i], layer.gate_up)), products[i])
    assert traced == list(rows)  # once for each shape, however often it came back
    assert [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(layer)] == before
