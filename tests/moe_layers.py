"""MoE layers for the tests of moe_ffn: problems by what they stress, float64 results, budgets."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import oracle
from problems import Case, Problem, build

from jax_marlin import DenseExpertStack

ORACLE_NAMES = {"swiglu_clamped": "swiglu_oai"}


@dataclasses.dataclass
class Layer:
    """Two problems' cases as one layer: gate_up [E, H, 2I] and down [E, I, N]."""

    gate_up: Case
    down: Case

    @property
    def x(self):
        return jnp.asarray(self.gate_up.x)

    @property
    def routes(self):
        return jnp.asarray(self.gate_up.topk_ids), jnp.asarray(self.gate_up.topk_weights)

    def stacks(self):
        return self.gate_up.stack(), self.down.stack()

    def dense_stacks(self):
        """The same weights in float32, not packed; both cases must have a bias."""
        return tuple(
            DenseExpertStack(jnp.asarray(case.weights, jnp.float32), jnp.asarray(case.bias))
            for case in (self.gate_up, self.down)
        )


def build_layer(name: str, *, intermediate: int = 72, n: int = 136, **fields: Any) -> Layer:
    """I is off the tile by default, so that up starts inside a tile."""
    fields = {"k": 96, "group_size": 32, "num_experts": 5, "m": 7, "top_k": 3} | fields
    gate_up = build(Problem(f"{name}_gate_up", n=2 * intermediate, **fields))
    fields |= {"k": intermediate, "n": n}
    if intermediate % 32:
        fields |= {"group_size": intermediate, "g_idx": "none"}
    return Layer(gate_up, build(Problem(f"{name}_down", **fields)))


def expected(layer: Layer, activation="silu", *, weights_on_input=False, x=None, ids=None):
    """float64 result and budget of each element: every step's own error, carried to the end."""
    gate_up, down = layer.gate_up, layer.down
    dtype, eps = gate_up.x.dtype, oracle.epsilon(gate_up.x.dtype)
    x = np.asarray(gate_up.x if x is None else x).astype(np.float64)
    ids = gate_up.topk_ids if ids is None else ids
    name = ORACLE_NAMES.get(activation, activation)
    y = np.zeros((len(x), down.weights.shape[2]))
    budget = np.zeros(y.shape)
    for (token, slot), expert in np.ndenumerate(ids):
        if not 0 <= expert < len(gate_up.weights):
            continue
        weight = float(gate_up.topk_weights[token, slot])
        w1, w2 = gate_up.weights[expert], down.weights[expert]
        b1, b2 = (None if c.bias is None else c.bias[expert].astype(float) for c in (gate_up, down))
        row = x[token] * (weight if weights_on_input else 1.0)
        z, z_error = oracle.matmul(row, w1, b1), oracle.matmul_budget(row, w1, dtype, b1)
        h = oracle.activate(z, name)
        gate, up = np.split(z, 2)
        gate_error, up_error = np.split(z_error, 2)
        one = 0.0 if activation == "swiglu_clamped" else 1.0  # the up that is a factor of 1
        act = np.abs(oracle.activate(np.concatenate([gate, np.full_like(gate, one)]), name))
        # No activation here is steeper than 1.2, and |factor of up| <= |up| + 1.
        h_error = 1.2 * gate_error * (np.abs(up) + 1 + up_error) + act * up_error + eps * np.abs(h)
        out_weight = 1.0 if weights_on_input else weight
        y[token] += out_weight * oracle.matmul(h, w2, b2)
        budget[token] += out_weight * (
            oracle.matmul_budget(h, w2, dtype, b2) + h_error @ np.abs(w2)
        )
    return y, budget + eps * np.abs(y)


