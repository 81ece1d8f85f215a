"""Experts into stacks: the weights that were written, side by side, in no more memory than that."""

import tracemalloc

import jax.numpy as jnp
import numpy as np
import pytest
from synthetic_checkpoints import gptq_tensors, quantization, write

from jax_marlin.checkpoints import open_checkpoint


def expert_names(num_experts, *parts, prefix="model.layers.0.mlp.experts"):
    return [tuple(f"{prefix}.{e}.{part}" for part in parts) for e in range(num_experts)]


def write_experts(directory, num_experts=3, k=96, n=80, **options):
    """A checkpoint of gate/up pairs; returns it and the weights [E, K, 2 N]."""
    modules, weights = {}, []
    for e, names in enumerate(expert_names(num_experts, "gate_proj", "up_proj")):
        pairs = [gptq_tensors(e, k, n, **options), gptq_tensors(e, k, n, **options)]
        # same seed, so the same g_idx; other codes for up
        up, up_weight = pairs[1]
        up["scales"] = -up["scales"]
        modules |= {names[0]: pairs[0][0], names[1]: up}
        weights.append(np.concatenate([pairs[0][1], -up_weight], axis=1))
    keys = ("bits", "group_size", "checkpoint_format")
    config = quantization(**{key: options[key] for key in keys if key in options})
    config["sym"] = options.get("symmetric", True)
    config["desc_act"] = options.get("act_order", False)
    return write(directory, modules, config), np.stack(weights)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bits": 8, "group_size": 64, "k": 192},
        {"symmetric": False},
        {"symmetric": False, "checkpoint_format": "gptq_v2"},
        {"group_size": -1},
        {"act_order": True, "n": 128},
        {"bias": True, "n": 72},
    ],
    ids=lambda options: " ".join(map(str, options.items())) or "defaults",
)
def test_expert_stack_holds_gate_and_up_side_by_side(tmp_path, options):
    path, weights = write_experts(tmp_path, **options)
    with open_checkpoint(path) as checkpoint:
        experts = expert_names(3, "gate_proj", "up_proj")
        assert checkpoint.can_fuse(experts)
        stack = checkpoint.load_expert_stack(experts, jnp.float32)
        assert stack.shape == weights.shape
        np.testing.assert_array_equal(stack.dequantize(), weights.astype(np.float32))
        if options.get("bias"):
            stored = [np.concatenate([checkpoint.tensor(f"{m}.bias") for m in e]) for e in experts]
            np.testing.assert_array_equal(stack.bias, np.stack(stored).astype(np.float32))
        else:
            assert stack.bias is None
        gate, up = checkpoint.load_expert_stacks(experts, jnp.float32)
        both = np.concatenate([gate.dequantize(), up.dequantize()], axis=2)
        np.testing.assert_array_equal(both, weights.astype(np.float32))


def test_gate_and_up_with_different_act_order_are_a_pair(tmp_path):
    modules, weights = {}, {}
    for seed, names in enumerate(expert_names(2, "gate_proj", "up_proj")):
        for name in names:
            modules[name], weights[name] = gptq_tensors(
                (seed, name == names[1]), 128, 64, act_order=True
            )
    path = write(tmp_path, modules, quantization(desc_act=True))
    experts = expert_names(2, "gate_proj", "up_proj")
    with open_checkpoint(path) as checkpoint:
        assert not checkpoint.can_fuse(experts)
        with pytest.raises(ValueError, match=r"module .*experts\.0\.up_proj.*pair of stacks"):
            checkpoint.load_expert_stack(experts)
        gate, up = checkpoint.load_expert_stacks(experts, jnp.float32)
    for stack, names in ((gate, [e[0] for e in experts]), (up, [e[1] for e in experts])):
        expected = np.stack([weights[name] for name in names])
        np.testing.assert_array_equal(stack.dequantize(), expected.astype(np.float32))


def test_different_group_sizes_do_not_fuse_but_make_a_pair(tmp_path):
    modules, weights = {}, {}
    for e, (gate, up) in enumerate(expert_names(2, "gate_proj", "up_proj")):
        modules[gate], weights[gate] = gptq_tensors(e, 128, 64)
        modules[up], weights[up] = gptq_tensors(e, 128, 96, group_size=64)
    config = quantization(dynamic={r"+:.*\.up_proj": {"group_size": 64}})
    experts = expert_names(2, "gate_proj", "up_proj")
    with open_checkpoint(write(tmp_path, modules, config)) as checkpoint:
        assert not checkpoint.can_fuse(experts)
        gate, up = checkpoint.load_expert_stacks(experts)
        assert (gate.shape, up.shape) == ((2, 128, 64), (2, 128, 96))
        np.testing.assert_array_equal(
            up.astype(jnp.float32).dequantize()[1], weights[experts[1][1]].astype(np.float32)
        )


def test_absent_g_idx_and_qzeros_are_the_plain_ones(tmp_path):
    # auto-round's native export has no g_idx; some symmetric exports have no qzeros
    full, weight = gptq_tensors(5, 96, 80)
    bare = {part: full[part] for part in ("qweight", "scales")}
    with open_checkpoint(write(tmp_path, {"gate": full, "up": bare}, quantization())) as checkpoint:
        assert checkpoint.can_fuse([("gate", "up")])
        stack = checkpoint.load_expert_stack([("gate", "up")], jnp.float32)
    expected = np.concatenate([weight, weight], axis=1).astype(np.float32)
    np.testing.assert_array_equal(stack.dequantize()[0], expected)


def test_progress_counts_modules(tmp_path):
    class Bar:
        done = 0

        def update(self, n):
            self.done += n

    path, _ = write_experts(tmp_path, n=64)
    bar = Bar()
    with open_checkpoint(path) as checkpoint:
        checkpoint.load_expert_stack(expert_names(3, "gate_proj", "up_proj"), progress=bar)
        assert bar.done == 6
        checkpoint.load_linear("model.layers.0.mlp.experts.0.up_proj", progress=bar)
        assert bar.done == 7


def test_peak_memory_is_the_stack_and_one_expert(tmp_path):
    # 24 experts of 512 x 1024: 6.3 MB packed. Two copies of the stack, or all experts unpacked
    # (12.6 MB as bytes), would pass the bound below.
    tensors, _ = gptq_tensors(6, 512, 512, group_size=128)
    experts = expert_names(24, "gate_proj", "up_proj")
    modules = {name: tensors for names in experts for name in names}
    path = write(tmp_path, modules, quantization(group_size=128))
    del modules, tensors
    with open_checkpoint(path) as checkpoint:
        checkpoint.load_expert_stack(experts[:1], jnp.float16)  # warm up: JAX's own memory
        tracemalloc.start()
        try:
            stack = checkpoint.load_expert_stack(experts, jnp.float16)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    one_module = 512 * 512  # its codes as bytes; a whole expert in float32 is 8 times that
    assert stack.nbytes > 12 * one_module * 2
    assert peak < stack.nbytes + 8 * one_module, (peak, stack.nbytes)
