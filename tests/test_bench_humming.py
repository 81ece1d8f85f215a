"""The benchmark's peer Humming: its clock, its records, and that its errors end nothing."""

import contextlib
import json
import signal
import types

import jax.numpy as jnp
import numpy as np
import pytest

from jax_marlin.bench import __main__ as bench
from jax_marlin.bench import baselines, humming, markdown, measure
from jax_marlin.bench.problems import Quantization

FLOAT32 = Quantization(4, 64, jnp.dtype("float32"))
FAST = ["--calls", "2", "--runs", "1", "--bandwidth", "100", "--tflops", "2"]


class FakeHumming:
    """A peer that computes nothing: 3 ns for 1 token, and no more than that."""

    closed = 0

    def __init__(self, shape, quantization, copies):
        if shape.name == "tiny.down":
            raise OSError("no compiler")
        assert quantization == Quantization(4, 64, jnp.dtype("float32")) and copies == 2

    def microseconds(self, batch, expected_us, runs):
        assert expected_us > 0
        if batch.topk_ids[0].shape[0] > 1:
            raise RuntimeError("too many rows")
        return {"indexed": 4e-3, "grouped": 3e-3}

    def close(self):
        FakeHumming.closed += 1


def test_peer_is_recorded_and_its_errors_are_text(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(humming, "Humming", FakeHumming)
    monkeypatch.setattr(humming, "why_not", lambda quantization: None)
    monkeypatch.setattr(humming, "version", lambda: "humming-kernels 0")
    monkeypatch.setattr(measure, "microseconds", lambda *_, **__: 5.0)
    monkeypatch.setattr(baselines, "microseconds", lambda *_, **__: 7.0)
    file, plot, page = tmp_path / "a.json", tmp_path / "a.png", tmp_path / "a.md"
    page.write_text(f"before\n{markdown.BEGIN}\nold\n{markdown.END}\nafter\n")
    names = ["tiny.gate_up", "tiny.down", "tiny.layer"]
    argv = ["--shapes", *names, "--rows", "1", "3", "--group-size", "64", *FAST]
    argv += ["--json", str(file), "--plot", str(plot), "--markdown", str(page)]
    assert bench.main(argv) == 0
    saved = json.loads(file.read_text())
    records = {(r["problem"], r["rows"]): r for r in saved["records"]}
    assert saved["conditions"]["humming"] == "humming-kernels 0"
    one, three = records["tiny.gate_up", 1], records["tiny.gate_up", 3]
    assert (one["humming_us"], one["humming_mode"], one["humming_error"]) == (3e-3, "grouped", None)
    assert (one["best_peer"], one["best_peer_us"]) == ("humming", 3e-3)
    assert one["of_best_peer"] == pytest.approx(3e-3 / 5)
    assert three["humming_us"] is None and three["humming_error"] == "RuntimeError: too many rows"
    assert three["best_peer"] == "xla" and three["best_peer_us"] == three["xla_us"] == 7
    assert records["tiny.down", 3]["humming_error"] == "OSError: no compiler"
    assert records["tiny.layer", 1]["humming_error"] is None  # Humming has no such operation
    assert all(r["us"] == 5 and r["error"] is None for r in records.values())
    assert "tiny.down: Humming: OSError: no compiler" in capsys.readouterr().out
    text = page.read_text()
    assert text.startswith(f"before\n{markdown.BEGIN}\n") and "old" not in text
    assert text.endswith(f"{markdown.END}\nafter\n")
    (row,) = [line for line in text.splitlines() if line.startswith("| tiny.gate_up")]
    assert f"192 × 256, 2 of 6 experts | {one['us']:.1f} µs, " in row
    assert plot.stat().st_size > 0 and FakeHumming.closed == 1


def test_why_not_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(humming.importlib.util, "find_spec", lambda name: name == "torch" or None)
    assert humming.why_not(FLOAT32) == "humming-kernels is not installed"
    monkeypatch.setattr(humming.importlib.util, "find_spec", lambda name: name)
    assert humming.why_not(FLOAT32) == "JAX runs on cpu"


def test_attempt_lets_other_errors_through():
    assert humming.attempt(lambda x: x, 3) == (3, None)
    with pytest.raises(KeyboardInterrupt):
        humming.attempt(signal.raise_signal, signal.SIGINT)


class FakeTorch:
    """A device whose clock runs only in replays: 6 us for each call of the graph."""

    def __init__(self):
        self.cuda, self.now, self.captured = self, 0.0, None
        self.Event = lambda enable_timing: FakeEvent(self)

    def Stream(self):
        return types.SimpleNamespace(wait_stream=lambda stream: None)

    def current_stream(self):
        return None

    def synchronize(self):
        pass

    def stream(self, stream):
        return contextlib.nullcontext()

    def CUDAGraph(self):
        return self

    @contextlib.contextmanager
    def graph(self, graph):
        self.captured = []
        yield

    def run(self, call):
        if self.captured is not None:
            self.captured.append(call)

    def replay(self):
        self.now += 6e-3 * len(self.captured or [])


class FakeEvent:
    def __init__(self, torch):
        self.torch, self.at = torch, 0.0

    def record(self):
        self.at = self.torch.now

    def synchronize(self):
        pass

    def elapsed_time(self, end):  # milliseconds
        return end.at - self.at


def test_a_peers_time_is_that_of_one_call_of_replayed_graphs():
    torch = FakeTorch()
    assert humming._graph_microseconds(torch, torch.run, 4, 5, 3) == pytest.approx(6)
    assert torch.captured == [0, 1, 2, 3]
    assert torch.now == pytest.approx(6e-3 * 4 * 5 * (humming._WARM_UP + 3))


def test_aligned_by_hand():
    slots, experts = humming.aligned(np.array([[2, 0], [2, 1], [0, 2]]), 2)
    assert slots.tolist() == [1, 4, 3, 6, 0, 2, 5, 6] and experts.tolist() == [0, 1, 2, 2]