LAYERS = {
    "float32": {"dtype": "float32"},
    "float16_v1_zeros_bias": {"zeros": "v1", "bias": True},
    "bfloat16_8bit_v2_zeros": {"dtype": "bfloat16", "bits": 8, "zeros": "v2"},
    "g_idx_per_expert": {"g_idx": "per_expert", "intermediate": 96, "bias": True},
    "g_idx_shared_bfloat16": {"g_idx": "shared", "intermediate": 64, "dtype": "bfloat16"},
    "one_token_one_expert": {"m": 1, "top_k": 1},
    "many_tokens": {"m": 130, "top_k": 2, "num_experts": 3, "dtype": "bfloat16"},
    "no_tokens": {"m": 0},
    "skipped_slots_and_tokens": {"m": 23, "routing": "skips", "bias": True},
    "nobody": {"routing": "nobody"},
    # I a multiple of 16: on CUDA one call, with tables for many routes and without for few.
    "one_call_act_order_bias": {"g_idx": "per_expert", "zeros": "v1", "intermediate": 96, "m": 33},
    "one_call_shared_act_order": {"g_idx": "shared", "intermediate": 64, "bias": True, "m": 33},
    "one_call_8bit": {"bits": 8, "intermediate": 80, "bias": True, "m": 21},
    "one_call_half_a_pair_of_tiles": {"intermediate": 48, "dtype": "bfloat16", "n": 200, "m": 70},
    "one_call_odd_columns": {"intermediate": 32, "n": 67, "m": 12},
    "one_call_without_tables": {"intermediate": 96, "m": 1, "num_experts": 16, "zeros": "v2"},
    "one_call_few_routes": {"intermediate": 96, "m": 2, "top_k": 2, "num_experts": 19, "bits": 8},
    # Few routes and small weights: down's blocks sum a token's routes, in warps of their own.
    "one_call_sum_of_eight": {
        "intermediate": 96,
        "m": 1,
        "top_k": 8,
        "num_experts": 16,
        "zeros": "v1",
        "bias": True,
        "g_idx": "per_expert",
    },
    "one_call_sum_of_six_long_k": {
        "intermediate": 1184,
        "m": 2,
        "top_k": 6,
        "num_experts": 48,
        "n": 200,
        "dtype": "bfloat16",
    },
    "one_call_sum_of_three_skips": {
        "intermediate": 96,
        "m": 3,
        "num_experts": 40,
        "routing": "skips",
        "bias": True,
        "n": 67,
    },
    "one_call_sum_of_two_long_k": {
        "intermediate": 2112,
        "m": 1,
        "top_k": 2,
        "zeros": "v2",
        "bits": 8,
        "dtype": "bfloat16",
    },
    # K longer than what waits in shared memory at once, in groups of half a tile and of one.
    "one_call_sum_of_seven_longest_k": {
        "intermediate": 1856,
        "m": 1,
        "top_k": 7,
        "num_experts": 8,
        "n": 72,
        "zeros": "v1",
        "bias": True,
    },
    "one_call_sum_of_five_longest_k": {
        "k": 128,
        "intermediate": 1600,
        "group_size": 64,
        "m": 1,
        "top_k": 5,
        "n": 72,
        "bits": 8,
        "dtype": "bfloat16",
    },
    "one_call_sum_of_four_tokens": {
        "intermediate": 80,
        "m": 4,
        "top_k": 2,
        "num_experts": 32,
        "zeros": "v2",
    },
    # As long as one token's K and groups are in Qwen3.
    "one_call_sum_of_wide_groups": {
        "k": 256,
        "intermediate": 768,
        "group_size": 128,
        "m": 1,
        "top_k": 8,
        "num_experts": 8,
        "n": 264,
        "dtype": "bfloat16",
    },
    "one_call_sum_of_one": {"intermediate": 128, "m": 1, "top_k": 1, "bias": True},
    "one_call_sum_of_nobody": {"intermediate": 96, "m": 1, "routing": "nobody"},
    "one_call_nine_routes": {"intermediate": 96, "m": 1, "top_k": 9, "num_experts": 11},
    # Blocks of 64 slots and more: rows of bfloat16 before their sum.
    "one_call_nine_narrow_rows": {
        "intermediate": 96,
        "m": 130,
        "top_k": 9,
        "num_experts": 11,
        "dtype": "bfloat16",
    },
    "one_call_narrow_rows_odd_columns": {
        "intermediate": 32,
        "n": 67,
        "m": 130,
        "routing": "skips",
        "dtype": "bfloat16",
    },
    "one_call_skips": {"intermediate": 112, "m": 23, "routing": "skips", "bias": True},
    "one_call_nobody": {"intermediate": 16, "routing": "nobody", "group_size": -1},
    "one_call_blocks_of_96": {
        "intermediate": 64,
        "m": 120,
        "top_k": 2,
        "num_experts": 3,
        "bias": True,
        "zeros": "v2",
    },
    "one_call_blocks_of_144": {
        "intermediate": 64,
        "m": 800,
        "top_k": 2,
        "num_experts": 3,
        "bias": True,
        "dtype": "bfloat16",
    },
    "one_call_blocks_of_144_8bit_skips": {
        "intermediate": 64,
        "m": 1100,
        "top_k": 2,
        "num_experts": 4,
        "bits": 8,
        "zeros": "v1",
        "routing": "skips",
        "n": 68,
        "dtype": "bfloat16",
    },
    # Blocks of 256 rows, before 4096 columns of gate_up: x and hidden in the order of slots.
    "one_call_blocks_of_256_8bit_skips": {
        "intermediate": 2048,
        "m": 620,
        "top_k": 2,
        "num_experts": 2,
        "k": 32,
        "bits": 8,
        "zeros": "v1",
        "routing": "skips",
        "n": 68,
        "dtype": "bfloat16",
    },
    "one_call_blocks_of_256_sorted_x": {
        "intermediate": 2048,
        "m": 1040,
        "top_k": 1,
        "num_experts": 2,
        "k": 32,
        "bias": True,
        "zeros": "v2",
    },
    "one_call_blocks_of_256_act_order": {
        "intermediate": 2048,
        "m": 530,
        "top_k": 1,
        "num_experts": 1,
        "k": 64,
        "g_idx": "per_expert",
        "dtype": "bfloat16",
    },
    "one_call_wide": {"intermediate": 704, "k": 320, "n": 1344, "m": 19, "dtype": "bfloat16"},
}
