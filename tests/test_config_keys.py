"""Keys of config.json of another type or past their range, and the nearest values that load."""

import json

import pytest
from synthetic_checkpoints import MODULE, edit_header, linear, quantization, write, write_json

from jax_marlin import models
from jax_marlin.checkpoints import open_checkpoint
from jax_marlin.checkpoints.json_file import parse_object
from jax_marlin.data import bundled_checkpoint
from jax_marlin.models.loading import read_config

CONFIG = json.loads((bundled_checkpoint() / "config.json").read_text())


def nested(depth):
    """A list in a list, `depth` lists."""
    value = []
    for _ in range(depth - 1):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("key", "wrong", "right"),
    [
        ("architectures", "Qwen3MoeForCausalLM", ["Qwen3MoeForCausalLM"]),
        ("architectures", 5, None),
        ("decoder_sparse_step", True, 1),
        ("head_dim", "64", 64),
        ("head_dim", 0, None),
        ("layer_types", 2, ["full_attention"] * 2),
        ("layer_types", [[]], []),
        ("mlp_only_layers", 1, [1]),
        ("mlp_only_layers", ["1"], None),
        ("norm_topk_prob", "false", False),
        ("num_hidden_layers", 10_001, 10_000),
        ("num_local_experts", -8, 8),
        ("rms_norm_eps", "1e-6", 1e-6),
        ("rms_norm_eps", 10**400, 1),
        ("rms_norm_eps", float("nan"), None),
        ("rope_parameters", ["rope_theta"], {"rope_theta": 10000}),
        ("tie_word_embeddings", 0, False),
        ("tie_word_embeddings", [], None),
        ("use_sliding_window", "no", None),
        ("vocab_size", 2**31, 2**31 - 1),
    ],
)
def test_key_of_config_json(key, wrong, right):
    read_config(CONFIG | {key: right})
    with pytest.raises(ValueError, match=rf"^models\.load: config\.json has {key} .*, expected "):
        read_config(CONFIG | {key: wrong})


@pytest.mark.parametrize(
    ("key", "wrong", "right"),
    [
        ("factor", float("inf"), 1),
        ("factor", "2", 2.0),
        ("rope_theta", 1.0, 1.5),
        ("rope_theta", "10000", 10000),
        ("rope_theta", [], None),
        ("truncate", 1, True),
    ],
)
def test_key_of_a_rope(key, wrong, right):
    yarn = {"rope_type": "yarn", "factor": 4.0}
    read_config(CONFIG | {"rope_parameters": yarn | {key: right}})
    with pytest.raises(ValueError, match=rf"^models\.load: config\.json has {key} .*, expected "):
        read_config(CONFIG | {"rope_parameters": yarn | {key: wrong}})


def test_no_experts_at_all():
    assert read_config(CONFIG | {"num_local_experts": 0})[1].sparse_layers == (False, False)


def test_activation_that_is_no_name():
    read_config(CONFIG | {"hidden_act": "swish"})
    with pytest.raises(NotImplementedError, match=r"models\.load: .* hidden_act \['silu'\]"):
        read_config(CONFIG | {"hidden_act": ["silu"]})


def test_flag_that_is_null_is_false_where_false_is_the_default():
    qwen2 = CONFIG | {
        "model_type": "qwen2_moe",
        "architectures": ["Qwen2MoeForCausalLM"],
        "shared_expert_intermediate_size": 8,
    }
    assert not read_config(qwen2 | {"tie_word_embeddings": None})[1].tie_word_embeddings
    assert read_config(qwen2)[1].qkv_bias
    with pytest.raises(ValueError, match="qkv_bias None, expected true or false"):
        read_config(qwen2 | {"qkv_bias": None})


def test_json_that_python_could_not_print():
    assert parse_object(json.dumps({"a": 10**999}), "here")["a"] == 10**999
    with pytest.raises(ValueError, match="here: a number has 1001 digits, expected at most 1000"):
        parse_object(json.dumps({"a": 10**1000}), "here")
    assert parse_object(json.dumps({"a": nested(99)}), "here")
    with pytest.raises(ValueError, match="here: values are nested more than 100 deep"):
        parse_object(json.dumps({"a": nested(100)}), "here")


def with_extra(path, **entry):
    """The checkpoint of one linear, and in its header one more tensor, of no bytes."""
    checkpoint = write(path, {MODULE: linear()}, quantization())

    def add(header):
        end = max(tensor["data_offsets"][1] for tensor in header.values())
        header["extra"] = {"dtype": "F32", "data_offsets": [end, end], **entry}

    edit_header(checkpoint / "model.safetensors", add)
    return checkpoint


@pytest.mark.parametrize(
    ("right", "wrong"),
    [([0] + [1] * 31, [0] + [1] * 32), ([0, 2**56], [0, 2**56 + 1]), ([0], [2**3000] * 32)],
)
def test_shape_that_numpy_could_not_hold(tmp_path, right, wrong):
    with open_checkpoint(with_extra(tmp_path / "right", shape=right)) as checkpoint:
        assert checkpoint.tensor("extra").shape == tuple(right)
    with pytest.raises(
        ValueError, match=r"tensor extra: shape is .*, expected at most 32 axes and"
    ):
        open_checkpoint(with_extra(tmp_path / "wrong", shape=wrong))


@pytest.mark.parametrize("pattern", ["a{99999999999}", "(" * 900])
def test_pattern_that_does_not_compile(tmp_path, pattern):
    config = quantization(dynamic={pattern: {"bits": 8}})
    with pytest.raises(ValueError, match=r"open_checkpoint: .* is not a regular expression"):
        open_checkpoint(write(tmp_path / "wrong", {MODULE: linear()}, config))
    config = quantization(dynamic={"a{9}": {"bits": 8}})
    assert open_checkpoint(write(tmp_path / "right", {MODULE: linear()}, config)).has(MODULE)


def test_tensor_name_of_digits_without_end(tmp_path):
    name = "9" * 5000
    checkpoint = open_checkpoint(
        write(tmp_path, {MODULE: linear(), name: linear()}, quantization())
    )
    assert set(checkpoint.modules) == {MODULE, name}


def test_more_experts_than_modules(tmp_path):
    for file in bundled_checkpoint().iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    write_json(tmp_path / "config.json", CONFIG | {"num_local_experts": 10**9})
    with pytest.raises(ValueError, match=r"models\.load: config\.json has 1000000000 experts"):
        models.load(tmp_path)


def test_index_with_a_file_name_that_no_system_has(tmp_path):
    names = {255: "download them", 256: "expected a plain file name of at most 255 bytes"}
    for length, message in names.items():
        path = write(tmp_path / str(length), {MODULE: linear()}, quantization())
        weight_map = {"weight_map": {"a": "x" * length}}
        write_json(path / "model.safetensors.index.json", weight_map)
        with pytest.raises(ValueError, match=rf"^open_checkpoint: .*{message}"):
            open_checkpoint(path)


@pytest.mark.parametrize("dtype", [[], {"names": ["a"]}, "bf" + "9" * 5000, "f4,f4", 4])
def test_dtype_that_is_no_name(tmp_path, dtype):
    for file in bundled_checkpoint().iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    write_json(tmp_path / "config.json", CONFIG | {"dtype": dtype})
    with pytest.raises(ValueError, match=r"^models\.load: config\.json's dtype is .*, expected"):
        models.load(tmp_path)
    assert models.load(tmp_path, "float16").dtype == "float16"
