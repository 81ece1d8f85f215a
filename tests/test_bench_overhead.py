"""The benchmark of a call's overhead: its chains, its lines, and what it refuses."""

import os

import jax
import numpy as np
import pytest

import jax_marlin as jm
from jax_marlin.bench import overhead

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
def test_command_prints_the_slope_of_each_op(keep, monkeypatch, capsys):
    monkeypatch.setenv("XLA_FLAGS", "--xla_of_the_user=1")
    monkeypatch.setattr(overhead, "chain", lambda name, operation, calls: calls)
    # 100 microseconds to start a program, and 7 for each call.
    monkeypatch.setattr(overhead, "_microseconds", lambda calls, operands, runs: 100 + 7.0 * calls)
    argv = ["--calls", "9", "3", *(["--command-buffers"] if keep else [])]
    assert overhead.main(argv) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert f"jax {jax.__version__}: microseconds a call" in head
    assert {line.split()[0]: line.split()[1] for line in lines} == dict.fromkeys(
        [*OPS, "xla_kernel"], "7.00"
    )
    flags = os.environ["XLA_FLAGS"].split()
    assert flags == ["--xla_of_the_user=1", *([] if keep else ["--xla_gpu_enable_command_buffer="])]


def test_time_is_that_of_the_whole_program():
    operation, operands = overhead.operations()["xla_kernel"]
    assert overhead._microseconds(overhead.chain("x", operation, 2), operands, runs=3) > 0


def test_one_length_is_refused(capsys):
    with pytest.raises(SystemExit):
        overhead.main(["--calls", "4", "4"])
    assert "--calls is 4 4, expected two different lengths" in capsys.readouterr().err
