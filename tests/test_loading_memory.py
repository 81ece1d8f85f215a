"""Peak host memory of loading: the packed model and one stack of experts, whatever the size."""

import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import pathlib, sys
sys.path.insert(0, {tests!r})
import jax, jax_marlin as jm
from sparse_checkpoints import write_sparse_qwen3_moe

def memory(key):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

root = pathlib.Path({root!r})
sizes = dict(experts=32, hidden=1024, intermediate=512)
jm.models.load(write_sparse_qwen3_moe(root / "one", layers=1, **sizes))  # compiles, starts threads
path = write_sparse_qwen3_moe(root / "many", layers=8, **sizes)
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = memory("VmRSS")
model = jax.block_until_ready(jm.models.load(path))
peak = memory("VmHWM") - before
packed = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
stack = model.layers[0].mlp.gate_up.nbytes
print(packed, stack, peak)
assert packed > 12 * stack, "too small to tell"
assert peak > 0.9 * packed, "the model is not in memory"
assert peak < packed + stack, (peak - packed) / stack
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's counters")
def test_loading_holds_the_model_and_one_stack(tmp_path):
    code = CODE.format(tests=str(Path(__file__).resolve().parent), root=str(tmp_path))
    command = ["env", "JAX_PLATFORMS=cpu", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
