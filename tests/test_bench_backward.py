"""The benchmark of the backward pass: gradients of what is timed, and no time for wrong ones."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_marlin.bench import backward
from jax_marlin.bench.problems import Problem, Quantization
from jax_marlin.bench.shapes import SHAPES
from jax_marlin.ops.moe_ffn import moe_ffn

BFLOAT16 = Quantization(4, 64, jnp.dtype("bfloat16"))


def test_command_reports_the_backward_pass_against_the_forward_one(tmp_path, capsys):
    file = tmp_path / "a.json"
    argv = ["--shapes", "tiny.dense", "tiny.down", "--rows", "3", "2", "--runs", "1"]
    assert backward.main([*argv, "--json", str(file)]) == 0
    saved = json.loads(file.read_text())
    assert saved["conditions"]["jax"] == jax.__version__
    assert [(r["problem"], r["rows"]) for r in saved["records"]] == [
        ("tiny.dense", 2), ("tiny.dense", 3)  # a product of experts has no record
    ]  # fmt: skip
    for r in saved["records"]:
        assert r["error"] is None and min(r["forward_us"], r["both_us"]) > 0
        assert r["ratio"] == pytest.approx(r["both_us"] / r["forward_us"])
    assert capsys.readouterr().out.splitlines()[-1].split()[:2] == ["tiny.dense", "3"]


def test_gradients_of_a_layer_are_those_of_x_and_the_router_weights():
    batch = Problem(SHAPES["tiny.layer"], BFLOAT16, 5, 1).batch(5, 1)
    x, ids, weights, *stacks = batch.operands[0]
    result, d_x, d_weights = backward.with_gradients(SHAPES["tiny.layer"], batch)(
        x, ids, weights, *stacks
    )
    expected, pull_back = jax.vjp(lambda x, weights: moe_ffn(x, ids, weights, *stacks), x, weights)
    for got, own in zip((d_x, d_weights), pull_back(result), strict=True):
        np.testing.assert_array_equal(got.astype(jnp.float32), own.astype(jnp.float32))
    np.testing.assert_array_equal(result.astype(jnp.float32), expected.astype(jnp.float32))


def wrong(x, stack, copy):
    """A product whose gradient is half of what it is."""
    y = jnp.asarray(x @ stack[copy].dequantize(x.dtype))
    return (y + jax.lax.stop_gradient(y)) / 2 if x.dtype == jnp.bfloat16 else y


def test_wrong_gradients_are_not_timed(monkeypatch):
    monkeypatch.setattr("jax_marlin.bench.problems._matmul", wrong)
    monkeypatch.setattr(backward, "microseconds", None)  # not to be called
    (record,) = backward.measure(SHAPES["tiny.dense"], [5], BFLOAT16, runs=1)
    assert "tiny.dense: gradients are off by up to" in record["error"]
    assert record["both_us"] is None and record["ratio"] is None


def test_gradients_in_16_bit_pass_the_check(monkeypatch):
    monkeypatch.setattr(backward, "microseconds", lambda *_, **__: 3.0)
    (record,) = backward.measure(SHAPES["tiny.layer"], [5], BFLOAT16, runs=1)
    assert record["error"] is None and 1e-4 < record["deviation"] < 0.1
