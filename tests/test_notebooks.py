"""Every notebook runs from a clean kernel, on a CPU or on whatever JAX finds."""

import re
from pathlib import Path

import nbclient
import nbformat
import pytest

import jax_marlin

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks():
    assert [path.stem for path in NOTEBOOKS] == [
        "1_quickstart",
        "2_packed_layout",
        "3_flax_and_equinox",
        "4_checkpoint",
        "5_sharding",
        "6_adapters",
        "7_benchmarks",
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("default")  # the Jupyter client's; the notebook's stay in its kernel
def test_notebook_runs(path, monkeypatch, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    # In an empty folder: a notebook needs the package and what comes with it, no file beside it.
    monkeypatch.setenv("PYTHONPATH", str(Path(jax_marlin.__file__).parent.parent))
    client = nbclient.NotebookClient(
        notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_stored_as_run_from_top_to_bottom(path):
    cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    printed = "".join(o.get("text", "") for o in outputs)
    assert not re.search(r"(?<!\S)/\w+/", printed)  # a path of somebody's machine
