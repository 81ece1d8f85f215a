"""jax.export of every op for CPU, for CUDA and for both, with a symbolic batch, there and back."""

import extension_stand_in
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from problems import Problem, build
from test_architecture import CPP_FILES, TARGET

import jax_marlin as jm
from jax_marlin.ops import ffi_targets
from jax_marlin.ops.exporting import TARGETS

E, TOP_K, BLOCK = 4, 2, 8
CASE = build(Problem("export", m=7, k=96, n=128, group_size=32, num_experts=E, bias=True))
STACK, DOWN = CASE.stack(), build(Problem("down", k=64, n=96, num_experts=E)).stack()


def routed(x, ids, weights):
    routing = jm.moe_align_block_size(ids, BLOCK, E)
    return jm.moe_matmul(x, STACK, *routing, moe_block_size=BLOCK, top_k=TOP_K,
                         topk_weights=weights)  # fmt: skip


# Functions of x [T, K], topk_ids and topk_weights [T, top_k], for any T.
OPS = {
    "matmul": lambda x, ids, weights: jm.matmul(x, STACK[1]),
    "ragged_dot": lambda x, ids, weights: jm.ragged_dot(x, STACK, jnp.array([2, 0, 1, 1])),
    "moe_matmul": routed,
    "moe_ffn": lambda x, ids, weights: jm.moe_ffn(x, ids, weights, STACK, DOWN),
}
CALLS = {  # what each program calls on CUDA
    "matmul": {"matmul"},
    "ragged_dot": {"moe_align_block_size", "moe_matmul"},
    "moe_matmul": {"moe_align_block_size", "moe_matmul"},
    "moe_ffn": {"moe_ffn"},
}


@pytest.fixture
def extension(monkeypatch):
    if ffi_targets.cuda_unavailable_reason() is not None:
        extension_stand_in.install(monkeypatch, extension_stand_in.stand_in())


def arguments(tokens, shapes=False):
    """Arrays of `tokens` rows, or the shapes of any number of rows."""
    types = [(96, jnp.float16), (TOP_K, jnp.int32), (TOP_K, jnp.float32)]
    if shapes:
        return [jax.ShapeDtypeStruct((tokens, size), dtype) for size, dtype in types]
    rng = np.random.default_rng(tokens)
    ids = rng.integers(-1, E, (tokens, TOP_K))
    values = (rng.standard_normal((tokens, 96)), ids, rng.random((tokens, TOP_K)))
    return [jnp.asarray(a, dtype) for a, (_, dtype) in zip(values, types, strict=True)]


def exported(function, platforms):
    (tokens,) = jax.export.symbolic_shape("tokens")
    export = jax.export.export(
        jax.jit(function), platforms=platforms, disabled_checks=jm.DISABLE_JAX_EXPORT_CHECKS
    )
    return export(*arguments(tokens, shapes=True))


def round_trip(program):
    pytest.importorskip("flatbuffers", reason="jax.export writes programs with flatbuffers")
    return jax.export.deserialize(program.serialize())


def test_the_constant_names_every_target():
    """What the compiled handlers are called; a change of meaning needs another version."""
    assert set(TARGETS) == {t for path in CPP_FILES for t in TARGET.findall(path.read_text())}
    assert jm.DISABLE_JAX_EXPORT_CHECKS == tuple(
        jax.export.DisabledSafetyCheck.custom_call(target) for target in TARGETS
    )


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("platforms", [["cpu"], ["cpu", "cuda"]], ids=["cpu", "cpu_and_cuda"])
def test_round_trip_with_a_symbolic_batch(op, platforms, extension):
    program = round_trip(exported(OPS[op], platforms))
    assert program.platforms == tuple(platforms)
    for tokens in (1, 4, 9):
        x, ids, weights = arguments(tokens)
        expected = jax.jit(OPS[op])(x, ids, weights)
        # Blocks of another size: the sums are the same, in float32, rounded once.
        np.testing.assert_allclose(
            np.asarray(program.call(x, ids, weights), np.float32),
            np.asarray(expected, np.float32), rtol=2e-3, atol=2e-3,
        )  # fmt: skip


@pytest.mark.parametrize("op", OPS)
def test_for_cuda_alone(op, extension):
    program = round_trip(exported(OPS[op], ["cuda"]))
    assert program.platforms == ("cuda",)
    text = program.mlir_module()
    called = {name for name in TARGETS if f"@{name}(" in text}
    assert called == {f"jax_marlin_{name}_v1" for name in CALLS[op]}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("platforms", [["cpu"], ["cpu", "cuda"]], ids=["cpu", "cpu_and_cuda"])
def test_gradients(op, platforms, extension):
    """A program that holds the backward pass, with any number of rows."""

    def gradient(x, ids, weights):
        loss = lambda x, weights: OPS[op](x, ids, weights).astype(jnp.float32).sum()  # noqa: E731
        return jax.grad(loss, (0, 1))(x, weights)

    program = round_trip(exported(gradient, platforms))
    operands = arguments(5)
    for got, expected in zip(program.call(*operands), jax.jit(gradient)(*operands), strict=True):
        np.testing.assert_allclose(
            np.asarray(got, np.float32), np.asarray(expected, np.float32), rtol=2e-3, atol=2e-3
        )


def test_without_the_constant_jax_refuses(extension):
    with pytest.raises(ValueError, match="custom calls whose targets"):
        jax.export.export(jax.jit(OPS["matmul"]), platforms=["cuda"])(*arguments(3)).serialize()


def test_weights_as_arguments():
    """A program of any weights of the same kind, written down with what it takes."""

    def ffn(x, ids, weights, stacks, linear, dense):
        y = jm.moe_ffn(x, ids, weights, *stacks)
        return y, jm.matmul(x, linear), jm.ragged_dot(x, dense, jnp.array([1, 2]))

    dense = jm.DenseExpertStack(jnp.ones((2, 96, 8), jnp.float16))
    operands = (*arguments(3), (STACK, DOWN), STACK[1][:, 64:], dense)
    program = round_trip(
        jax.export.export(
            jax.jit(ffn), platforms=["cpu"], disabled_checks=jm.DISABLE_JAX_EXPORT_CHECKS
        )(*operands)
    )
    for got, expected in zip(program.call(*operands), jax.jit(ffn)(*operands), strict=True):
        np.testing.assert_array_equal(got, expected)
