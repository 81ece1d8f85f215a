"""MarlinLinear: a view of one expert's weight, and what it shares with the stack that it views."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jax_marlin.explicit_mesh import unpack_on_mesh
from jax_marlin.layout import TILE, unpair_columns

if TYPE_CHECKING:
    from jax_marlin.weights import MarlinExpertStack

_COMPUTE_DTYPES = tuple(jnp.dtype(t) for t in (jnp.float16, jnp.bfloat16, jnp.float32))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class MarlinLinear:
    """One weight `[K, n]`: a stack, an expert index and a range of columns. Copies no weights.

    Attributes:
        stack: the leaves; a dense weight is a stack of one.
        expert: int32 scalar on the device, may be traced; clamped to the experts where it is used.
        bias: dtype[n], replaces the stack's bias; None keeps the stack's, if it has one.
        columns: static (start, stop) in the stack's N; start a multiple of 64, stop one or N.

    >>> import jax_marlin as jm
    >>> w = jm.quantize(np.ones((64, 192), np.float32), group_size=32)
    >>> w[:, 64:]
    MarlinLinear(K=64, N=128, 4 bit, group_size=32, float32)
    >>> w[:, 64:](jnp.ones((2, 64)))[1, 0].item()
    64.0
    """

    stack: MarlinExpertStack
    expert: jax.Array
    bias: jax.Array | None
    columns: tuple[int, int] = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int]:
        """(K, n)."""
        start, stop = self.held_columns
        return (self.stack.k, stop - start)

    @property
    def held_columns(self) -> tuple[int, int]:
        """`columns`, or all that a shard of the whole stack's columns holds."""
        whole = self.columns == (0, self.stack.spec.n)
        return (0, self.stack.n_per_expert) if whole else self.columns

    @property
    def ndim(self) -> int:
        """2."""
        return 2

    @property
    def dtype(self) -> np.dtype:
        """The compute dtype, that of the scales."""
        return self.stack.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its own leaves: the whole stack's, which views of one stack share."""
        return leaf_bytes(self)

    def __repr__(self) -> str:
        shape = getattr(self.stack.qweight, "shape", ())
        start, stop = self.held_columns if len(shape) > 2 else self.columns
        return f"MarlinLinear({describe(self.stack, stop - start)})"

    def __call__(self, x: Any) -> jax.Array:
        """`ops.matmul.matmul(x, self)`: `[..., K]` to `[..., n]`, with the bias."""
        from jax_marlin.ops.matmul import matmul

        return matmul(x, self)

    def __getitem__(self, index: Any) -> MarlinLinear:
        """`w[:, a:b]`: fewer columns of the same stack; a and b multiples of 64, or b the end.

        `w[...]` is `w` itself, what reading an `nnx.Param` asks for.

        Raises:
            TypeError: not `[:, a:b]` with static bounds.
            ValueError: the columns are off the tiles, or there are none.
        """
        if index is Ellipsis:
            return self
        if not (
            isinstance(index, tuple)
            and len(index) == 2
            and all(isinstance(part, slice) for part in index)
            and index[0] == slice(None)
        ):
            raise TypeError(f"MarlinLinear[...]: index is {index!r}, expected [:, a:b]")
        n = self.shape[1]
        start, stop, step = index[1].indices(n)
        if step != 1 or start >= stop or start % TILE or (stop % TILE and stop != n):
            raise ValueError(
                f"MarlinLinear[...]: columns are {start}:{stop}:{step} of {n}, expected multiples "
                f"of {TILE} (or the end), step 1, and at least one"
            )
        bias = None if self.bias is None else self.bias[start:stop]
        if (start, stop) != (0, n) and self.stack.held_spec.pairs > 1:
            raise ValueError(
                f"MarlinLinear[...]: columns {start}:{stop} of a gate|up weight whose columns are "
                "paired for several devices; take them before jax_marlin.shard"
            )
        first = self.held_columns[0]
        if (start, stop) == (0, n):
            return self
        return dataclasses.replace(self, bias=bias, columns=(first + start, first + stop))

    def dequantize(self, dtype: DTypeLike | None = None) -> jax.Array:
        """The weight as it was before packing, computed in float32 and cast.

        Args:
            dtype: of the result; None means the compute dtype.

        Returns:
            dtype[K, n], K in the original order; no bias.
        """
        dtype = self.dtype if dtype is None else jnp.dtype(dtype)
        return unpack_on_mesh(_dequantize, self, self.stack.qweight, dtype)

    def astype(self, dtype: DTypeLike) -> MarlinLinear:
        """The same codes with scales, zero points and bias in another compute dtype.

        Args:
            dtype: float16, bfloat16 or float32.

        Raises:
            TypeError: another dtype.
        """
        dtype = compute_dtype(dtype, "MarlinLinear.astype")
        bias = None if self.bias is None else self.bias.astype(dtype)
        return dataclasses.replace(self, stack=self.stack.astype(dtype), bias=bias)


