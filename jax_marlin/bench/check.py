"""Checks a result before it is timed: sampled elements against float64 arithmetic in plain JAX.

The device does that arithmetic, too: on the host, one layer's weights would take seconds.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jax_marlin.bench.problems import Batch
from jax_marlin.bench.shapes import Shape
from jax_marlin.weights import MarlinExpertStack

_ROWS, _COLUMNS = 4, 32  # sampled


class WrongResultError(Exception):
    """The operation computes something else than its weights say."""


def check(shape: Shape, batch: Batch, seed: int) -> float:
    """Runs the first call and compares some of its elements.

    Args:
        shape: the problem.
        batch: its calls.
        seed: chooses the elements.

    Returns:
        The largest difference, in units of the result's root mean square.

    Raises:
        WrongResultError: a sampled element is off, or some element is not finite.
    """
    result = jax.jit(batch.operation)(*batch.operands[0])
    rng = np.random.default_rng(seed)
    # A layer's element needs all weights of its token's experts, so there is one row of them.
    count = 1 if shape.kind == "layer" else min(_ROWS, result.shape[0])
    rows = rng.choice(result.shape[0], count, replace=False)
    columns = rng.choice(result.shape[1], min(_COLUMNS, result.shape[1]), replace=False)
    expected = np.stack([_row(shape, batch, int(row), columns) for row in rows])
    finite, got = _sampled(result, rows, columns)
    if not finite:
        raise WrongResultError(f"{shape.name}: the result has elements that are not finite")
    got = np.asarray(got, np.float64)
    rms = float(np.sqrt(np.mean(expected**2)))
    error = np.abs(got - expected)
    # One rounding of the result, and roundings of weights or activations that average out.
    epsilon = max(float(jnp.finfo(result.dtype).eps), 1e-5)
    if not (error <= 4 * epsilon * (rms + np.abs(expected))).all():
        raise WrongResultError(
            f"{shape.name}: sampled elements are off by up to {error.max() / rms:.2g} of the "
            f"result's root mean square, expected about {epsilon:.1g}; not timed"
        )
    return float(error.max() / rms)


@jax.jit  # one program in place of several for each size of result
def _sampled(result: jax.Array, rows, columns) -> tuple[jax.Array, jax.Array]:
    """Whether all elements are finite, and some of them."""
    return jnp.isfinite(result).all(), result[rows[:, None], columns]


def _row(shape: Shape, batch: Batch, row: int, columns: np.ndarray) -> np.ndarray:
    """float64 elements (row, columns) of the first call's result."""
    operands, stacks, ids = batch.operands[0], batch.stacks[0], batch.topk_ids[0]
    x = operands[0]
    if shape.kind == "dense":
        return _product(x[row], stacks[0], ids[0, 0], columns)
    if shape.kind == "moe":
        x_row = x[row] if shape.routed_input else x[row // shape.top_k]
        return _product(x_row, stacks[0], ids.reshape(-1)[row], columns)
    total = np.zeros(len(columns))
    for expert, weight in zip(ids[row], _host(operands[2][row]), strict=True):
        gate, up = np.split(_product(x[row], stacks[0], expert), 2)
        hidden = gate / (1 + np.exp(-gate)) * up
        total += weight * _product(hidden, stacks[1], expert, columns)
    return total


def _product(
    x: jax.Array | np.ndarray,
    stack: MarlinExpertStack,
    expert: int,
    columns: np.ndarray | None = None,
) -> np.ndarray:
    """float64 x[K] @ weight[K, columns] of one expert; all columns if None."""
    if columns is None:
        columns = np.arange(stack.spec.n)
    with jax.enable_x64(True):
        return np.asarray(_float64_product(_host(x), stack, np.int32(expert), columns))


@jax.jit
def _float64_product(x, stack: MarlinExpertStack, expert, columns) -> jax.Array:
    weight = stack[expert].dequantize(jnp.float32)  # exact if scales have 16 bits
    return x @ weight[:, columns].astype(jnp.float64)


def _host(array: jax.Array | np.ndarray) -> np.ndarray:
    return np.asarray(array, np.float64)
