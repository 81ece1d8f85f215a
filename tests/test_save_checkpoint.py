"""Checkpoints that are written: the bits that were read, for us and an independent reader."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest
import safetensors.numpy
from synthetic_checkpoints import MODULE, flat, gptq_tensors, quantization, write

import jax_marlin as jm
from jax_marlin.checkpoints import open_checkpoint, save_checkpoint
from jax_marlin.data import bundled_checkpoint

FLOATS = [np.float16, np.float32, ml_dtypes.bfloat16]
# K and N below, between and at multiples of 64; N no multiple of the codes of a word either.
SHAPES = [(32, 8), (64, 64), (96, 72), (160, 200), (576, 192), (64, 61), (128, 1)]


def tensors_of(directory):
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        found |= safetensors.numpy.load_file(path)
    return found


def padded(n):
    """gptq_tensors needs whole words along N: what to generate to slice N columns from."""
    return -(-n // 8) * 8


def random_linear(k, n, bits, **options):
    """(packed linear, its float64 weight) of any N."""
    tensors, weight = gptq_tensors(k + n, k, padded(n), bits=bits, **options)
    arrays = {part: tensors[part][..., :n] for part in ("qweight", "scales")}
    words = -(-n * bits // 32)
    if "bias" in tensors:
        arrays["bias"] = tensors["bias"][:n]
    w = jm.load_gptq(
        **arrays, qzeros=tensors["qzeros"][:, :words], g_idx=tensors["g_idx"], bits=bits,
        group_size=options.get("group_size", 32),
    )  # fmt: skip
    return w, weight[:, :n]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"symmetric": False},
        {"act_order": True, "bias": True},
        {"symmetric": False, "act_order": True, "group_size": -1, "scale_dtype": np.float32},
    ],
    ids=str,
)
def test_round_trip_is_exact(tmp_path, bits, shape, options):
    k, n = shape
    w, weight = random_linear(k, n, bits, **options)
    save_checkpoint(tmp_path / "a", {MODULE: w})
    with open_checkpoint(tmp_path / "a") as checkpoint:
        again = checkpoint.load_linear(MODULE)
    assert jax.tree.structure(again) == jax.tree.structure(w)
    for leaf, expected in zip(jax.tree.leaves(again), jax.tree.leaves(w), strict=True):
        assert leaf.dtype == expected.dtype
        np.testing.assert_array_equal(leaf, expected)
    assert isinstance(again, jm.MarlinLinear)
    np.testing.assert_allclose(again.dequantize("float32"), weight, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("scale_dtype", FLOATS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_files_are_those_that_were_read(tmp_path, checkpoint_format, scale_dtype, symmetric):
    """Byte for byte, zero points of 0 in version 1 included, and the oracle reads them."""
    options = {"symmetric": symmetric, "act_order": True, "bias": True, "scale_dtype": scale_dtype}
    tensors, weight = gptq_tensors(3, 96, 128, checkpoint_format=checkpoint_format, **options)
    config = quantization(sym=symmetric, desc_act=True, checkpoint_format=checkpoint_format)
    write(tmp_path / "a", {MODULE: tensors}, config)
    with open_checkpoint(tmp_path / "a") as checkpoint:
        save_checkpoint(
            tmp_path / "b",
            {MODULE: checkpoint.load_linear(MODULE)},
            checkpoint.config,
            checkpoint_format=checkpoint_format,
        )
    written = tensors_of(tmp_path / "b")
    assert written.keys() == flat({MODULE: tensors}).keys()
    for part, array in tensors.items():
        got = written[f"{MODULE}.{part}"]
        assert got.dtype == array.dtype and got.tobytes() == array.tobytes(), part
    parts = {part: written[f"{MODULE}.{part}"] for part in ("qweight", "scales", "qzeros", "g_idx")}
    got = oracle.gptq_weight(**parts, bits=4, group_size=32, checkpoint_format=checkpoint_format)
    np.testing.assert_array_equal(got, weight)
    config = json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]
    assert (config["sym"], config["desc_act"]) == (symmetric, True)
    assert config["checkpoint_format"] == checkpoint_format


def stored_and_packed(checkpoint):
    """For `save_checkpoint`: quantized modules packed, everything else as stored."""
    for name, module in checkpoint.modules.items():
        if module.quantization is not None:
            yield name, checkpoint.load_linear(name)
        else:
            yield from ((t.name, checkpoint.tensor(t.name)) for t in module.tensors.values())


@pytest.mark.parametrize(
    "name",
    [
        "qwen3moe-gptq-sym-g128",
        "qwen3moe-gptq-sym-desc-dynamic-lmhead",
        "qwen3moe-gptq-sym-channel",
        "qwen3moe-gptqv2-asym-g64",
        "mixtral-gptq-asym-desc-g64",
        "mixtral-gptq-sym-g128-classic-sharded",
        "qwen2moe-gptq-asym-g64-bias-shared",
    ],
)
def test_files_of_other_tools_come_back_as_they_were(tmp_path, find_checkpoint, name):
    with open_checkpoint(find_checkpoint(name)) as checkpoint:
        save_checkpoint(
            tmp_path / "a",
            stored_and_packed(checkpoint),
            checkpoint.config,
            checkpoint_format=checkpoint.format,
        )
        written = tensors_of(tmp_path / "a")
        assert written.keys() == set(checkpoint.names())
        for tensor, array in written.items():
            expected = checkpoint.tensor(tensor)
            assert array.dtype == expected.dtype and array.tobytes() == expected.tobytes(), tensor
        with open_checkpoint(tmp_path / "a") as again:
            for module, info in checkpoint.modules.items():
                assert again.modules[module].bits == info.bits
    ids = np.array([[3, 1, 4, 1, 5]])
    got, expected = (jm.models.load(p, "float32")(ids) for p in (tmp_path / "a", checkpoint.path))
    np.testing.assert_array_equal(got, expected)


def test_whole_model_of_another_format_becomes_gptq(tmp_path, find_checkpoint):
    source = find_checkpoint("qwen3moe-awq-asym-g64")
    with open_checkpoint(source) as checkpoint:
        save_checkpoint(
            tmp_path / "a",
            stored_and_packed(checkpoint),
            checkpoint.config,
            max_shard_bytes=200_000,
        )
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 3
    ids = np.array([[3, 1, 4, 1, 5]])
    got, expected = (jm.models.load(p, "float32")(ids) for p in (tmp_path / "a", source))
    np.testing.assert_array_equal(got, expected)


def test_stacks_split_into_experts_and_projections(tmp_path):
    prefix = "model.layers.1.mlp.experts"
    projections = ("gate_proj", "up_proj", "down_proj")
    with open_checkpoint(bundled_checkpoint()) as checkpoint:
        names = [[f"{prefix}.{e}.{p}" for p in projections] for e in range(8)]
        gate_up = checkpoint.load_expert_stack([name[:2] for name in names])
        down = checkpoint.load_expert_stack([name[2] for name in names])
        first = checkpoint.load_linear("model.layers.0.self_attn.q_proj")
        assert isinstance(first, jm.MarlinLinear)
        save_checkpoint(tmp_path / "a", {
            (f"{prefix}.{{}}.gate_proj", f"{prefix}.{{}}.up_proj"): gate_up,
            f"{prefix}.{{}}.down_proj": down,
            "one": first[:, 64:128],
        })  # fmt: skip
        for name, array in tensors_of(tmp_path / "a").items():
            if not name.startswith("one"):
                np.testing.assert_array_equal(array, checkpoint.tensor(name))
    with open_checkpoint(tmp_path / "a") as checkpoint:
        one = checkpoint.load_linear("one")
    assert isinstance(one, jm.MarlinLinear)
    np.testing.assert_array_equal(one.dequantize(), first.dequantize()[:, 64:128])


def test_modules_that_differ_get_rules(tmp_path):
    dense = np.ones((96, 64), ml_dtypes.bfloat16)
    weights = {
        f"layers.{i}.{name}": random_linear(64, 96, bits, symmetric=symmetric)[0]
        for i in range(3)
        for name, bits, symmetric in [("up", 4, True), ("out", 8, True), ("down", 4, False)]
    } | {"layers.1.up2": random_linear(64, 96, 8)[0], "layers.0.up2.weight": dense}
    save_checkpoint(tmp_path / "a", weights, {"hidden_size": 64})
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["hidden_size"] == 64
    rules = set(config["quantization_config"]["dynamic"])
    assert r"-:^layers\.0\.up2$" in rules and len(rules) == 3  # most are "out"
    with open_checkpoint(tmp_path / "a") as checkpoint:
        np.testing.assert_array_equal(checkpoint.tensor("layers.0.up2.weight"), dense)
        for name, w in weights.items():
            if name != "layers.0.up2.weight":
                again = checkpoint.load_linear(name)
                assert isinstance(again, jm.MarlinLinear)
                assert jax.tree.structure(again) == jax.tree.structure(w)
                np.testing.assert_array_equal(again.dequantize(), w.dequantize())


@pytest.mark.parametrize(
    ("shapes", "base", "rules"),
    [
        ({"a": (128, 32), "b": (32, 32), "c": (64, 32)}, 32, []),
        ({"a": (128, -1), "b": (64, -1)}, -1, []),
        ({"a": (128, 32), "b": (64, 32), "c": (64, -1)}, 32, [("+:^c$", -1)]),
    ],
)
def test_one_group_for_all_of_k(tmp_path, shapes, base, rules):
    """-1 in the config, but no rule of its own where K happens to be one group of the others'."""
    weights = {
        name: jm.quantize(np.eye(k, 64, dtype=np.float32), group_size=group_size)
        for name, (k, group_size) in shapes.items()
    }
    save_checkpoint(tmp_path / "a", weights)
    config = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]
    assert config["group_size"] == base
    assert [(name, rule["group_size"]) for name, rule in config["dynamic"].items()] == rules
    with open_checkpoint(tmp_path / "a") as checkpoint:
        for name, w in weights.items():
            again = checkpoint.load_linear(name)
            assert jax.tree.structure(again) == jax.tree.structure(w)


