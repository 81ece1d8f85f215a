"""The benchmark's routings: who is chosen how often, what a call touches, what is recorded."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_marlin.bench import __main__ as bench
from jax_marlin.bench import markdown, measure, report
from jax_marlin.bench.check import check
from jax_marlin.bench.floor import Ceilings
from jax_marlin.bench.problems import ROTATION_BYTES, Problem, Quantization
from jax_marlin.bench.routings import ROUTINGS, random_routes, touched_experts
from jax_marlin.bench.shapes import SHAPES, Shape

FLOAT32 = Quantization(4, 64, jnp.dtype("float32"))
FAST = ["--calls", "2", "--runs", "1", "--bandwidth", "100", "--tflops", "2", "--no-peers"]
QWEN, MIXTRAL = SHAPES["qwen3-30b.layer"], SHAPES["mixtral-8x7b.layer"]


def draw(shape: Shape, rows: int, routing: str, seed: int = 3) -> np.ndarray:
    weights, ids = random_routes(jax.random.key(seed), rows, shape, routing)
    assert weights.shape == ids.shape == (rows, shape.top_k)
    assert weights.dtype == jnp.float32 and ids.dtype == jnp.int32
    weights, ids = np.asarray(weights), np.asarray(ids)
    assert (weights > 1e-6).all() and np.allclose(weights.sum(1), 1, atol=1e-5)
    assert all(len(set(row)) == shape.top_k for row in ids.tolist())
    assert ids.min() >= 0 and ids.max() < shape.experts
    assert np.unique(ids).size <= touched_experts(shape, rows, routing)
    return ids


@pytest.mark.parametrize("shape", [QWEN, MIXTRAL, SHAPES["tiny.layer"]], ids=lambda s: s.name)
@pytest.mark.parametrize("rows", [1, 2, 77])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_experts_of_a_token_are_distinct(routing, rows, shape):
    draw(shape, rows, routing)


def test_uniform_experts_are_as_likely():
    counts = np.bincount(draw(QWEN, 4096, "uniform").ravel(), minlength=128)
    expected = 4096 * 8 / 128
    assert np.abs(counts - expected).max() < 6 * math.sqrt(expected)


def test_zipf_experts_are_chosen_by_their_rank():
    one_each = Shape("one", "moe", 64, 64, experts=32, top_k=1)
    rows = 40000
    counts = np.sort(np.bincount(draw(one_each, rows, "zipf").ravel(), minlength=32))[::-1]
    ranks = np.arange(1, 33)
    expected = rows / ranks / np.sum(1 / ranks)
    assert (np.abs(counts - expected) < 6 * np.sqrt(expected)).all()
    # Several experts of a token: the first has nearly every token, and the order is each call's.
    ids = [draw(QWEN, 512, "zipf", seed) for seed in (1, 2)]
    fullest = [np.bincount(i.ravel(), minlength=128) for i in ids]
    assert all(counts.max() > 0.6 * 512 for counts in fullest)
    assert fullest[0].argmax() != fullest[1].argmax()


@pytest.mark.parametrize("shape, chosen", [(QWEN, 32), (MIXTRAL, 3)])
def test_one_hot_gives_half_of_the_tokens_one_first_expert(shape, chosen):
    ids = draw(shape, 512, "one-hot")
    first, counts = np.unique(ids[:, 0], return_counts=True)
    hot = first[counts.argmax()]
    assert counts.max() == 256 and (ids[::2, 0] == hot).all() and (ids[1::2] != hot).all()
    assert np.unique(ids).size == chosen == touched_experts(shape, 512, "one-hot")
    assert len({draw(shape, 1, "one-hot", seed)[0, 0] for seed in range(20)}) > 3


def test_one_hot_of_as_many_experts_as_a_token_has():
    all_of_them = Shape("all", "moe", 64, 64, experts=4, top_k=4)
    assert (np.sort(draw(all_of_them, 9, "one-hot"), axis=1) == np.arange(4)).all()


@pytest.mark.parametrize("routing", ROUTINGS)
def test_touched_bytes_are_those_of_the_experts_chosen(routing):
    shape = SHAPES["tiny.gate_up"]  # K = 192 = 3 groups of 64, N = 256
    batch = Problem(shape, FLOAT32, 1, 3, (routing,)).batch(40, 3, routing)
    one_expert = 192 * 256 / 2 + 3 * 256 * 4
    chosen = np.mean([np.unique(ids).size for ids in batch.topk_ids])
    assert batch.touched_bytes() == pytest.approx(chosen * one_expert)
    assert (chosen == 3) == (routing == "one-hot")


def test_fewer_experts_touched_are_more_copies_and_more_calls(monkeypatch):
    shape = Shape("wide", "moe", 1024, 2048, experts=64, top_k=4)  # 1 MiB an expert
    monkeypatch.setattr("jax_marlin.bench.problems.random_stack", lambda *_: None)
    copies = [
        Problem(shape, FLOAT32, 512, 99, routings).copies
        for routings in (("uniform",), ("uniform", "one-hot"))
    ]
    assert copies == [math.ceil(ROTATION_BYTES / 2**26), math.ceil(ROTATION_BYTES / 2**24)]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    options = measure.Options(FLOAT32, None, 1, baseline=False)
    mixtral, ceilings = SHAPES["mixtral-8x7b.down"], Ceilings(3e12, 7e14)
    # 8 experts of 29 MB: 78 us; 3: 29 us
    assert options.calls_for(mixtral, 16, ceilings) == 13
    assert options.calls_for(mixtral, 16, ceilings, "one-hot") == 35


@pytest.mark.parametrize("name", ["tiny.down", "tiny.layer"])
def test_one_hot_results_are_checked(name):
    batch = Problem(SHAPES[name], FLOAT32, 5, 1, ("one-hot",)).batch(5, 1, "one-hot")
    assert check(SHAPES[name], batch, seed=1) < 1e-3


def test_command_measures_each_routing_once(tmp_path, capsys, monkeypatch):
    file, plot, page = tmp_path / "a.json", tmp_path / "a.png", tmp_path / "a.md"
    argv = ["--shapes", "tiny.dense", "tiny.gate_up", "--rows", "9", "2", *FAST, "--no-baseline"]
    argv += ["--routing", "one-hot", "uniform", "one-hot", "--json", str(file)]
    monkeypatch.setattr(measure, "microseconds", lambda *_, **__: 3.0)
    titles = []
    title = report._title
    monkeypatch.setattr(report, "_title", lambda record: titles.append(title(record)) or titles[-1])
    assert bench.main([*argv, "--plot", str(plot), "--markdown", str(page)]) == 0
    records = json.loads(file.read_text())["records"]
    assert [(r["problem"], r["routing"], r["rows"]) for r in records] == [
        ("tiny.dense", None, 2), ("tiny.dense", None, 9),
        ("tiny.gate_up", "one-hot", 2), ("tiny.gate_up", "one-hot", 9),
        ("tiny.gate_up", "uniform", 2), ("tiny.gate_up", "uniform", 9),
    ]  # fmt: skip
    assert all(r["us"] == 3 and r["error"] is None for r in records)
    assert records[3]["packed_bytes"] < records[5]["packed_bytes"]
    assert set(titles) == {"tiny.dense", "tiny.gate_up", "tiny.gate_up, one-hot"}
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[-6:]]
    assert [line[2] for line in lines] == ["-", "-", "one-hot", "one-hot", "uniform", "uniform"]
    cells = [line for line in page.read_text().splitlines() if line.startswith("| tiny")]
    assert len(cells) == 2 and f"| {records[4]['us']:.1f} µs, " in cells[1]
    assert page.read_text().startswith(markdown.BEGIN) and plot.stat().st_size > 0


def test_a_table_without_uniform_routing_is_refused(tmp_path, capsys):
    page = tmp_path / "a.md"
    argv = ["--shapes", "tiny.down", *FAST, "--routing", "zipf", "--markdown", str(page)]
    assert bench.main(argv) == 1
    assert "shows uniform routing, got --routing zipf; add uniform" in capsys.readouterr().err
    assert not page.exists()
