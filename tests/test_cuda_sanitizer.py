"""compute-sanitizer over a small problem of every op: no bad access, no race."""

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cuda

FAMILIES = list(itertools.product(("float16", "bfloat16"), ("4", "8"), ("symmetric", "asymmetric")))
# It speaks with its program through a port, of ten from the first that it may take: runs side by
# side that share them wait for each other. Below those that Linux gives to anybody.
WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
PORT = 20000 + 100 * WORKER
SCRIPT = Path(__file__).resolve().parent / "cuda" / "every_op.py"


@pytest.mark.parametrize("family", FAMILIES, ids="-".join)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_every_op(tool, family, tmp_path):
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not on the PATH")
    environment = os.environ | {
        # Its own allocation for each buffer, so that one element past the end is seen as such.
        "XLA_PYTHON_CLIENT_ALLOCATOR": "platform",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        # A watched process in which XLA compiles may wait for itself without end, and takes a
        # second for each small program: one that is not watched compiles them all before.
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "TMPDIR": str(tmp_path),
        # The package that this test sees, and whatever else was on the path.
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    program = [sys.executable, str(SCRIPT), tool, *family]
    # All our kernels live in the namespace jax_marlin; XLA's own are not watched.
    watched = ["--kernel-name", "kns=jax_marlin"]
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--port", str(PORT), *watched]
    for prefix in ([], command):
        done = subprocess.run(
            [*prefix, *program], env=environment, capture_output=True, text=True, check=False
        )
        report = done.stdout + done.stderr
        assert done.returncode == 0, report[-4000:]
        assert "every op ran" in report
