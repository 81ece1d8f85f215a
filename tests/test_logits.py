"""Real checkpoints against their float32 reference: logits, and block by block."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_marlin import MarlinExpertStack, models
from jax_marlin.models.decoder_layer import SparseMlp

IN_REPOSITORY = ["qwen3moe-gptq-sym-g128", "qwen3moe-gptq-sym-desc-dynamic-lmhead"]
OF_OTHER_FAMILIES = [
    "mixtral-gptq-asym-desc-g64",
    "mixtral-gptq-sym-g128-classic-sharded",
    "qwen2moe-gptq-asym-g64-bias-shared",
    "deepseekv3-gptq-sym-g32",
    "gptoss-mxfp4",
]
CHECKPOINTS = [
    *IN_REPOSITORY,
    "qwen3moe-gptqv2-asym-g64",
    "qwen3moe-gptq-sym-channel",
    "qwen3moe-autoround-gptq-asym-g64",
    "qwen3moe-awq-asym-g64",
    "qwen3moe-ct-w4a16-sym-g128",
    "qwen3moe-ct-w8a16-channel",
    *OF_OTHER_FAMILIES,
]
# Largest difference of logits whose standard deviation is 1.35.
LIMITS = {"float32": 2e-3, "float16": 0.05, "bfloat16": 0.3}
ON_CUDA = [pytest.param(dtype, marks=pytest.mark.cuda) for dtype in ("float16", "bfloat16")]


def platform_of(dtype: str) -> str:
    return "cpu" if dtype == "float32" else "cuda"


@pytest.fixture(params=["float32", *ON_CUDA])
def dtype(request):
    """float32 on the CPU; the kernels' dtypes on a GPU, where there is one."""
    with jax.default_device(jax.local_devices(backend=platform_of(request.param))[0]):
        yield request.param


@functools.cache
def loaded(path, dtype):
    with np.load(path / "expected.npz") as arrays:
        return models.load(path, dtype), dict(arrays)


def block_of(model, name):
    """The part of the model that a checkpoint calls `model.layers.0.mlp`, say."""
    part = model
    for step in name.removeprefix("model.").split("."):
        part = part[int(step)] if step.isdecimal() else getattr(part, step)
    return part


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_blocks_from_the_reference_input(find_checkpoint, name, dtype):
    model, expected = loaded(find_checkpoint(name), dtype)
    blocks = [key.removesuffix(":in") for key in expected if key.endswith(":in")]
    mlps = {f"model.layers.{i}.mlp" for i in range(len(model.layers))}
    assert mlps <= {block.replace("block_sparse_moe", "mlp") for block in blocks}
    for block in blocks:
        x, y = (expected[f"{block}:{end}"] for end in ("in", "out"))
        got = jax.jit(lambda f, x: f(x))(block_of(model, block), jnp.asarray(x).astype(dtype))
        difference = np.abs(np.asarray(got.astype(jnp.float32)) - y).max()
        assert difference <= LIMITS[dtype], f"{block} differs by {difference}"


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_logits(find_checkpoint, name, dtype):
    model, expected = loaded(find_checkpoint(name), dtype)
    logits = jax.jit(lambda model, ids: model(ids))(model, expected["input_ids"])
    assert logits.shape == expected["logits"].shape and logits.dtype == jnp.float32
    difference = np.abs(np.asarray(logits) - expected["logits"]).max()
    assert difference < LIMITS[dtype]


@pytest.mark.parametrize("name", [*IN_REPOSITORY, *OF_OTHER_FAMILIES])
def test_logits_through_the_cache(find_checkpoint, name, dtype):
    """Read in pieces of 11, 11, 1 and 1 tokens: each piece ends on the reference's logits."""
    model, expected = loaded(find_checkpoint(name), dtype)
    ids = jnp.asarray(expected["input_ids"])
    extend = jax.jit(lambda model, ids, cache: model.extend(ids, cache), donate_argnames="cache")
    cache = model.empty_cache(len(ids), capacity=29)
    for start, stop in [(0, 11), (11, 22), (22, 23), (23, 24)]:
        logits, cache = extend(model, ids[:, start:stop], cache)
        difference = np.abs(np.asarray(logits) - expected["logits"][:, stop - 1]).max()
        assert difference < LIMITS[dtype], (start, stop)


@pytest.mark.parametrize("name", OF_OTHER_FAMILIES)
def test_generate_is_greedy_without_a_cache(find_checkpoint, name, dtype):
    """Each token is the likeliest by logits of the whole text so far, computed afresh."""
    model, expected = loaded(find_checkpoint(name), dtype)
    ids = expected["input_ids"][:, :13]
    tokens = np.asarray(models.generate(model, ids, 5))
    logits = np.asarray(model(np.concatenate([ids, tokens], axis=1)))[:, len(ids[0]) - 1 : -1]
    if dtype == "float32":
        np.testing.assert_array_equal(tokens, logits.argmax(axis=-1))
    chosen = np.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    # In 16 bits the two ways round differently, and a near tie may fall either way.
    assert (logits.max(axis=-1) - chosen).max() <= 2 * LIMITS[dtype]


@pytest.mark.parametrize(
    "name", ["qwen3moe-gptq-sym-desc-dynamic-lmhead", "mixtral-gptq-asym-desc-g64"]
)
def test_act_order_gathers_only_before_gate_up(find_checkpoint, name):
    path = find_checkpoint(name)
    for layer in models.load(path, "float32").layers:
        assert isinstance(layer.mlp, SparseMlp) and isinstance(layer.mlp.gate_up, MarlinExpertStack)
        assert layer.mlp.gate_up.perm is not None
        assert isinstance(layer.mlp.down, MarlinExpertStack)
        assert layer.mlp.down.perm is None
