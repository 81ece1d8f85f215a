"""Mixtral from synthetic checkpoints: each way its tensors are named, config keys, refusals."""

import re
from itertools import product

import jax
import numpy as np
import pytest
from synthetic_checkpoints import quantization, write
from synthetic_models import CONFIG, HIDDEN, IDS, LAYERS, Modules

from jax_marlin import models
from jax_marlin.models.loading import read_config
from jax_marlin.models.rope import Rope

INNER, EXPERTS = 96, 3
CLASSIC = ("w1", "w3", "w2")
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
NAMES = list(product(["block_sparse_moe", "mlp"], [CLASSIC, PROJECTIONS]))
NEW_KEYS = CONFIG | {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "intermediate_size": INNER,
    "num_local_experts": EXPERTS, "num_experts_per_tok": 2, "sliding_window": None,
}  # fmt: skip


def config(**changes):
    """NEW_KEYS with keys changed; ... removes one."""
    return {key: value for key, value in (NEW_KEYS | changes).items() if value is not ...}


def modules(block, names):
    """All modules of the model: attention and experts are packed, the rest is dense."""
    made = Modules(seed=1)
    for i in range(LAYERS):
        prefix = f"model.layers.{i}.{block}"
        made.dense(f"{prefix}.gate", HIDDEN, EXPERTS)
        for e in range(EXPERTS):
            made.packed(f"{prefix}.experts.{e}.{names[0]}", HIDDEN, INNER)
            made.packed(f"{prefix}.experts.{e}.{names[1]}", HIDDEN, INNER)
            made.packed(f"{prefix}.experts.{e}.{names[2]}", INNER, HIDDEN)
    return made


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The model under its first names."""
    path = tmp_path_factory.mktemp("mixtral")
    write(path, modules(*NAMES[0]).parts, quantization(sym=False), config=config())
    return models.load(path)


@pytest.mark.parametrize(("block", "names"), NAMES[1:])
@pytest.mark.parametrize("shards", [1, 3])
def test_each_naming_pattern_is_the_same_model(tmp_path, reference, block, names, shards):
    parts = modules(block, names).parts
    write(tmp_path, parts, quantization(sym=False), shards=shards, config=config())
    model = models.load(tmp_path)
    assert jax.tree.structure(model) == jax.tree.structure(reference)
    for leaf, expected in zip(jax.tree.leaves(model), jax.tree.leaves(reference), strict=True):
        np.testing.assert_array_equal(leaf, expected)


def test_gate_up_and_down_are_not_mixed_up(reference):
    """w1 is what the activation is applied to, w3 what it is multiplied by."""
    weights = modules(*NAMES[0]).weights
    mlp = reference.layers[1].mlp
    gate_up, down = (np.asarray(stack.dequantize()) for stack in (mlp.gate_up, mlp.down))
    for e in range(EXPERTS):
        prefix = f"model.layers.1.block_sparse_moe.experts.{e}"
        w1, w3, w2 = (weights[f"{prefix}.{name}"] for name in CLASSIC)
        np.testing.assert_allclose(gate_up[e], np.concatenate([w1, w3], axis=1), rtol=1e-6)
        np.testing.assert_allclose(down[e], w2, rtol=1e-6)


def test_generate_is_greedy_without_a_cache(reference):
    tokens = np.asarray(models.generate(reference, IDS, 4))
    logits = np.asarray(reference(np.concatenate([IDS, tokens], axis=1)))[:, IDS.shape[1] - 1 : -1]
    np.testing.assert_array_equal(tokens, logits.argmax(axis=-1))


def test_old_and_new_config_keys_mean_the_same():
    old = config(rope_parameters=..., rope_theta=1e4, num_local_experts=..., num_experts=EXPERTS)
    assert read_config(old) == read_config(config())


def test_defaults_of_the_first_mixtral_files():
    _, got = read_config(config(rope_parameters=..., head_dim=..., hidden_size=96))
    assert (got.rope, got.rms_norm_eps, got.head_dim) == (Rope(1e6), 1e-5, 16)
    assert got.norm_topk_prob and not got.qkv_bias and not got.tie_word_embeddings


def test_sliding_window_as_long_as_the_context_is_none():
    assert read_config(config(sliding_window=64)) == read_config(config())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"sliding_window": 63}, NotImplementedError, "sliding_window 63, expected null"),
        ({"sliding_window": "all"}, NotImplementedError, "sliding_window 'all'"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, NotImplementedError, "'linear'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, NotImplementedError, "longrope"),
        ({"hidden_act": "relu"}, NotImplementedError, "hidden_act 'relu'"),
        ({"architectures": ["MixtralForTokens"]}, NotImplementedError, "MixtralForTokens"),
        ({"num_experts": 4}, ValueError, "num_local_experts"),
        ({"num_local_experts": 1}, ValueError, "num_experts_per_tok 2"),
        ({"intermediate_size": ...}, ValueError, "intermediate_size None"),
    ],
)
def test_config_refused(changes, error, message):
    with pytest.raises(error, match=f"^models.load: config.json .*{message}"):
        read_config(config(**changes))


def renamed(old, new):
    """The classic modules with a part of some names replaced."""
    return {re.sub(old, new, name): parts for name, parts in modules(*NAMES[0]).parts.items()}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (r"layers.1.block_sparse_moe", "layers.1.moe", r"layers\.1 has no router, expected model"),
        (
            r"(0.*)experts.0.w1",
            r"\1experts.0.w4",
            r"experts\.0 is not there, expected .*w1, w3, w2",
        ),
        (r"1.w3", "1.up_proj", r"missing experts \[1\] of 3"),
        (r"(1.*)experts.2.w2", r"\1experts.2.down_proj", r"missing experts \[2\] of 3"),
    ],
)
def test_misnamed_experts(tmp_path, old, new, message):
    write(tmp_path, renamed(old, new), quantization(sym=False), config=config())
    with pytest.raises(ValueError, match=message):
        models.load(tmp_path)


def test_both_blocks_at_once(tmp_path):
    both = modules(*NAMES[0]).parts | modules("mlp", CLASSIC).parts
    write(tmp_path, both, quantization(sym=False), config=config())
    with pytest.raises(ValueError, match=r"tensors have no place in mixtral .*layers\.0\.mlp"):
        models.load(tmp_path)
