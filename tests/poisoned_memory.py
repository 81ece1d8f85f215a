"""Programs whose memory is NaN before their calls write to it: results, scratch, routing tables."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import jax_marlin as jm

# 64 MiB of bfloat16, more than all results of a call in these tests. A half of NaN's bits is NaN,
# too: no 16-bit element is spared, and as int32 they are no expert, no row and no small count.
ROWS, K, COLUMNS = 8192, 64, 4096


@functools.cache
def nan_product():
    """(x, w) whose product is NaN everywhere."""
    w = jm.quantize(np.ones((K, COLUMNS), np.float32), group_size=K, dtype=jnp.bfloat16)
    return jnp.full((ROWS, K), jnp.nan, jnp.bfloat16), w


def poisoned(function):
    """`function(x, *others)` as a program in which a product of NaN is dead before x is there.

    Buffers of a program that do not live at the same time share memory, and this one is larger than
    all of `function`'s together: they lie where it lay. The program's own results would not; so
    what `function` returns is turned around, and back outside.
    """

    @jax.jit
    def program(rows, w, x, *others):
        product = jm.matmul(rows, w, implementation="cuda")
        x = jnp.where(jnp.isnan(product).all(), x, jnp.zeros((), x.dtype))
        return jax.tree.map(turned, function(x, *others))

    return lambda x, *others: jax.tree.map(turned, program(*nan_product(), x, *others))


def turned(a: jax.Array) -> jax.Array:
    return jnp.flip(a, axis=-1)
