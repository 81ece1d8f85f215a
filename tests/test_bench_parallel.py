"""The benchmark over devices: every mode's record, bytes by hand, no time for a wrong result."""

import json

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType

from jax_marlin.bench import parallel
from jax_marlin.bench.collectives import bytes_sent, collectives_of
from jax_marlin.bench.problems import Problem, Quantization
from jax_marlin.bench.shapes import SHAPES
from jax_marlin.bench.timing import microseconds
from jax_marlin.sharding import shard

FAST = ["--calls", "2", "--runs", "1", "--devices", "2"]


def test_every_mode_is_checked_timed_and_counted(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(parallel, "microseconds", lambda *_, expected_us, runs: 7 * expected_us)
    file = tmp_path / "parallel.json"
    assert parallel.main([*FAST, "--rows", "1", "4", "--json", str(file)]) == 0
    saved = json.loads(file.read_text())
    assert saved["conditions"]["jax"] == jax.__version__
    records = {(r["mode"], r["rows"]): r for r in saved["records"]}
    assert set(records) == {
        ("expert", 1), ("expert", 4), ("tensor", 1), ("tensor", 4),
        ("expert all_gather", 4), ("expert all_to_all", 4),  # one row has no halves
    }  # fmt: skip
    for record in records.values():
        assert record["us"] > 0 and record["error"] is None and record["deviation"] < 1e-3
        assert record["speedup"] == 2 == pytest.approx(record["one_device_us"] / record["us"])
    hidden, top_k = 192, 2  # of the tiny layer; float32
    assert records["expert", 4]["bytes_sent"] == {"all-reduce": 4 * hidden * 4}
    assert records["tensor", 1]["bytes_sent"] == {"all-reduce": 1 * hidden * 4}
    assert records["expert all_gather", 4]["bytes_sent"] == {
        "all-gather": 2 * (hidden * 4 + top_k * 8), "reduce-scatter": 2 * hidden * 4
    }  # fmt: skip
    table = capsys.readouterr().out
    assert "tiny.layer" in table and "all-reduce 3072" in table


def test_a_layer_over_devices_is_timed_in_a_loop():
    mesh = jax.make_mesh((2,), ("devices",), (AxisType.Auto,), devices=jax.devices()[:2])
    shape, mode = SHAPES["tiny.layer"], parallel.MODES[1]
    batch = Problem(shape, Quantization(4, 64, jnp.dtype("float32")), 2, 1).batch(2, 1)
    operands = batch.operands[0]
    stacks = shard(operands[3:], mesh, mode.kind, gate_up=True)
    operation = parallel.over_devices(mesh, mode, stacks)
    assert microseconds(operation, [(*operands[:3], *stacks)], expected_us=1, runs=1) > 0


def test_a_wrong_result_and_a_cut_that_does_not_fit_have_no_time(monkeypatch, capsys):
    monkeypatch.setattr(
        parallel, "moe_ffn", lambda x, ids, weights, gate_up, down, **_: jnp.zeros_like(x)
    )
    assert parallel.main([*FAST, "--rows", "2", "--group-size", "128"]) == 1
    out = capsys.readouterr().out
    assert "sampled elements are off" in out
    assert parallel.main(["--calls", "1", "--runs", "1", "--devices", "4", "--rows", "4"]) == 1
    assert "has 6 experts, which cannot be cut" in capsys.readouterr().out


def test_devices_are_checked(capsys):
    with pytest.raises(SystemExit):
        parallel.main(["--devices", "1"])
    assert "--devices is 1, expected 2 to" in capsys.readouterr().err


GPU_HLO = """
  %ag-start = (f32[4,8]{1,0}, s32[4]{0}, f32[8,8]{1,0}, s32[8]{0}) all-gather-start(%a, %b), replica_groups=[4,2]<=[8]
  %ag-done = (f32[8,8]{1,0}, s32[8]{0}) all-gather-done(%ag-start)
  %ar = bf16[16]{0} all-reduce-start(%c), replica_groups={{0,1,2,3}}, to_apply=%add
  %rs = f32[2,3]{1,0} reduce-scatter(%d), replica_groups={{0,1,2}}, dimensions={0}
  %a2a = (f32[5]{0}, f32[5]{0}) all-to-all(%e, %f), replica_groups={{0,1}}
  %mesh = f32[6]{0} all-reduce(%m), replica_groups=mesh['a'=2,'b'=3,'c'=4] {'b','c':(1)2}
  %order = f32[8]{0} all-gather(%n), replica_groups=mesh['a'=2,'b'=4], device_ids=([2,2,2]T(1,0,2)) {'a'}, dimensions={0}
  %ragged = bf16[8,4]{1,0} ragged-all-to-all(%g, %h, %i, %j, %k, %l), replica_groups={{0,1}}
"""  # noqa: E501


def test_bytes_of_collectives_by_hand():
    found = collectives_of(GPU_HLO)
    assert [(c.kind, c.devices) for c in found] == [
        ("all-gather", 2), ("all-reduce", 4), ("reduce-scatter", 3), ("all-to-all", 2),
        ("all-reduce", 6), ("all-gather", 2), ("ragged-all-to-all", 2),
    ]  # fmt: skip
    assert bytes_sent(GPU_HLO) == {
        "all-gather": (8 * 8 + 8) * 4 // 2 + 8 * 4 // 2,
        "all-reduce": 2 * 16 * 2 * 3 // 4 + 2 * 6 * 4 * 5 // 6,
        "reduce-scatter": 2 * 2 * 3 * 4,
        "all-to-all": 2 * 5 * 4 // 2,
        "ragged-all-to-all": 8 * 4 * 2 // 2,
    }
    with pytest.raises(ValueError, match="cannot read the groups of devices"):
        bytes_sent("%ar = f32[16]{0} all-reduce(%c), replica_groups=")
