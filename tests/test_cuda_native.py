"""Native checks on a GPU, built with nvcc: layout, streams that do not meet, parts of K that do."""

import re
import shutil
import subprocess
from pathlib import Path

import jax
import pytest

pytestmark = pytest.mark.cuda

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "tests" / "cuda"
KERNELS = sorted((ROOT / "cpp" / "launch").rglob("*.c[cu]"))


def build_and_run(tmp_path: Path, architecture: str, *sources: Path) -> str:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not on the PATH")
    program = tmp_path / "check"
    code = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    subprocess.run(
        [nvcc, "-std=c++20", "-O2", "-t0", code, "-o", program, *sources],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def compute_capability() -> str:
    return jax.devices("cuda")[0].compute_capability.replace(".", "")


def test_packed_tile_is_the_register_operand_of_wgmma(tmp_path):
    if compute_capability() != "90":
        pytest.skip("wgmma is an instruction of sm_90a")
    output = build_and_run(tmp_path, "90a", SOURCES / "wgmma_tile.cu")
    assert output == "0 of 512 wrong\n"


def test_two_streams_at_once(tmp_path):
    output = build_and_run(tmp_path, compute_capability(), SOURCES / "two_streams.cu", *KERNELS)
    assert output.endswith("0 of 1000 wrong\n")


def test_parts_of_k_have_the_same_bits_in_clusters_and_in_scratch(tmp_path):
    """At every tile of the table, dense and routed; 8 parts of 33 packed tiles leave one empty."""
    if compute_capability() != "90":
        pytest.skip("clusters and the code for them are sm_90's")
    others = ("stream", "wgmma")
    sources = [file for file in KERNELS if file.parent.name not in others or file.suffix == ".cc"]
    output = build_and_run(tmp_path, "90a", SOURCES / "parts_of_k.cu", *sources)
    tiles = len(set(re.findall(r"^tile (\d+),", output, re.MULTILINE)))
    assert tiles > 1 and output.endswith(f"0 of {2 * tiles} wrong\n")
    assert output.count(" 8 parts\n") > output.count(" 2 parts\n") > 0
