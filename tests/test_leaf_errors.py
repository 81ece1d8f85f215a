"""Leaves of other shapes than the packed codes ask for: each op's message, and what it accepts."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from operations import OPS, E, H, arguments

import jax_marlin as jm

ARGUMENTS = arguments(zeros="v1", g_idx="per_expert")
STACK = ARGUMENTS.stack
OF_GROUPS = [lambda a: a[0], lambda a: a[:-1], lambda a: a[:, :1], lambda a: a[:, :, :1]]
# leaf -> (what replaces it: without the expert axis, of fewer experts, of fewer columns, rows or
# groups than the codes have; the shape that it should have had)
LEAVES = {
    "scales": (OF_GROUPS, (E, 2, 3, 64)),  # [E, N / 64, K / 32, 64]
    "zero_points": (OF_GROUPS, (E, 2, 3, 64)),
    "perm": ([lambda a: a[0], lambda a: a[:-1], lambda a: a[:, :-1]], (E, H)),
    "bias": ([lambda a: a[0], lambda a: a[:1], lambda a: a[:, :-1]], (E, H)),
}
CASES = [(leaf, i) for leaf, (changes, _) in LEAVES.items() for i in range(len(changes))]


def run(op: str, stack, *, traced: bool = False):
    call = lambda stack: OPS[op](*ARGUMENTS._replace(stack=stack))  # noqa: E731
    return jax.eval_shape(call, stack) if traced else call(stack)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("leaf", "change"), CASES)
def test_leaves_of_another_shape_are_refused_while_traced(op, leaf, change):
    changes, expected = LEAVES[leaf]
    wrong = changes[change](getattr(STACK, leaf))
    shapes = [re.escape(str(s)) for s in (wrong.shape, expected, STACK.qweight.shape)]
    message = "shape {}, expected {} beside qweight {}; cut weights by".format(*shapes)
    with pytest.raises(ValueError, match=f"^{op}: the stack's {leaf} ha(s|ve) {message}"):
        run(op, dataclasses.replace(STACK, **{leaf: wrong}), traced=True)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("leaf", LEAVES)
def test_leaves_of_the_same_shape_are_taken(op, leaf):
    own = getattr(STACK, leaf)
    changed = own[:, ::-1] if leaf == "perm" else own + 1
    result = run(op, dataclasses.replace(STACK, **{leaf: changed}))
    assert result.shape == run(op, STACK).shape
    assert np.abs(np.asarray(result - run(op, STACK))).max() > 0  # the leaf was read


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("leaf", ["zero_points", "perm", "bias"])
def test_leaves_that_are_absent_are_taken(op, leaf):
    assert np.isfinite(run(op, dataclasses.replace(STACK, **{leaf: None}))).all()


class TestOwnBias:
    """A view's bias, which replaces its stack's."""

    view = STACK[1][:, 64:]  # the last 32 columns

    @pytest.mark.parametrize("shape", [(), (1,), (31,), (96,), (1, 32), (32, 1)])
    def test_another_shape_is_refused(self, shape):
        w = dataclasses.replace(self.view, bias=jnp.zeros(shape))
        got = re.escape(str(shape))
        with pytest.raises(
            ValueError, match=rf"^matmul: w's own bias has shape {got}, expected \(32,"
        ):
            jm.matmul(ARGUMENTS.x, w)

    def test_one_for_each_column_is_taken(self):
        stack = dataclasses.replace(STACK, bias=None)
        own = jnp.linspace(-1, 1, 32)
        product = jm.matmul(ARGUMENTS.x, stack[1][:, 64:])
        y = jm.matmul(ARGUMENTS.x, dataclasses.replace(self.view, bias=own))
        np.testing.assert_allclose(y, product + own[None], rtol=1e-5, atol=1e-4)
