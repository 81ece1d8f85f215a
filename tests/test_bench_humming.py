"""The benchmark's peer Humming: its weights, clock and records, and that its errors end nothing."""

import contextlib
import json
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from jax_marlin.bench import __main__ as bench
from jax_marlin.bench import baselines, humming, markdown, measure
from jax_marlin.bench.problems import Batch, Quantization
from jax_marlin.bench.shapes import Shape

FLOAT32 = Quantization(4, 64, jnp.dtype("float32"))
FAST = ["--calls", "2", "--runs", "1", "--bandwidth", "100", "--tflops", "2"]


class FakeHumming:
    """A peer that computes nothing: 3 ns for 1 token, and no more than that."""

    closed = 0

    def __init__(self, shape, quantization, copies, rows):
        if shape.name == "tiny.down":
            raise OSError("no compiler")
        assert quantization == Quantization(4, 64, jnp.dtype("float32")) and copies == 2
        assert rows == [1, 3]

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

    def interrupted():  # as by a signal, which a background process may ignore
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        humming.attempt(interrupted)


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


class Tensor(np.ndarray):
    """What the peer uses of torch's tensors, in numpy."""

    data = property(lambda self: self)  # an array's own is a buffer

    def roll(self, shift, axis):
        return np.roll(self, shift, axis)

    def copy_(self, other):
        self[...] = other

    def cuda(self):
        return self

    cpu = float = cuda

    def numpy(self):
        return np.asarray(self)


RNG = np.random.default_rng(0)
NUMPY_TORCH = types.SimpleNamespace(
    float32=np.float32,
    device=contextlib.nullcontext,
    from_numpy=lambda array: array.view(Tensor),
    randn=lambda *shape, device, dtype: RNG.normal(size=shape).astype(dtype).view(Tensor),
    empty=lambda *shape, device, dtype: np.full(shape, np.nan, dtype).view(Tensor),
)


class FakeLayer:
    """Humming's layer: its weights, and products by the kernel that it is told to use."""

    made = quantized = 0
    wrong = types.MappingProxyType({})  # by kind of call: how far off the expert is that is used

    def __init__(self, shape_n, shape_k, num_experts, torch_dtype, weight_config):
        assert weight_config == {"dtype": "int4", "group_size": 64}
        FakeLayer.made += 1
        stack = (shape_n, shape_k) if num_experts is None else (num_experts, shape_n, shape_k)
        self.weight = np.zeros(stack, torch_dtype).view(Tensor)
        self.weight_schema, self.humming_config = self, None

    def quant_tensor(self, weight, schema, dtype):
        FakeLayer.quantized += 1
        return {"weight": np.round(weight * 4) / 4}

    def transform(self):
        self.humming_config = "transformed"

    def __call__(self, inputs, *, compute_config, tuning_config, **call):
        top_k = call.get("top_k", 1)
        routed = len(inputs) * top_k
        (kernel,) = (k for low, high, k in tuning_config if low < routed <= high)
        assert kernel == choose(self.humming_config, routed, compute_config["gemm_type"])
        if compute_config["gemm_type"] == "dense":
            return inputs @ self.weight.T
        if compute_config["gemm_type"] == "indexed":
            rows = np.split(call["sorted_ids"], len(call["expert_ids"]))
            assert all(len(block) == kernel["block_shape"][0] for block in rows)
            experts = call["expert_ids"]
        else:
            rows = np.split(np.arange(routed), call["expert_layout"][1:-1])
            experts = range(len(self.weight))
        wrong = self.wrong.get(compute_config["gemm_type"], 0)
        for block, expert in zip(rows, experts, strict=True):
            own = block[block < routed]
            used = self.weight[(expert + wrong) % len(self.weight)]
            call["outputs"][own] = inputs[own // top_k] @ used.T
        return call["outputs"]


def choose(layer_config, shape_m, gemm_type):
    assert layer_config == "transformed"
    return {"block_shape": (2 if shape_m < 8 else 4, 64, 64), "for": (shape_m, gemm_type)}


@pytest.fixture
def fake_package(monkeypatch):
    modules = {
        "humming.layer": types.SimpleNamespace(HummingLayer=FakeLayer),
        "humming.tune": types.SimpleNamespace(get_heuristics_config=choose),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    for count in ("made", "quantized"):
        monkeypatch.setattr(FakeLayer, count, 0)
    monkeypatch.setattr(humming, "_torch", lambda: NUMPY_TORCH)
    monkeypatch.setattr(
        humming, "_graph_microseconds",
        lambda torch, run, calls, replays, runs: len([run(call) for call in range(calls)]),
    )  # fmt: skip


def batch_of(shape, rows):
    x = np.zeros((rows * shape.top_k if shape.routed_input else rows, shape.k))
    experts = np.arange(shape.experts)
    ids = [
        np.stack([RNG.choice(experts, shape.top_k, replace=False) for _ in range(rows)])
        for _ in range(3)
    ]
    return Batch(lambda x: x, [(x,)] * 3, [], ids)


MOE = [
    Shape("a.gate_up", "moe", 64, 192, 6, 2),
    Shape("a.down", "moe", 64, 128, 6, 2, routed_input=True),
]


@pytest.mark.parametrize("shape", [Shape("a", "dense", 64, 96), *MOE], ids=lambda s: s.name)
def test_one_layer_is_prepared_and_serves_all_rows_and_modes(fake_package, shape):
    peer = humming.Humming(shape, FLOAT32, 3, [16, 1, 5])
    first, *others = [layer.weight for layer in peer.layers]
    assert len(others) == 2 and (FakeLayer.made, FakeLayer.quantized) == (1, 1)
    for index, other in enumerate(others):
        assert np.array_equal(first, other)
        assert not any(np.shares_memory(other, w) for w in [first, *others[:index]])
    modes = {"dense"} if shape.kind == "dense" else {"indexed", "grouped"}
    for rows in (1, 5, 16):
        times = peer.microseconds(batch_of(shape, rows), 1.0, 1)
        assert times == dict.fromkeys(modes, 3)
    assert (FakeLayer.made, FakeLayer.quantized) == (1, 1)


@pytest.mark.parametrize("wrong", [1, 2, 3, 5])
@pytest.mark.parametrize(
    ("mode", "gemm_type"), [("indexed", "indexed"), ("grouped", "grouped_contiguous")]
)
@pytest.mark.parametrize("shape", MOE, ids=lambda s: s.name)
def test_a_product_with_the_wrong_expert_is_not_timed(
    fake_package, monkeypatch, shape, mode, gemm_type, wrong
):
    peer = humming.Humming(shape, FLOAT32, 1, [4])
    monkeypatch.setattr(FakeLayer, "wrong", {gemm_type: wrong})
    with pytest.raises(ValueError, match=f"^{mode}: off by 1"):
        peer.microseconds(batch_of(shape, 4), 1.0, 1)
