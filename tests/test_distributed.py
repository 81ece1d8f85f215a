"""Two processes on one machine (jax.distributed, Gloo): each holds, and makes, its own experts."""

import os
import socket
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_a_layer_over_two_processes():
    port = str(free_port())
    path = [str(TESTS), str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(path)}
    processes = [
        subprocess.Popen(
            [sys.executable, str(TESTS / "distributed_layer.py"), port, str(process)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for process in range(2)
    ]  # fmt: skip
    outputs = [process.communicate()[0] for process in processes]
    for i, (process, output) in enumerate(zip(processes, outputs, strict=True)):
        assert process.returncode == 0 and f"process {i} agrees" in output, output
