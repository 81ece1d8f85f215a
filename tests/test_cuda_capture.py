"""XLA puts our calls into command buffers: read from what it writes about the programs it makes."""

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from thunks import (
    AFTER_PASSES,
    OPTIMIZED,
    all_captured,
    calls_of,
    dump_options,
    loose_calls,
    texts,
    written,
)

# op -> the target of its calls
TARGETS = {
    "matmul": "jax_marlin_matmul_v1",
    "moe_matmul": "jax_marlin_moe_matmul_v1",
    "ragged_dot": "jax_marlin_moe_matmul_v1",
    "moe_ffn": "jax_marlin_moe_ffn_v1",
    "moe_align_block_size": "jax_marlin_moe_align_block_size_v1",
}
CALLS = (6, 12)  # more than XLA's smallest command buffer has


def test_loose_calls_are_told_from_captured_ones():
    captured = "000: kCommandBuffer\t\n  000: kKernel\tx\n  001: kCustomCall\ty\n\n001: kCopy\t\n"
    assert loose_calls(captured) == []
    assert loose_calls(captured + "002: kCustomCall\tz\n") == ["002: kCustomCall\tz"]
    below = "000: kWhile\n  body:\n    000: kCommandBuffer\n      000: kCustomCall\n"
    assert loose_calls(below) == []
    assert loose_calls(below + "    001: kCustomCall\n") == ["    001: kCustomCall"]
    assert loose_calls("000: kCustomCall\ty") == ["000: kCustomCall\ty"]
    assert all_captured(captured) and all_captured(below)
    assert not all_captured(captured + "002: kCustomCall\tz\n")
    assert not all_captured("000: kKernel\tx\n")


def run_benchmark(folder, module: str, *options: str) -> str:
    """Runs a benchmark in a process of its own, which writes its programs to `folder`."""
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_dump_to={folder} --xla_dump_hlo_as_text",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # this process has most of the memory
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(
        [sys.executable, "-m", module, "--runs", "3", *options],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def compile_chains(folder, *options: str) -> None:
    """Runs chains of calls, whose programs are written to `folder`."""
    calls = ["--calls", *map(str, CALLS)]
    printed = run_benchmark(folder, "jax_marlin.bench.overhead", *calls, *options)
    assert all(re.search(rf"^{op} +-?\d+\.\d\d$", printed, re.MULTILINE) for op in TARGETS)


def test_programs_are_written_where_they_are_looked_for(tmp_path):
    compile_chains(tmp_path)
    for op in TARGETS:
        assert len(texts(tmp_path, f"chain_{op}", OPTIMIZED)) == len(CALLS)


def test_one_function_alone_is_written_where_its_options_say(tmp_path):
    def doubled(x):
        return x + x

    for folder in (None, tmp_path):
        options = None if folder is None else dump_options(folder)
        assert jax.jit(doubled, compiler_options=options)(jnp.ones(3)).sum() == 6
    assert jax.jit(lambda x: x * 3)(jnp.ones(3)).sum() == 9
    assert len(texts(tmp_path, "doubled", OPTIMIZED)) == 1
    assert len(list(tmp_path.glob(f"*{OPTIMIZED}"))) == 1


@pytest.mark.cuda
def test_calls_run_inside_command_buffers(tmp_path):
    compile_chains(tmp_path, "--command-buffers")
    failures = []
    for op, target in TARGETS.items():
        programs = texts(tmp_path, f"chain_{op}", OPTIMIZED)
        counts = sorted(calls_of(target, text) for text in programs)
        after = texts(tmp_path, f"chain_{op}", AFTER_PASSES)
        captured = len(after) == len(CALLS) and all(map(all_captured, after))
        if counts != list(CALLS) or not captured:
            failures.append(f"{target} {counts} times, {written(tmp_path, f'chain_{op}')}")
    assert not failures, "\n====\n".join(failures)


@pytest.mark.cuda
def test_times_are_those_of_calls_inside_command_buffers(tmp_path):
    options = ["--shapes", "tiny.dense", "--rows", "1", "--calls", "8", "--no-baseline"]
    options += ["--no-peers", "--bandwidth", "3000", "--tflops", "800"]
    run_benchmark(tmp_path, "jax_marlin.bench", *options)
    (text,) = texts(tmp_path, "program", OPTIMIZED)
    assert calls_of(TARGETS["matmul"], text) == 8
    assert "known_trip_count" in text and not re.search(r"= u32\[\d.*\]\S* copy\(", text)
    (thunks,) = texts(tmp_path, "program", AFTER_PASSES)
    assert "kWhile" in thunks and all_captured(thunks), thunks


@pytest.mark.cuda
def test_overhead_is_measured_outside_command_buffers(tmp_path):
    compile_chains(tmp_path)
    for op in TARGETS:
        thunks = texts(tmp_path, f"chain_{op}", "thunk*.txt")
        assert thunks and not any("kCommandBuffer" in text for text in thunks), written(
            tmp_path, f"chain_{op}"
        )