@functools.partial(jax.jit, static_argnames="dtype")
def _dequantize(w: MarlinLinear, dtype: np.dtype) -> jax.Array:
    from jax_marlin.reference import dequantize_expert

    stack, spec = w.stack, w.stack.held_spec
    # the ops' convention: an absent optional operand is an empty array
    zero_points = jnp.zeros((0,), stack.dtype) if stack.zero_points is None else stack.zero_points
    rows = dequantize_expert(
        stack.qweight, stack.scales, zero_points, w.expert,
        bits=spec.bits, k=spec.k, n=w.shape[1], group_size=spec.group_size,
        first_tile=w.held_columns[0] // TILE,
    )  # fmt: skip
    if stack.perm is not None:
        rows = rows[jnp.argsort(stack.perm[jnp.clip(w.expert, 0, stack.num_experts - 1)])]
    return unpair_columns(rows, spec.pairs).astype(dtype)


def expert_index(index: Any, num_experts: int, where: str) -> jax.Array:
    """A static index, checked and wrapped, or one on the device, as an int32 scalar."""
    if isinstance(index, jax.Array):  # never read to the host: it may be traced
        if index.ndim or not jnp.issubdtype(index.dtype, jnp.integer):
            raise TypeError(
                f"{where}: index is {index.dtype}{list(index.shape)}, expected an integer scalar"
            )
        if jnp.iinfo(index.dtype).max > jnp.iinfo(jnp.int32).max:
            index = jnp.clip(index, 0, num_experts - 1)  # a cast would wrap into range
        return index.astype(jnp.int32)
    if isinstance(index, (bool, np.bool_)) or not hasattr(index, "__index__"):
        raise TypeError(
            f"{where}: index is {index!r}, expected an integer, an integer scalar or a:b"
        )
    position = operator.index(index)
    if not -num_experts <= position < num_experts:
        raise IndexError(f"{where}: index {position} is out of range for {num_experts} experts")
    return jnp.int32(position % num_experts)


def compute_dtype(dtype: DTypeLike, where: str) -> np.dtype:
    """`dtype` if weights can compute in it."""
    expected = "float16, bfloat16 or float32"
    dtype = as_dtype(dtype, "dtype", expected, where)
    if dtype not in _COMPUTE_DTYPES:
        raise TypeError(f"{where}: dtype is {dtype}, expected {expected}")
    return dtype


def as_dtype(value: DTypeLike, name: str, expected: str, where: str) -> np.dtype:
    """`value` as a dtype, or a TypeError that names the argument."""
    try:
        return jnp.dtype(value)
    except TypeError:
        raise TypeError(f"{where}: {name} is {value!r}, expected {expected}") from None


def leaf_bytes(tree: Any) -> int:
    """Bytes of all leaves, from shapes and dtypes alone."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def describe(stack: MarlinExpertStack, columns: int) -> str:
    """What a repr says of a weight; holds for any leaves, JAX puts placeholders there."""
    shape, spec = getattr(stack.qweight, "shape", ()), stack.spec
    if len(shape) > 2:  # JAX puts placeholders there
        spec = spec.held_by(*shape[-3:-1])
    parts = [f"K={spec.k}", f"N={columns}", f"{spec.bits} bit", f"group_size={spec.group_size}"]
    parts.append(str(getattr(stack.scales, "dtype", "?")))
    for name, leaf in (
        ("asymmetric", stack.zero_points),
        ("act-order", stack.perm),
        ("bias", stack.bias),
    ):
        parts += [name] if leaf is not None else []
    return ", ".join(parts)
