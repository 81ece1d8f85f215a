"""What the README shows is true: its examples run, and the commands and names it mentions exist."""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_marlin as jm
from jax_marlin.bench import markdown, marked, packing

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
PYTHON_BLOCKS = [code for language, code in BLOCKS if language == "python"]
COMMANDS = [
    command.strip()
    for language, code in BLOCKS
    if language == ""
    for line in code.splitlines()
    for command in line.split("&&")
]


def test_examples_run():
    names: dict = {}
    for code in PYTHON_BLOCKS:  # later blocks use names of earlier ones, as a reader would
        exec(compile(code, "README.md", "exec"), names)
    assert names["y"].shape == (5, 256) and names["y"].dtype == jnp.bfloat16
    assert bool(jnp.isfinite(names["y"]).all()) and float(jnp.abs(names["y"]).max()) > 0
    assert float(jnp.abs(names["gradients"]["b"].astype(jnp.float32)).max()) > 0
    wide = jnp.float32  # what lax.ragged_dot makes of the weights that the packed ones stand for
    same = jax.lax.ragged_dot(
        names["x"].astype(wide), names["packed"].dequantize(wide), names["group_sizes"],
        precision="highest",
    )  # fmt: skip
    np.testing.assert_allclose(names["new"].astype(wide), same, rtol=2**-8, atol=1e-5)
    assert names["old"].shape == names["new"].shape and names["old"].dtype == names["new"].dtype
    assert isinstance(names["logits"], jax.Array) and names["logits"].ndim == 3


def test_first_screen():
    assert len([line for line in PYTHON_BLOCKS[0].splitlines() if line]) <= 15
    assert COMMANDS[:4] == [
        "pip install '.[demo]'",
        'python -m jax_marlin generate "The capital of France is"',
        "pip install '.[test]'",
        "pytest",
    ]


@pytest.mark.parametrize(
    ("file", "module"), [("h200.json", markdown), ("cpu_packing.json", packing)]
)
def test_measured_tables_are_those_of_the_committed_records(file, module):
    record = json.loads((ROOT / "jax_marlin" / "bench" / "results" / file).read_text())
    assert marked.split(ROOT / "README.md", module.NAME)[1] == module.table(**record)


def test_ci_runs_the_commands_of_the_first_screen():
    ci = (ROOT / ".ci" / "run").read_text()
    first = BLOCKS[0][1].splitlines()
    assert len(first) == 2 and all(line in ci for line in first)
    assert "grep '^answer .*Paris'" in ci


OWN_COMMANDS = {
    command.removeprefix("python -m ").replace("jax_marlin", "jax-marlin", 1)
    for command in COMMANDS
    if command.startswith(("jax-marlin", "python -m jax_marlin"))
}


@pytest.mark.parametrize("command", sorted(OWN_COMMANDS))
def test_subcommand_exists(command):
    assert PROJECT["scripts"]["jax-marlin"].startswith("jax_marlin.")
    _, subcommand, *options = shlex.split(command)
    package = str(Path(jm.__file__).parent.parent)
    shown = subprocess.run(
        [sys.executable, "-m", "jax_marlin", subcommand, "--help"],
        env={**os.environ, "PYTHONPATH": package},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for option in options:
        if option.startswith("--"):
            assert option in shown


def test_extras_exist():
    extras = set(re.findall(r"'\.\[(\w+)\]'", README))
    assert {"demo", "test", "cuda12", "cuda13"} <= extras <= set(PROJECT["optional-dependencies"])


def test_public_names_exist():
    names = set(re.findall(r"\bjm\.(\w+)", README))
    assert names <= set(jm.__all__)
    for submodule, name in re.findall(r"\b(?:jm\.)?(models|checkpoints)\.(\w+)", README):
        assert hasattr(getattr(jm, submodule), name)


CITED = re.findall(r"`(test_\w+)::(test_\w+)`", README)


@pytest.mark.parametrize(("file", "name"), CITED)
def test_cited_tests_exist(file, name):
    assert f"\ndef {name}(" in (ROOT / "tests" / f"{file}.py").read_text()


def test_every_row_of_what_composes_cites_a_test():
    section = README.split("## What composes with what")[1].split("**Train")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")][2:]
    assert len(rows) >= 15 and all("`test_" in row.split("|")[-2] for row in rows)


def test_named_files_exist():
    linked = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    quoted = re.findall(r"`([\w./]+/[\w.]+\.(?:py|ipynb|cc|cuh))`", README)
    assert linked and quoted
    missing = [name for name in {*linked, *quoted} if not (ROOT / name).is_file()]
    assert not missing
