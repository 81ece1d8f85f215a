"""Gradients inside `jax.shard_map` with its type checks, on four CPU devices of one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import jax_marlin as jm

# x replicated, experts split: each device computes its own experts' part of the sum. Then x split.
PROGRAM = """
import dataclasses, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, PartitionSpec as P
from operations import OPS, arguments, E
import jax_marlin as jm

op, split = sys.argv[1:]
mesh = Mesh(np.array(jax.devices()), ("d",))
assert mesh.size == 4
x, ids, weights, stack, down = arguments(bias=True, g_idx="per_expert", num_experts=8)
x, ids, weights = (jnp.tile(a, (2, 1)) for a in (x, ids, weights))  # 12 tokens
ids = jnp.where(ids < 0, -1, (ids * 3 + 1) % 8)

def product(x, ids, weights, stack, down, offset=0):
    local = jnp.where((ids >= offset) & (ids < offset + stack.num_experts), ids - offset, -1)
    if op == "moe_ffn":
        return jm.moe_ffn(x, local, weights, stack, down)
    if op == "ragged_dot":  # the first id of each token, in order of experts
        order = jnp.argsort(ids[:, 0] % 8)
        sizes = jnp.bincount(ids[:, 0] % 8, length=8)
        return jm.ragged_dot(x[order], stack, sizes, group_offset=offset)
    routing = jm.moe_align_block_size(local, 8, stack.num_experts)
    rows = jm.moe_matmul(x, stack, *routing, moe_block_size=8, top_k=2, topk_weights=weights)
    return rows.reshape(-1, 2, rows.shape[1]).sum(1)

def apply(x, ids, weights, stack, down):
    if op == "matmul":
        return jm.matmul(x, stack[5])
    return product(x, ids, weights, stack, down)

def sharded(x, ids, weights, stack, down):
    if split == "tokens":
        rows, whole = P("d"), P()
        return jax.shard_map(
            apply, mesh=mesh, in_specs=(rows, rows, rows, whole, whole), out_specs=rows
        )(x, ids, weights, stack, down)
    def one(x, ids, weights, stack, down):
        offset = 2 * jax.lax.axis_index("d")
        return jax.lax.psum(product(x, ids, weights, stack, down, offset), "d")
    whole, experts = P(), P("d")
    return jax.shard_map(
        one, mesh=mesh, in_specs=(whole, whole, whole, experts, experts), out_specs=whole
    )(x, ids, weights, stack, down)

def gradient(function):
    def loss(x, weights, bias):
        new = dataclasses.replace(stack, bias=bias)
        return (function(x, ids, weights, new, down) ** 2).sum()
    return jax.jit(jax.grad(loss, (0, 1, 2)))(x, weights, stack.bias)

for got, expected in zip(gradient(sharded), gradient(apply), strict=True):
    scale = float(jnp.abs(expected).max())
    assert op in ("matmul", "ragged_dot") or scale > 0
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5 * scale)
"""
CASES = [("matmul", "tokens"), ("moe_matmul", "tokens"), ("moe_ffn", "tokens")]
CASES += [(op, "experts") for op in ("ragged_dot", "moe_matmul", "moe_ffn")]


@pytest.mark.parametrize(("op", "split"), CASES)
def test_as_on_one_device(op, split):
    """A replicated operand's cotangents are summed over the devices that used it."""
    tests = Path(__file__).parent
    package = Path(jm.__file__).parent.parent
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "PYTHONPATH": f"{package}:{tests}",
    }
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, op, split],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
