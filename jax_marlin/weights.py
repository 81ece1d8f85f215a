"""MarlinExpertStack: the packed weights of E experts as one pytree."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jax_marlin.explicit_mesh import unpack_on_mesh
from jax_marlin.linear import (
    MarlinLinear,
    compute_dtype,
    describe,
    expert_index,
    leaf_bytes,
)
from jax_marlin.quant_spec import QuantSpec

__all__ = ["MarlinExpertStack", "MarlinLinear"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class MarlinExpertStack:
    """The packed weights of E experts `[K, N]`; the expert axis is first on every leaf.

    With `codes = unpack_tiles(qweight)` and s, z the unpacked scales and zero points (2**(bits - 1)
    without a zero_points leaf), always

        W[e, perm[e, i], n] = s[e, i // group_size, n] * (codes[e, i, n] - z[e, i // group_size, n])

    for i < K, n < N. Past K and N the leaves are padded to tiles; padded columns have scale zero.
    Leaves that lost the expert axis (`jax.tree.map(lambda a: a[e], stack)`, `scan`, `vmap`) are one
    linear, which `matmul` accepts; `is_single` tells. Gradients: the leaves are frozen.

    Attributes:
        qweight: uint32[E, ceil(N/64), ceil(K/64), 512 (4 bit) or 1024 (8 bit)], see `layout`.
        scales: dtype[E, ceil(N/64), G, 64]; this dtype is the weight's compute dtype.
        zero_points: the same shape and dtype, integers; None means symmetric.
        perm: int32[E, K], the act-order row order; None means in order. Where the spec says
            `shared_perm`, all rows are equal and only the first is read: do not concatenate such
            stacks of different checkpoints leaf by leaf.
        bias: dtype[E, N], or None.
        spec: the static `QuantSpec` of the whole weight. Inside `jax.shard_map` the leaves of a
            shard hold fewer rows or columns: `k`, `n_per_expert` and `shape` say how many.

    >>> import jax_marlin as jm
    >>> stack = jm.quantize(np.ones((3, 64, 128), np.float32), group_size=32)
    >>> stack
    MarlinExpertStack(E=3, K=64, N=128, 4 bit, group_size=32, float32)
    >>> stack[1].shape, stack.dequantize().shape
    ((64, 128), (3, 64, 128))
    """

    qweight: jax.Array
    scales: jax.Array
    zero_points: jax.Array | None
    perm: jax.Array | None
    bias: jax.Array | None
    spec: QuantSpec = dataclasses.field(metadata={"static": True})

    @property
    def is_single(self) -> bool:
        """True if the leaves have no expert axis: this is one linear."""
        return self.qweight.ndim == 3

    @property
    def pairs(self) -> int:
        """Blocks [part of gate | part of up] of a gate|up stack that `shard` has paired, else 1."""
        return self.held_spec.pairs

    @property
    def pair_width(self) -> int | None:
        """Columns of one such block; None means that the stack is not paired."""
        return self.spec.pair_width

    @property
    def num_experts(self) -> int:
        """E; 1 if the leaves have no expert axis."""
        return 1 if self.is_single else self.qweight.shape[0]

    @property
    def held_spec(self) -> QuantSpec:
        """`spec` with the k and n that these leaves hold: fewer for a shard in `jax.shard_map`."""
        *_, n_tiles, k_tiles, _ = self.qweight.shape
        return self.spec.held_by(n_tiles, k_tiles)

    @property
    def k(self) -> int:
        """K, the logical reduction size."""
        return self.held_spec.k

    @property
    def n_per_expert(self) -> int:
        """N, the logical output features of one expert."""
        return self.held_spec.n

    @property
    def shape(self) -> tuple[int, ...]:
        """(E, K, N), or (K, N) if the leaves have no expert axis."""
        lead = () if self.is_single else (self.num_experts,)
        return (*lead, self.k, self.n_per_expert)

    @property
    def ndim(self) -> int:
        """3, or 2 if the leaves have no expert axis."""
        return len(self.shape)

    @property
    def dtype(self) -> np.dtype:
        """The compute dtype, that of the scales."""
        return self.scales.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves."""
        return leaf_bytes(self)

    def __len__(self) -> int:
        return self.num_experts

    def __repr__(self) -> str:
        shape = getattr(self.qweight, "shape", ())
        experts = f"E={shape[0]}, " if len(shape) == 4 else ""
        spec = self.held_spec if len(shape) >= 3 else self.spec  # JAX puts placeholders there
        return f"MarlinExpertStack({experts}{describe(self, spec.n)})"

    def __getitem__(self, index: Any) -> Any:
        """`stack[e]` is a `MarlinLinear` that copies nothing; `stack[a:b]` a smaller stack.

        Args:
            index: an int, -E <= e < E; a scalar integer array, which may be traced and is clamped
                to the experts where it is used; a slice with static bounds and step 1; or `...`,
                which is the stack itself (what reading an `nnx.Param` asks for).

        Raises:
            IndexError: a static index is out of range.
            TypeError: another index, or the leaves have no expert axis.
            ValueError: a slice with a step, or an empty one.
        """
        if index is Ellipsis:
            return self
        if self.is_single:
            raise TypeError(
                "MarlinExpertStack[...]: the leaves have no expert axis, use it as it is"
            )
        if isinstance(index, slice):
            start, stop, step = index.indices(self.num_experts)
            if step != 1 or start >= stop:
                raise ValueError(
                    f"MarlinExpertStack[...]: slice is {index.start}:{index.stop}:{index.step}, "
                    f"expected step 1 and at least one of {self.num_experts} experts"
                )
            return jax.tree.map(lambda leaf: leaf[start:stop], self)
        expert = expert_index(index, self.num_experts, "MarlinExpertStack[...]")
        return MarlinLinear(self, expert, None, (0, self.n_per_expert))

    def as_linear(self) -> MarlinLinear:
        """The linear that leaves without an expert axis are (a stack of one, its expert 0).

        Raises:
            TypeError: the leaves have an expert axis.
        """
        if not self.is_single:
            raise TypeError(
                f"MarlinExpertStack: a stack of shape {self.shape} is no linear, choose an expert: "
                "stack[e]"
            )
        return jax.tree.map(lambda leaf: leaf[None], self)[0]

    def dequantize(self, dtype: DTypeLike | None = None) -> jax.Array:
        """The weights as they were before packing, one expert at a time in float32, then cast.

        Args:
            dtype: of the result; None means the compute dtype.

        Returns:
            dtype[E, K, N] ([K, N] without the expert axis), K in the original order; no bias.
        """
        dtype = self.dtype if dtype is None else jnp.dtype(dtype)
        if self.is_single:
            return self.as_linear().dequantize(dtype)
        return unpack_on_mesh(_dequantize, self, self.qweight, dtype)

    def astype(self, dtype: DTypeLike) -> MarlinExpertStack:
        """The same codes with scales, zero points and bias in another compute dtype.

        Args:
            dtype: float16, bfloat16 or float32.

        Raises:
            TypeError: another dtype.
        """
        dtype = compute_dtype(dtype, "MarlinExpertStack.astype")
        scales, zero_points, bias = jax.tree.map(
            lambda leaf: leaf.astype(dtype), (self.scales, self.zero_points, self.bias)
        )
        return dataclasses.replace(self, scales=scales, zero_points=zero_points, bias=bias)

    def zero_workspace(self) -> MarlinExpertStack:
        """Returns the stack: no workspace is visible, XLA owns every scratch buffer."""
        return self

    def gemm_phase_batched(self, x: Any, dispatches: Any, out: Any = None) -> jax.Array:
        """Row ranges of `x` times experts: `ops.dispatch.gemm_phase_batched`."""
        from jax_marlin.ops import dispatch

        return dispatch.gemm_phase_batched(self, x, dispatches, out)

    def gemm_phase_vllm(
        self,
        x: Any,
        sorted_token_ids: Any,
        expert_ids: Any,
        num_tokens_past_padded: Any,
        prob_m: SupportsIndex | None = None,
        *,
        moe_block_size: int | np.integer,
        top_k: int | np.integer,
    ) -> jax.Array:
        """Routed rows of `x` times experts, vLLM's arguments: `ops.dispatch.gemm_phase_vllm`."""
        from jax_marlin.ops import dispatch

        return dispatch.gemm_phase_vllm(
            self, x, sorted_token_ids, expert_ids, num_tokens_past_padded, prob_m,
            moe_block_size=moe_block_size, top_k=top_k,
        )  # fmt: skip

    def make_expert_linear(
        self, expert_offset: SupportsIndex, expert_n: SupportsIndex, bias: ArrayLike | None = None
    ) -> MarlinLinear:
        """A view of `expert_n` of the E * N columns: `ops.dispatch.make_expert_linear`."""
        from jax_marlin.ops import dispatch

        return dispatch.make_expert_linear(self, expert_offset, expert_n, bias)


@functools.partial(jax.jit, static_argnames="dtype")
def _dequantize(stack: MarlinExpertStack, dtype: np.dtype) -> jax.Array:
    """dtype[E, K, N]; the loop keeps one expert in float32."""
    experts = jnp.arange(stack.num_experts, dtype=jnp.int32)
    return lax.map(lambda e: stack[e].dequantize(dtype), experts)
