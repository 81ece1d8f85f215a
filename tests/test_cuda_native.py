"""Native checks on a GPU, built with nvcc: the layout feeds wgmma, and two streams do not meet."""

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
