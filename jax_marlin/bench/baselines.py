"""What XLA does with the same problem in unquantized weights: jnp.dot and jax.lax.ragged_dot."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jax_marlin.bench.floor import NOMINAL, floor_microseconds
from jax_marlin.bench.problems import ROTATION_BYTES, Batch, random_key
from jax_marlin.bench.routings import touched_experts
from jax_marlin.bench.shapes import Shape
from jax_marlin.bench.timing import microseconds

# What one round reads, about as long as a round of ours: XLA may read all experts in each call,
# and compiles each call of its products anew.
_ROUND_BYTES, _FEWEST_CALLS = 2e9, 4
_CPU_BYTES = 2**30  # what a benchmark may take of a machine that does not say what it has


class Baseline:
    """Unquantized weights of a shape, rotated past L2 like the packed ones."""

    def __init__(
        self,
        shape: Shape,
        dtype: np.dtype,
        fewest_rows: int,
        calls: int,
        routings: Sequence[str | None] = ("uniform",),
    ):
        """`fewest_rows`, `calls` and `routings`: the fewest, the most and all that is timed."""
        self.shape, self.dtype, self.weights = shape, dtype, []
        self._longest_us = 0.0
        expert_bytes = shape.expert_weights * dtype.itemsize
        touched = expert_bytes * min(touched_experts(shape, fewest_rows, r) for r in routings)
        copies = min(calls, math.ceil(ROTATION_BYTES / touched))
        # One copy more: what the random numbers need while they are made.
        if (copies + 1) * shape.experts * expert_bytes > _free_bytes():
            return
        keys = jax.random.split(random_key(1), (copies, len(shape.linears)))
        lead = () if shape.kind == "dense" else (shape.experts,)
        try:
            self.weights = jax.block_until_ready([
                [jax.random.normal(key, (*lead, k, n), dtype) * dtype.type(k**-0.5)
                 for key, (k, n) in zip(row, shape.linears, strict=True)]
                for row in keys
            ])  # fmt: skip
        except jax.errors.JaxRuntimeError as error:  # a peer's memory is unknown to JAX
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise

    def microseconds(self, batch: Batch, runs: int) -> float | None:
        """The time of one call; None if memory does not allow it."""
        shape = self.shape
        routed_rows = batch.topk_ids[0].size
        # On GPUs XLA may spread the rows over all experts before it multiplies.
        spread = shape.experts * routed_rows * max(k for k, _ in shape.linears)
        ragged = shape.kind != "dense"
        if not self.weights or (ragged and spread * self.dtype.itemsize > _free_bytes()):
            return None
        stack_bytes = shape.experts * shape.expert_weights * self.dtype.itemsize
        calls = max(_FEWEST_CALLS, math.ceil(_ROUND_BYTES / stack_bytes))
        batch = batch.first(calls)
        weights = [self.weights[call % len(self.weights)] for call in range(len(batch.operands))]
        if shape.kind == "layer":
            operation = _layer
            operands = [(*o[:3], *w) for o, w in zip(batch.operands, weights, strict=True)]
        elif shape.kind == "moe":
            operation = jax.lax.ragged_dot
            x = jax.random.normal(random_key(2), (routed_rows, shape.k), self.dtype)
            sizes = [np.bincount(ids.ravel(), minlength=shape.experts) for ids in batch.topk_ids]
            operands = [
                (x, *w, jnp.asarray(s, jnp.int32)) for w, s in zip(weights, sizes, strict=True)
            ]
        else:
            operation = jnp.dot
            operands = [(o[0], *w) for o, w in zip(batch.operands, weights, strict=True)]
        # At least what it reads and multiplies. A ragged product may take a hundred times as long;
        # rows come in an order in which most take as long as some before them.
        flops = shape.flops(len(batch.topk_ids[0]) if ragged else len(batch.operands[0][0]))
        expected = max(floor_microseconds(stack_bytes, flops, NOMINAL)[0], self._longest_us)
        try:
            us = microseconds(operation, operands, expected_us=expected, runs=runs)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return None
        self._longest_us = max(self._longest_us, us)
        return us


def _layer(x, topk_ids, topk_weights, gate_up, down):
    """A mixture-of-experts layer as one writes it with ragged_dot."""
    rows = jnp.argsort(topk_ids.reshape(-1))  # routed rows, by expert
    sizes = jnp.bincount(topk_ids.reshape(-1), length=gate_up.shape[0]).astype(jnp.int32)
    gate, up = jnp.split(
        jax.lax.ragged_dot(x[rows // topk_ids.shape[1]], gate_up, sizes), 2, axis=-1
    )
    out = jax.lax.ragged_dot(jax.nn.silu(gate) * up, down, sizes)
    weighted = out.astype(jnp.float32) * topk_weights.reshape(-1)[rows][:, None]
    total = jnp.zeros(x.shape, jnp.float32).at[rows // topk_ids.shape[1]].add(weighted)
    return total.astype(x.dtype)


def _free_bytes() -> float:
    stats = jax.local_devices()[0].memory_stats()
    if not stats or "bytes_limit" not in stats:
        return _CPU_BYTES
    return 0.8 * (stats["bytes_limit"] - stats["bytes_in_use"])
