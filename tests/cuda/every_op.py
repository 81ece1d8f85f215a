"""Calls every op with a kernel once on a small problem: what compute-sanitizer watches."""

import jax
import jax.numpy as jnp
import numpy as np

import jax_marlin as jm


def layers():
    """Stacks of every kernel family: both dtypes, both widths, with and without zero points."""
    rng = np.random.default_rng(5)
    for dtype in (jnp.float16, jnp.bfloat16):
        for bits in (4, 8):
            for symmetric in (True, False):
                options = {"bits": bits, "symmetric": symmetric, "dtype": dtype}
                gate_up = rng.normal(size=(3, 96, 144)) / 10
                gate_up = jm.quantize(gate_up, group_size=32, **options)
                down = jm.quantize(rng.normal(size=(3, 72, 96)) / 10, group_size=-1, **options)
                yield dtype, gate_up, down


def main() -> None:
    rng = np.random.default_rng(6)
    for dtype, gate_up, down in layers():
        # One row count for each tile of the kernel's table, and one past the largest.
        for rows in (1, 9, 17, 33, 67):
            x = jnp.asarray(rng.normal(size=(rows, 96)), dtype)
            topk_weights, topk_ids = jm.route(jnp.asarray(rng.normal(size=(rows, 3))), 2)
            y = jm.moe_ffn(x, topk_ids, topk_weights, gate_up, down, implementation="cuda")
            z = jm.matmul(x, gate_up[2], implementation="cuda")
            w = jm.ragged_dot(x, gate_up, jnp.array([0, rows - 1, 0], jnp.int32))
            for result in (y, z, w):
                assert np.isfinite(np.asarray(result, np.float32)).all()
        # Act-order of each expert's own: the gather kernel.
        perm = jnp.stack([jnp.asarray(rng.permutation(96), jnp.int32) for _ in range(3)])
        routing = jm.moe_align_block_size(topk_ids, 16, 3)
        permuted = jm.MarlinExpertStack(
            gate_up.qweight, gate_up.scales, gate_up.zero_points, perm, None, gate_up.spec
        )
        jax.block_until_ready(jm.moe_matmul(x, permuted, *routing, moe_block_size=16, top_k=2))
        # Split K with its scratch: few columns, long K.
        long = jm.quantize(rng.normal(size=(2048, 64)) / 10, group_size=128, dtype=dtype)
        jax.block_until_ready(long(jnp.ones((5, 2048), dtype)))
    print("every op ran")


if __name__ == "__main__":
    main()
