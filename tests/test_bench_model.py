"""The benchmark of whole models: floors by hand, checks that can fail, its records."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from jax_marlin import MarlinExpertStack, cli
from jax_marlin.bench import model as bench_model
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
    2,
    128,
    4,
    2,
    64,
    8,
    2,
    64,
    512,
)
# Of the command's model, too, so that its check is compiled once.
OPTIONS = ["--group-size", str(GROUP), "--bandwidth", "10", "--tflops", "0.1", "--runs", "1"]
OPTIONS += ["--batch", "1", "3", "--context", "5", "--prompt", "11", "--new-tokens", "3"]


def tiny(dtype="float32", **options):
    return random_model("tiny", Quantization(4, GROUP, jnp.dtype(dtype)), **options)


@pytest.fixture(scope="module")
def model():
    return tiny()


def packed_bytes(k, n, scale_bytes=4):
    return k * n / 2 + k / GROUP * n * scale_bytes


def attention_shapes():
    queries, keys = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    return [(HIDDEN, queries), (HIDDEN, keys), (HIDDEN, keys), (queries, HIDDEN)]


def test_weight_bytes_by_hand(model):
    attention = sum(packed_bytes(k, n) for k, n in attention_shapes())
    norms, router = 4 * (2 * HIDDEN + 2 * HEAD_DIM), 4 * HIDDEN * EXPERTS
    expert = packed_bytes(HIDDEN, 2 * INNER) + packed_bytes(INNER, HIDDEN)
    head = 4 * (HIDDEN * VOCAB + HIDDEN)
    for tokens, touched in [(1, 2), (2, 8 * (1 - 0.75**2))]:
        expected = LAYERS * (attention + norms + router + touched * expert) + head
        # An expert index, int32, beside each packed linear.
        assert model_floor.weight_bytes(model, tokens) == pytest.approx(expected, abs=100)


def test_cache_bytes_and_prefill_flops_by_hand(model):
    assert model_floor.cache_bytes(model, 3, 10) == LAYERS * 3 * 10 * KV_HEADS * HEAD_DIM * 2 * 4
    weights = (
        sum(k * n for k, n in attention_shapes()) + HIDDEN * EXPERTS + TOP_K * 3 * HIDDEN * INNER
    )
    pairs = 7 * 8 / 2 * HEADS * HEAD_DIM * 2  # of a query with a key, and of a weight with a value
    per_sequence = 2 * (7 * LAYERS * weights + LAYERS * pairs + HIDDEN * VOCAB)
    assert model_floor.prefill_flops(model, 5, 7) == pytest.approx(5 * per_sequence)


def test_random_model_is_packed_as_checkpoints_are(model):
    mlp = model.layers[1].mlp
    assert isinstance(mlp, SparseMlp) and isinstance(mlp.gate_up, MarlinExpertStack)
    assert isinstance(mlp.gate, DenseLinear) and isinstance(model.lm_head, DenseLinear)
    assert model.dtype == jnp.float32 and model.lm_head.weight.dtype == jnp.float32
    assert isinstance(mlp.down, MarlinExpertStack)
    assert not (mlp.down.qweight[0] == mlp.down.qweight[1]).all()


def test_check_passes_in_16_bit_and_with_a_packed_head():
    model = tiny("bfloat16", quantized_lm_head=True)
    assert model.dtype == jnp.bfloat16 and not isinstance(model.lm_head, DenseLinear)
    deviations = check_model(model)
    assert 1e-6 < deviations["deviation_reference"] < 0.05 and deviations["deviation_decode"] < 0.1


def test_check_refuses_nan_and_a_cache_that_is_not_read(model):
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


def test_command_writes_each_record_at_once(tmp_path, monkeypatch, capsys):
    file, seen = tmp_path / "a.json", []
    measure = bench_model._measure

    def watched(model, ceilings, args):
        for record in measure(model, ceilings, args):
            yield record
            # Asked for the next one, the command has printed and saved this one.
            printed, saved = capsys.readouterr().out, json.loads(file.read_text())
            seen.append((printed.splitlines()[-1].split()[:3], len(saved["records"])))

    monkeypatch.setattr(bench_model, "_measure", watched)
    assert cli.main(["bench-model", *OPTIONS, "--json", str(file)]) == 0
    assert seen == [
        (["prefill", "1", "11"], 1), (["decode", "1", "5"], 2), (["decode", "3", "5"], 3)
    ]  # fmt: skip
    saved = json.loads(file.read_text())
    conditions, records = saved["conditions"], saved["records"]
    assert conditions["model"].startswith("tiny") and conditions["deviation_decode"] < 1e-3
    for r in records:
        tokens = r["context"] if r["phase"] == "prefill" else r["batch"]
        assert r["tokens_per_s"] == pytest.approx(tokens / r["ms"] * 1e3)
        assert r["share_of_floor"] == pytest.approx(r["floor_ms"] / r["ms"])
        assert r["error"] is None


def test_a_batch_that_does_not_fit_is_an_error_of_its_record(tmp_path, monkeypatch, capsys):
    built = []
    random = bench_model.random_model
    monkeypatch.setattr(
        bench_model, "random_model", lambda *a, **k: built.append(a) or random(*a, **k)
    )
    monkeypatch.setattr(bench_model, "check_model", lambda model: {})
    monkeypatch.setattr(bench_model, "_prefill", lambda model, *_: (0.5, 0.25, 11))

    def decode(model, batch, *_):
        if batch == 1:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: too much\nmore")
        return 0.5, 0.25, batch

    monkeypatch.setattr(bench_model, "_decode", decode)
    file = tmp_path / "a.json"
    assert bench_model.main([*OPTIONS, "--json", str(file)]) == 1
    records = json.loads(file.read_text())["records"]
    assert [r["error"] for r in records] == [None, "RESOURCE_EXHAUSTED: too much", None]
    assert [r["ms"] for r in records] == [500, None, 500] and len(built) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].split()[:5] == ["decode", "1", "5", "-", "-"]


def test_unknown_model_is_refused():
    with pytest.raises(ValueError, match="no model is named 'qwen9'"):
        random_model("qwen9", Quantization(4, 64, jnp.dtype("float32")))
    assert "qwen3-30b" in CONFIGS
