"""The benchmark of whole models: floors by hand, checks that can fail, its records."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from jax_marlin import MarlinExpertStack, cli
from jax_marlin.bench import model_floor
from jax_marlin.bench.check import WrongResultError
from jax_marlin.bench.model_check import check_model
from jax_marlin.bench.problems import Quantization
from jax_marlin.bench.random_model import CONFIGS, random_model
from jax_marlin.models.decoder_layer import SparseMlp
from jax_marlin.models.layers import DenseLinear

GROUP = 32
# the shapes of CONFIGS["tiny"], in words of the config
LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, EXPERTS, TOP_K, INNER, VOCAB = (
    3,
    128,
    4,
    2,
    64,
    8,
    2,
    64,
    512,
)


def tiny(dtype="float32", **options):
    return random_model("tiny", Quantization(4, GROUP, jnp.dtype(dtype)), **options)


def packed_bytes(k, n, scale_bytes=4):
    return k * n / 2 + k / GROUP * n * scale_bytes


def attention_shapes():
    queries, keys = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    return [(HIDDEN, queries), (HIDDEN, keys), (HIDDEN, keys), (queries, HIDDEN)]


def test_weight_bytes_by_hand():
    attention = sum(packed_bytes(k, n) for k, n in attention_shapes())
    norms, router = 4 * (2 * HIDDEN + 2 * HEAD_DIM), 4 * HIDDEN * EXPERTS
    expert = packed_bytes(HIDDEN, 2 * INNER) + packed_bytes(INNER, HIDDEN)
    head = 4 * (HIDDEN * VOCAB + HIDDEN)
    for tokens, touched in [(1, 2), (2, 8 * (1 - 0.75**2))]:
        expected = LAYERS * (attention + norms + router + touched * expert) + head
        # An expert index, int32, beside each packed linear.
        assert model_floor.weight_bytes(tiny(), tokens) == pytest.approx(expected, abs=100)


def test_cache_bytes_and_prefill_flops_by_hand():
    model = tiny()
    assert model_floor.cache_bytes(model, 3, 10) == LAYERS * 3 * 10 * KV_HEADS * HEAD_DIM * 2 * 4
    weights = (
        sum(k * n for k, n in attention_shapes()) + HIDDEN * EXPERTS + TOP_K * 3 * HIDDEN * INNER
    )
    pairs = 7 * 8 / 2 * HEADS * HEAD_DIM * 2  # of a query with a key, and of a weight with a value
    per_sequence = 2 * (7 * LAYERS * weights + LAYERS * pairs + HIDDEN * VOCAB)
    assert model_floor.prefill_flops(model, 5, 7) == pytest.approx(5 * per_sequence)


def test_random_model_is_packed_as_checkpoints_are():
    model = tiny("bfloat16")
    mlp = model.layers[1].mlp
    assert isinstance(mlp, SparseMlp) and isinstance(mlp.gate_up, MarlinExpertStack)
    assert isinstance(mlp.gate, DenseLinear) and isinstance(model.lm_head, DenseLinear)
    assert model.dtype == jnp.bfloat16 and model.lm_head.weight.dtype == jnp.bfloat16
    assert not isinstance(tiny(quantized_lm_head=True).lm_head, DenseLinear)
    assert isinstance(mlp.down, MarlinExpertStack)
    assert not (mlp.down.qweight[0] == mlp.down.qweight[1]).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_check_passes(dtype):
    deviations = check_model(tiny(dtype, quantized_lm_head=True))
    assert 0 <= min(deviations.values()) and max(deviations.values()) < 0.1


def test_check_refuses_nan_and_a_cache_that_is_not_read():
    model = tiny()
    norm = model.norm.at[5].set(jnp.nan)
    with pytest.raises(WrongResultError, match="not finite"):
        check_model(dataclasses.replace(model, norm=norm))

    class Forgetful(type(model)):
        def extend(self, input_ids, cache, lengths=None, *, empty=False):
            cache = dataclasses.replace(cache, layers=jax.tree.map(jnp.zeros_like, cache.layers))
            return super().extend(input_ids, cache, lengths, empty=empty)

    jax.tree_util.register_dataclass(
        Forgetful, [f.name for f in dataclasses.fields(model)][:-1], ["config"]
    )
    fields = {f.name: getattr(model, f.name) for f in dataclasses.fields(model)}
    with pytest.raises(WrongResultError, match="deviate"):
        check_model(Forgetful(**fields))


def test_command_writes_records(tmp_path, capsys):
    file = tmp_path / "a.json"
    argv = ["--batch", "1", "3", "--context", "5", "9", "--prompt", "11", "--new-tokens", "3"]
    argv += ["--runs", "1", "--group-size", "64", "--bandwidth", "10", "--tflops", "0.1"]
    assert cli.main(["bench-model", *argv, "--json", str(file)]) == 0
    saved = json.loads(file.read_text())
    conditions, records = saved["conditions"], saved["records"]
    assert conditions["model"].startswith("tiny") and conditions["deviation_decode"] < 1e-3
    assert [(r["phase"], r["batch"], r["context"]) for r in records] == [
        ("prefill", 1, 11), *(("decode", b, c) for c in (5, 9) for b in (1, 3))
    ]  # fmt: skip
    for r in records:
        tokens = r["context"] if r["phase"] == "prefill" else r["batch"]
        assert r["tokens_per_s"] == pytest.approx(tokens / r["ms"] * 1e3)
        assert r["share_of_floor"] == pytest.approx(r["floor_ms"] / r["ms"])
    assert capsys.readouterr().out.splitlines()[-1].split()[:3] == ["decode", "3", "9"]


def test_unknown_model_is_refused():
    with pytest.raises(ValueError, match="no model is named 'qwen9'"):
        random_model("qwen9", Quantization(4, 64, jnp.dtype("float32")))
    assert "qwen3-30b" in CONFIGS
