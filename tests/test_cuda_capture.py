"""XLA puts our calls into command buffers: read from what it writes about the programs it makes."""

import os
import re
import subprocess
import sys

import pytest

# op -> the target of its calls
TARGETS = {
    "matmul": "jax_marlin_matmul_v1",
    "moe_matmul": "jax_marlin_moe_matmul_v1",
    "ragged_dot": "jax_marlin_moe_matmul_v1",
    "moe_ffn": "jax_marlin_moe_ffn_v1",
    "moe_align_block_size": "jax_marlin_moe_align_block_size_v1",
}
CALLS = (6, 12)  # more than XLA's smallest command buffer has


def loose_calls(thunks: str) -> list[str]:
    """The lines of custom calls that stand beside, not below, a command buffer.

    A thunk's line is indented below the thunk that runs it: `000: kCommandBuffer`, and on the next
    lines `  000: kCustomCall`.
    """
    loose, command_buffer = [], None  # the indentation of the command buffer that we are in
    for line in filter(str.strip, thunks.splitlines()):
        indentation = len(line) - len(line.lstrip())
        if command_buffer is not None and indentation <= command_buffer:
            command_buffer = None
        if command_buffer is None and "kCommandBuffer" in line:
            command_buffer = indentation
        elif command_buffer is None and "kCustomCall" in line:
            loose.append(line)
    return loose


def test_loose_calls_are_told_from_captured_ones():
    captured = "000: kCommandBuffer\t\n  000: kKernel\tx\n  001: kCustomCall\ty\n\n001: kCopy\t\n"
    assert loose_calls(captured) == []
    assert loose_calls(captured + "002: kCustomCall\tz\n") == ["002: kCustomCall\tz"]
    below = "000: kWhile\n  body:\n    000: kCommandBuffer\n      000: kCustomCall\n"
    assert loose_calls(below) == []
    assert loose_calls(below + "    001: kCustomCall\n") == ["    001: kCustomCall"]
    assert loose_calls("000: kCustomCall\ty") == ["000: kCustomCall\ty"]


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


def texts(folder, op: str, ending: str) -> list[str]:
    """What XLA wrote about the programs of one op, e.g. `module_0007.jit_chain_matmul.ENDING`."""
    return [file.read_text() for file in sorted(folder.glob(f"*.jit_chain_{op}.*{ending}"))]


def written(folder, op: str) -> str:
    """For a failure: the names of an op's files, and the beginning of its thunks."""
    names = [file.name for file in sorted(folder.glob(f"*.jit_chain_{op}.*.txt"))]
    thunks = "\n----\n".join(texts(folder, op, "thunk*.txt"))
    return f"{op}: XLA wrote {names}\n{thunks[:3000]}"


def test_programs_are_written_where_they_are_looked_for(tmp_path):
    compile_chains(tmp_path)
    for op in TARGETS:
        assert len(texts(tmp_path, op, "after_optimizations.txt")) == len(CALLS)


@pytest.mark.cuda
def test_calls_run_inside_command_buffers(tmp_path):
    compile_chains(tmp_path, "--command-buffers")
    failures = []
    for op, target in TARGETS.items():
        programs = texts(tmp_path, op, "after_optimizations.txt")
        counts = sorted(text.count(f'custom_call_target="{target}"') for text in programs)
        after = texts(tmp_path, op, "thunk_sequence_after_thunk_passes.txt")
        captured = len(after) == len(CALLS) and all(
            "kCommandBuffer" in text and not loose_calls(text) for text in after
        )
        if counts != list(CALLS) or not captured:
            failures.append(f"{target} {counts} times, {written(tmp_path, op)}")
    assert not failures, "\n====\n".join(failures)


@pytest.mark.cuda
def test_times_are_those_of_calls_inside_command_buffers(tmp_path):
    options = ["--shapes", "tiny.dense", "--rows", "1", "--calls", "8", "--no-baseline"]
    options += ["--no-peers", "--bandwidth", "3000", "--tflops", "800"]
    run_benchmark(tmp_path, "jax_marlin.bench", *options)
    (text,) = [f.read_text() for f in tmp_path.glob("*.jit_program.*after_optimizations.txt")]
    assert text.count(f'custom_call_target="{TARGETS["matmul"]}"') == 8
    assert "known_trip_count" in text and not re.search(r"= u32\[\d.*\]\S* copy\(", text)
    (after,) = tmp_path.glob("*.jit_program.*thunk_sequence_after_thunk_passes.txt")
    thunks = after.read_text()
    assert "kWhile" in thunks and "kCommandBuffer" in thunks and not loose_calls(thunks), thunks


@pytest.mark.cuda
def test_overhead_is_measured_outside_command_buffers(tmp_path):
    compile_chains(tmp_path)
    for op in TARGETS:
        thunks = texts(tmp_path, op, "thunk*.txt")
        assert thunks and not any("kCommandBuffer" in text for text in thunks), written(
            tmp_path, op
        )