def test_dense_weights_alone_are_a_dense_checkpoint(tmp_path):
    save_checkpoint(tmp_path / "a", {"x.weight": jnp.ones((3, 5))}, {"quantization_config": {}})
    with open_checkpoint(tmp_path / "a") as checkpoint:
        assert checkpoint.format == "dense" and checkpoint.load_linear("x").shape == (5, 3)


def test_unquantized_experts_stay_so_beside_packed_ones(tmp_path):
    rng = np.random.default_rng(4)
    weight, bias = rng.standard_normal((3, 32, 80)), rng.standard_normal((3, 80))
    gate_up = jm.DenseExpertStack(
        jnp.asarray(weight, jnp.bfloat16), jnp.asarray(bias, jnp.bfloat16)
    )
    down = jm.quantize(rng.standard_normal((3, 40, 32)).astype(np.float32), group_size=-1)
    one = jm.DenseExpertStack(jnp.asarray(weight[0], jnp.float16))
    save_checkpoint(tmp_path / "a", {
        ("experts.{}.gate", "experts.{}.up"): gate_up, "experts.{}.down": down, "one": one,
    })  # fmt: skip
    with open_checkpoint(tmp_path / "a") as checkpoint:
        assert checkpoint.modules["experts.2.up"].quantization is None
        names = [(f"experts.{e}.gate", f"experts.{e}.up") for e in range(3)]
        again = checkpoint.load_expert_stack(names)
        np.testing.assert_array_equal(checkpoint.load_linear("one"), one.weight)
    assert isinstance(again, jm.DenseExpertStack)
    for leaf, expected in zip(jax.tree.leaves(again), jax.tree.leaves(gate_up), strict=True):
        assert leaf.dtype == expected.dtype
        np.testing.assert_array_equal(leaf, expected)
    with pytest.raises(ValueError, match=r"^save_checkpoint: .*cannot share 80 columns"):
        save_checkpoint(tmp_path / "b", {("{}.a", "{}.b", "{}.c"): gate_up})


