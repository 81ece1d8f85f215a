"""The benchmark: floors by hand, a record for each case, no time for a wrong result, its files."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_marlin import cli
from jax_marlin.bench import __main__ as bench
from jax_marlin.bench import markdown, measure, problems, report, schedule
from jax_marlin.bench.baselines import Baseline
from jax_marlin.bench.check import WrongResultError, check
from jax_marlin.bench.floor import Ceilings, floor_microseconds
from jax_marlin.bench.options import ceilings_of
from jax_marlin.bench.problems import Problem, Quantization
from jax_marlin.bench.shapes import SHAPES, select

FLOAT32 = Quantization(4, 64, jnp.dtype("float32"))
FAST = ["--calls", "2", "--runs", "1", "--bandwidth", "100", "--tflops", "2"]
TINY = [shape.name for shape in select(["tiny"])]


def garbage(x, *_):
    return jnp.ones((5, 192), x.dtype)


def test_floor_by_hand():
    ceilings = Ceilings(bandwidth=2e12, flops=5e14)
    assert floor_microseconds(8e6, 1e9, ceilings) == (pytest.approx(4.0), "bandwidth")
    assert floor_microseconds(8e6, 1e10, ceilings) == (pytest.approx(20.0), "compute")


def test_flops_and_experts_by_hand():
    layer, down = SHAPES["qwen3-30b.layer"], SHAPES["mixtral-8x7b.down"]
    assert layer.flops(3) == 3 * 8 * 2 * (2048 * 1536 + 768 * 2048)
    assert down.flops(5) == 5 * 2 * 2 * 14336 * 4096
    assert (layer.touched_experts(3), layer.touched_experts(99)) == (24, 128)
    assert SHAPES["dense.4096x12288"].flops(7) == 2 * 7 * 4096 * 12288


def test_select_knows_sets_and_parts():
    assert [s.name for s in select(["tiny.down", "tiny"])] == ["tiny.down", *(
        name for name in TINY if name != "tiny.down"
    )]  # fmt: skip
    assert all(k % 64 == 0 and n % 64 == 0 for s in SHAPES.values() for k, n in s.linears)
    with pytest.raises(ValueError, match=r"no problem is named 'qwen9'.*mixtral-8x7b"):
        select(["tiny", "qwen9"])


def test_touched_bytes_count_each_expert_once():
    shape = SHAPES["tiny.gate_up"]  # K = 192 = 3 groups of 64, N = 256
    batch = Problem(shape, FLOAT32, fewest_rows=1, calls=3).batch(1, 3)
    one_expert = 192 * 256 / 2 + 3 * 256 * 4
    assert batch.touched_bytes() == shape.top_k * one_expert


@pytest.mark.parametrize("name", TINY)
def test_calls_use_other_copies_and_routings(name):
    problem = Problem(SHAPES[name], FLOAT32, fewest_rows=5, calls=3)
    batch = problem.batch(5, 3)
    assert problem.copies == len(batch.operands) == 3  # tiny weights never fill an L2
    flat = [
        np.concatenate([np.ravel(i), [id(s[0])]])
        for i, s in zip(batch.topk_ids, batch.stacks, strict=True)
    ]
    assert len({row.tobytes() for row in flat}) == 3


@pytest.mark.parametrize(
    "name, bits, dtype",
    [("tiny.dense", 8, "float16"), ("tiny.down", 4, "float16"), ("tiny.layer", 4, "bfloat16")],
)
def test_check_passes_in_16_bit(name, bits, dtype):
    quantization = Quantization(bits, -1, jnp.dtype(dtype))
    batch = Problem(SHAPES[name], quantization, fewest_rows=5, calls=1).batch(5, 1)
    assert 0 < check(SHAPES[name], batch, seed=1) < 0.03


def test_check_refuses_another_expert_and_nan():
    shape = SHAPES["tiny.gate_up"]
    batch = Problem(shape, FLOAT32, fewest_rows=5, calls=1).batch(5, 1)
    x, stack, slots, experts, used = batch.operands[0]
    shifted = jnp.where(experts >= 0, (experts + 1) % shape.experts, -1)
    batch.operands[0] = (x, stack, slots, shifted, used)
    with pytest.raises(WrongResultError, match=r"tiny.gate_up: sampled elements are off"):
        check(shape, batch, seed=2)
    batch.operands[0] = (x.at[4].set(jnp.nan), stack, slots, experts, used)
    with pytest.raises(WrongResultError, match="not finite"):
        check(shape, batch, seed=2)


def test_command_writes_records_and_plot(tmp_path, capsys):
    file, plot = tmp_path / "a.json", tmp_path / "a.png"
    argv = ["bench", "--shapes", "tiny.gate_up", "tiny.dense", "--rows", "3", "1", *FAST]
    assert cli.main([*argv, "--no-baseline", "--json", str(file), "--plot", str(plot)]) == 0
    saved = json.loads(file.read_text())
    assert saved.keys() == {"conditions", "records"}
    conditions, records = saved["conditions"], saved["records"]
    assert conditions["jax"] == jax.__version__ and conditions["dtype"] == "float32"
    assert conditions["floor_from"] == "given bandwidth, given flops"
    assert [(r["problem"], r["rows"]) for r in records] == [
        (name, rows) for name in ("tiny.gate_up", "tiny.dense") for rows in (1, 3)
    ]
    for r in records:
        assert r["us"] > 0 and r["deviation"] < 1e-3 and r["error"] is None and r["xla_us"] is None
        assert r["share_of_floor"] == pytest.approx(r["floor_us"] / r["us"])
        assert r["gb_per_s"] == pytest.approx(r["packed_bytes"] / r["us"] / 1e3)
        assert r["floor_us"] == pytest.approx(max(r["packed_bytes"] / 1e5, r["flops"] / 2e6))
    assert plot.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["device", conditions["device"]]
    assert printed[-1].split()[:2] == ["tiny.dense", "3"]


def test_command_does_not_time_a_wrong_result(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(problems, "_matmul", garbage)
    monkeypatch.setattr(measure, "microseconds", None)  # not to be called
    file = tmp_path / "a.json"
    argv = ["--shapes", "tiny.dense", "--rows", "5", *FAST, "--json", str(file)]
    assert bench.main(argv) == 1
    (record,) = json.loads(file.read_text())["records"]
    assert "tiny.dense: sampled elements are off" in record["error"]
    assert record["us"] is None and record["xla_us"] is None
    printed = capsys.readouterr()
    assert "tiny.dense rows 5: tiny.dense: sampled" in printed.out
    assert "1 of 1 cases failed" in printed.err


@pytest.mark.parametrize("name", TINY)
def test_baseline_runs_and_respects_memory(name, monkeypatch):
    shape = SHAPES[name]
    batch = Problem(shape, FLOAT32, fewest_rows=5, calls=1).batch(5, 1)
    time = Baseline(shape, FLOAT32.dtype, 5, 1).microseconds(batch, runs=1)
    assert time is not None and time > 0
    monkeypatch.setattr("jax_marlin.bench.baselines._free_bytes", lambda: 1e4)
    assert Baseline(shape, FLOAT32.dtype, 5, 1).microseconds(batch, runs=1) is None


def untimed(name, rows, **known):
    fields = [*report._COLUMNS, "error", "humming_error", "kind", "k", "n", "best_peer"]
    return {**dict.fromkeys(fields), "problem": name, "rows": rows, "kind": "dense", **known}


def test_interrupted_run_keeps_what_it_has(tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        yield untimed("tiny.dense", 1, us=2.0, share_of_floor=0.5, floor_us=1.0)
        raise KeyboardInterrupt

    monkeypatch.setattr(schedule, "measure", interrupted)
    file, plot, page = tmp_path / "a.json", tmp_path / "a.png", tmp_path / "a.md"
    argv = ["--shapes", "tiny.dense", "--rows", "1", "2", *FAST, "--markdown", str(page)]
    with pytest.raises(KeyboardInterrupt):
        bench.main([*argv, "--json", str(file), "--plot", str(plot)])
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1].split()[:4] == ["tiny.dense", "1", "-", "2.0"]
    assert ["not_measured", "tiny.dense", "2"] in [line.split() for line in printed]
    saved = json.loads(file.read_text())
    assert len(saved["records"]) == 1 and saved["conditions"]["not_measured"] == "tiny.dense 2"
    assert plot.stat().st_size > 0 and "2.0 µs, 50 %" in page.read_text()


def test_a_run_out_of_time_names_what_is_missing(tmp_path, monkeypatch, capsys):
    def slow(shape, rows, *_):
        for count in rows:
            monkeypatch.setattr(schedule.time, "monotonic", lambda: 1e12)
            yield untimed(shape.name, count)

    monkeypatch.setattr(schedule, "measure", slow)
    argv = ["--shapes", "tiny.dense", "dense.8192x8192", "--rows", "1", "2", *FAST]
    assert bench.main([*argv, "--max-seconds", "60"]) == 0
    assert "not_measured        tiny.dense 2; dense.8192x8192 1 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--shapes", "qwen9"], "no problem is named"),
        (["--dtype", "int8"], "expected float16, bfloat16 or float32"),
        (["--group-size", "48", *FAST], "group_size is 48"),
        (["--bandwidth", "0"], "--bandwidth is 0.0, expected a positive number"),
    ],
)
def test_bad_options_end_with_their_reason(argv, message, capsys):
    assert bench.main(argv) == 1
    assert message in capsys.readouterr().err


def test_ceilings_are_measured():
    args = bench._parser().parse_args([])
    ceilings, given = ceilings_of(args, jnp.dtype("float32"))
    assert not given
    assert 1e8 < ceilings.bandwidth < 1e13 and 1e8 < ceilings.flops < 1e16


def test_calls_fill_a_program_on_a_gpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    options = measure.Options(FLOAT32, None, 1, baseline=False)
    shape, ceilings = SHAPES["deepseek-v3.gate_up"], Ceilings(3e12, 7e14)
    # 8 experts of 14.7 MB: 39 us; 32: 157 us; 64: 313 us
    assert options.calls_for(shape, 1, ceilings) == 26
    assert options.calls_for(shape, 4, ceilings) == 7
    assert options.calls_for(shape, 8, ceilings) == 4
    assert options.calls_for(SHAPES["dense.4096x4096"], 1, ceilings) == 64  # 2.8 us


def test_markdown_makes_a_file_and_refuses_one_without_markers(tmp_path, capsys):
    new, page = tmp_path / "new.md", tmp_path / "a.md"
    argv = ["--shapes", "tiny.dense", "--rows", "2", *FAST, "--no-baseline", "--no-peers"]
    assert bench.main([*argv, "--markdown", str(new)]) == 0
    lines = new.read_text().splitlines()
    assert lines[0] == markdown.BEGIN and lines[-1] == markdown.END
    assert f"jax {jax.__version__}, 20" in lines[1] and "| problem | 2 tokens |" in lines
    page.write_text(f"text\n{markdown.BEGIN}\n")
    assert bench.main([*argv, "--markdown", str(page)]) == 1
    assert "expected one line <!-- bench:begin -->" in capsys.readouterr().err
    assert page.read_text() == f"text\n{markdown.BEGIN}\n"
