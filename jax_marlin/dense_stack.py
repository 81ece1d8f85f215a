"""DenseExpertStack: E unquantized experts as one pytree, for formats that no kernel reads."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jax_marlin.explicit_mesh import unpair_on_mesh
from jax_marlin.linear import compute_dtype, leaf_bytes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class DenseExpertStack:
    """The weights of E experts `[K, N]` as they are; the expert axis is first on every leaf.

    What MXFP4, NVFP4, FP8 and unquantized checkpoints load into. `moe_ffn`, `ragged_dot` and
    `moe_matmul` take it in place of a `MarlinExpertStack` and run in plain JAX on every backend:
    sums in float32, one expert at a time, bias added to the product. Leaves that lost the expert
    axis (`jax.tree.map(lambda a: a[e], stack)`, `scan`) are one weight; `is_single` tells.

    Attributes:
        weight: dtype[E, K, N], float16, bfloat16 or float32; this is the compute dtype.
        bias: dtype[E, N], or None.
        pair_width: as `QuantSpec.pair_width`, static.

    >>> import jax_marlin as jm
    >>> stack = jm.DenseExpertStack(jnp.ones((3, 64, 40)))
    >>> stack
    DenseExpertStack(E=3, K=64, N=40, float32)
    >>> jm.ragged_dot(jnp.ones((5, 64)), stack, jnp.array([2, 0, 1]))[:, 0].tolist()
    [64.0, 64.0, 64.0, 0.0, 0.0]
    """

    weight: jax.Array
    bias: jax.Array | None = None
    pair_width: int | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def pairs(self) -> int:
        """Blocks [part of gate | part of up] of a gate|up stack that `shard` has paired, else 1."""
        return 1 if self.pair_width is None else self.n_per_expert // self.pair_width

    @property
    def is_single(self) -> bool:
        """True if the leaves have no expert axis."""
        return self.weight.ndim == 2

    @property
    def num_experts(self) -> int:
        """E; 1 if the leaves have no expert axis."""
        return 1 if self.is_single else self.weight.shape[0]

    @property
    def k(self) -> int:
        """K, the reduction size."""
        return self.weight.shape[-2]

    @property
    def n_per_expert(self) -> int:
        """N, the output features of one expert."""
        return self.weight.shape[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """(E, K, N), or (K, N) if the leaves have no expert axis."""
        return self.weight.shape

    @property
    def ndim(self) -> int:
        """3, or 2 if the leaves have no expert axis."""
        return self.weight.ndim

    @property
    def dtype(self) -> np.dtype:
        """The compute dtype, that of the weight."""
        return self.weight.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves."""
        return leaf_bytes(self)

    def __len__(self) -> int:
        return self.num_experts

    def __repr__(self) -> str:
        shape = getattr(self.weight, "shape", ())  # JAX puts placeholders here
        sizes = [f"{axis}={size}" for axis, size in zip("NKE", reversed(shape), strict=False)][::-1]
        bias = [] if self.bias is None else ["bias"]
        dtype = str(getattr(self.weight, "dtype", "?"))
        return f"DenseExpertStack({', '.join([*sizes, dtype, *bias])})"

    def dequantize(self, dtype: DTypeLike | None = None) -> jax.Array:
        """The weights, without the bias; what `MarlinExpertStack.dequantize` gives of packed ones.

        Args:
            dtype: of the result; None means the compute dtype.
        """
        weight = unpair_on_mesh(self.weight, self.pairs)
        return weight if dtype is None else weight.astype(jnp.dtype(dtype))

    def astype(self, dtype: DTypeLike) -> DenseExpertStack:
        """The same weights and bias in another compute dtype.

        Args:
            dtype: float16, bfloat16 or float32.

        Raises:
            TypeError: another dtype.
        """
        dtype = compute_dtype(dtype, "DenseExpertStack.astype")
        return jax.tree.map(lambda leaf: leaf.astype(dtype), self)