W = jm.quantize(np.ones((2, 64, 96), np.float32), group_size=32)


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ({}, ValueError, "weights is empty"),
        ({"experts.down": W}, ValueError, r"'experts.down' of .*expected `\{\}` for the number"),
        ({"experts.{}": W[0]}, ValueError, r"expected no `\{\}` in it"),
        ({tuple("{}" + c for c in "abcde"): W}, ValueError, "cannot share 96 columns equally"),
        ([("a", W[0]), ("a", W[1])], ValueError, "tensor a.qweight is given twice"),
        ({("a", "b"): np.ones(3)}, ValueError, "expected one full name"),
        ({"a.weight": object()}, TypeError, "a.weight is object, expected a MarlinLinear"),
    ],
)
def test_bad_arguments(tmp_path, weights, error, message):
    with pytest.raises(error, match=f"^save_checkpoint: .*{message}"):
        save_checkpoint(tmp_path / "a", weights)
    assert not list(tmp_path.iterdir())  # nothing half written


def test_other_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="checkpoint_format is 'awq', expected one of"):
        save_checkpoint(tmp_path / "a", {"a": W[0]}, checkpoint_format="awq")
    with pytest.raises(TypeError, match="save_checkpoint: the weight is traced"):
        jax.jit(lambda w: save_checkpoint(tmp_path / "a", {"a": w}))(W[0])
    (tmp_path / "here").write_text("")
    with pytest.raises(FileExistsError, match="expected a new or an empty directory"):
        save_checkpoint(tmp_path, {"a": W[0]})
