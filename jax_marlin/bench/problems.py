"""Builds a problem on the device: random packed weights, activations and routings."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_marlin.bench.routings import random_routes, touched_experts
from jax_marlin.bench.shapes import Shape
from jax_marlin.ops.matmul import matmul
from jax_marlin.ops.moe_align_block_size import moe_align_block_size, select_moe_block_size
from jax_marlin.ops.moe_ffn import moe_ffn
from jax_marlin.ops.moe_matmul import moe_matmul
from jax_marlin.quant_spec import QuantSpec
from jax_marlin.weights import MarlinExpertStack

ROTATION_BYTES = 256e6  # weights read before any is read again: several times the largest L2


class Quantization(NamedTuple):
    """How the weights of a run are packed."""

    bits: int
    group_size: int
    dtype: np.dtype


@dataclasses.dataclass(frozen=True)
class Batch:
    """Calls of one problem with one number of rows.

    Attributes:
        operation: what is timed, one call of it.
        operands: of each call, x first; weights and routing differ from call to call.
        stacks: the stacks of each call, `Shape.linears` long.
        topk_ids: of each call, int32[rows, top_k] on the host; a dense call's one id is its copy.
    """

    operation: Callable[..., jax.Array]
    operands: list[tuple[Any, ...]]
    stacks: list[list[MarlinExpertStack]]
    topk_ids: list[np.ndarray]

    def first(self, calls: int) -> "Batch":
        """The first calls of the batch, or all if it has no more."""
        parts = (self.operands[:calls], self.stacks[:calls], self.topk_ids[:calls])
        return Batch(self.operation, *parts)

    def touched_bytes(self) -> float:
        """Packed bytes that a call reads, on average."""
        return float(
            np.mean([
                sum(stack.nbytes / stack.num_experts for stack in stacks) * np.unique(ids).size
                for stacks, ids in zip(self.stacks, self.topk_ids, strict=True)
            ])
        )  # fmt: skip


class Problem:
    """A shape's weights, in enough copies that no call finds them in L2; its routings."""

    def __init__(
        self,
        shape: Shape,
        quantization: Quantization,
        fewest_rows: int,
        calls: int,
        routings: Sequence[str | None] = ("uniform",),
    ):
        """`fewest_rows`, `calls` and `routings`: the fewest, the most and all that `batch` gets."""
        self.shape, self.quantization = shape, quantization
        specs = [
            QuantSpec.create(bits=quantization.bits, group_size=quantization.group_size, k=k, n=n)
            for k, n in shape.linears
        ]
        expert_bytes = shape.expert_weights * quantization.bits / 8
        touched = expert_bytes * min(touched_experts(shape, fewest_rows, r) for r in routings)
        copies = min(calls, math.ceil(ROTATION_BYTES / touched))
        # Copies of a dense weight are the experts of one stack.
        stacks, experts = (1, copies) if shape.kind == "dense" else (copies, shape.experts)
        keys = jax.random.split(random_key(0), (stacks, len(specs)))
        self.copies = copies
        self.stacks = [
            [random_stack(key, experts, spec, quantization.dtype)
             for key, spec in zip(row, specs, strict=True)]
            for row in keys
        ]  # fmt: skip

    def batch(self, rows: int, calls: int, routing: str | None = "uniform") -> Batch:
        """`calls` calls for `rows` tokens, whose experts follow `routing` (see `ROUTINGS`)."""
        shape = self.shape
        x_key, *keys = jax.random.split(random_key(rows), 1 + calls)
        x_rows = rows * shape.top_k if shape.routed_input else rows
        x = jax.random.normal(x_key, (x_rows, shape.k), self.quantization.dtype)
        stacks = [self.stacks[call % len(self.stacks)] for call in range(calls)]
        if shape.kind == "dense":
            ids = [np.full((1, 1), call % self.copies, np.int32) for call in range(calls)]
            operands = [(x, s[0], jnp.int32(i[0, 0])) for s, i in zip(stacks, ids, strict=True)]
            return Batch(_matmul, operands, stacks, ids)
        routes = [random_routes(key, rows, shape, routing) for key in keys]
        ids = [np.asarray(topk_ids) for _, topk_ids in routes]
        if shape.kind == "layer":
            operands = [(x, i, w, *s) for (w, i), s in zip(routes, stacks, strict=True)]
            return Batch(moe_ffn, operands, stacks, ids)
        size = select_moe_block_size(rows, shape.top_k, shape.experts)
        align = jax.jit(lambda topk_ids: moe_align_block_size(topk_ids, size, shape.experts))
        operands = [(x, s[0], *align(i)) for (_, i), s in zip(routes, stacks, strict=True)]
        top_k = 1 if shape.routed_input else shape.top_k
        operation = functools.partial(_moe_matmul, moe_block_size=size, top_k=top_k)
        return Batch(operation, operands, stacks, ids)


def random_key(seed: int) -> jax.Array:
    """A key of the device's own generator: gigabytes of weights in milliseconds."""
    return jax.random.key(seed, impl="rbg")


def _matmul(x, stack, copy):
    return matmul(x, stack[copy])


def _moe_matmul(x, stack, *routing, moe_block_size, top_k):
    return moe_matmul(x, stack, *routing, moe_block_size=moe_block_size, top_k=top_k)


@functools.partial(jax.jit, static_argnames=("experts", "spec", "dtype"))
def random_stack(key, experts: int, spec: QuantSpec, dtype: np.dtype) -> MarlinExpertStack:
    """Uniform codes; scales such that a product's elements are as large as those of x."""
    code_key, scale_key = jax.random.split(key)
    tiles = (experts, spec.n_tiles, spec.k_tiles, spec.words_per_tile)
    qweight = jax.random.bits(code_key, tiles, jnp.uint32)
    code_rms = math.sqrt((4**spec.bits + 2) / 12)  # of a uniform code less 2**(bits - 1)
    groups = (experts, spec.n_tiles, spec.num_groups, 64)
    scales = jax.random.uniform(scale_key, groups, jnp.float32, 0.5, 1.5)
    scales = (scales / (code_rms * math.sqrt(spec.k))).astype(dtype)
    return MarlinExpertStack(qweight, scales, None, None, None, spec)
