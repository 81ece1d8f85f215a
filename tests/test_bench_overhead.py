"""The benchmark of a call's overhead: its chains, its lines, and what it refuses."""

import json
import os

import jax
import numpy as np
import pytest

import jax_marlin as jm
from jax_marlin.bench import marked, overhead

OPS = {"matmul", "moe_matmul", "ragged_dot", "moe_ffn", "moe_align_block_size"}


def test_every_op_is_chained_on_its_own_result():
    operations = overhead.operations()
    assert set(operations) == OPS | {"xla_kernel"} and set(jm.__all__) > OPS
    for name, (operation, operands) in operations.items():
        program = overhead.chain(name, operation, 3)
        assert f"jit_chain_{name}" in program.lower(*operands).as_text()
        once = operation(*operands)
        assert once.shape == operands[0].shape and once.dtype == operands[0].dtype
        assert np.isfinite(np.asarray(once, np.float32)).all() and np.asarray(once).any()
        thrice = operation(operation(once, *operands[1:]), *operands[1:])
        np.testing.assert_allclose(
            np.asarray(program(*operands), np.float32), np.asarray(thrice, np.float32), atol=1e-2
        )


def test_a_chain_compiles_no_call_away():
    operation, operands = overhead.operations()["xla_kernel"]
    assert float(overhead.chain("x", operation, 5)(*operands)[0, 0]) == 2.0**-5
    flops = [
        overhead.chain("matmul", *overhead.operations()["matmul"][:1], n)
        .lower(*overhead.operations()["matmul"][1])
        .compile()
        .cost_analysis()["flops"]
        for n in (2, 4)
    ]
    assert flops[1] > 1.4 * flops[0]


@pytest.mark.parametrize("keep", [False, True])
def test_command_reports_the_slope_of_each_op(keep, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("XLA_FLAGS", "--xla_of_the_user=1")
    monkeypatch.setattr(overhead, "chain", lambda name, operation, calls: calls)
    # 100 microseconds to start a program, and 7 for each call.
    monkeypatch.setattr(overhead, "_microseconds", lambda calls, operands, runs: 100 + 7.0 * calls)
    file, page = tmp_path / "a.json", tmp_path / "a.md"
    argv = ["--calls", "9", "3", *(["--command-buffers"] if keep else [])]
    assert overhead.main([*argv, "--json", str(file), "--markdown", str(page)]) == 0
    lines = capsys.readouterr().out.splitlines()[-len(OPS) - 1 :]
    operations = {*OPS, "xla_kernel"}
    assert {line.split()[0]: line.split()[1] for line in lines} == dict.fromkeys(operations, "7.00")
    saved = json.loads(file.read_text())
    assert {r["operation"]: r["us"] for r in saved["records"]} == dict.fromkeys(operations, 7.0)
    assert saved["conditions"]["jax"] == jax.__version__
    assert saved["conditions"]["command_buffers"] is keep
    assert "chains of 3 and of 9 calls" in saved["conditions"]["method"]
    begin, text, *table, end = page.read_text().splitlines()
    assert (begin, end) == marked.markers("overhead")
    assert f": µs a call {'in' if keep else 'outside'} command buffers" in text
    assert table[-1] == "|" + " 7.0 |" * len(operations) and "`moe_ffn`" in table[1]
    flags = os.environ["XLA_FLAGS"].split()
    assert flags == ["--xla_of_the_user=1", *([] if keep else ["--xla_gpu_enable_command_buffer="])]


def test_time_is_that_of_the_whole_program():
    operation, operands = overhead.operations()["xla_kernel"]
    assert overhead._microseconds(overhead.chain("x", operation, 2), operands, runs=3) > 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--calls", "4", "4"], "--calls is 4 4, expected two different lengths"),
        (["--markdown", __file__], "expected one line <!-- overhead:begin -->"),
    ],
)
def test_what_cannot_be_measured_or_written_is_refused(argv, message, capsys):
    with pytest.raises(SystemExit):
        overhead.main(argv)
    assert message in capsys.readouterr().err
