"""Damaged checkpoints by the hundred: each ends in a model or in an error that says who raised it.

`JAX_MARLIN_FUZZ_CASES=10000` runs more cases than the suite does, and with
JAX_MARLIN_CHECKPOINTS set the formats of the larger set too.
"""

import os
import pathlib
import re
import resource
import tempfile
import warnings
from collections.abc import Iterator

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_mutations import MUTATIONS, Files
from conftest import CHECKPOINTS_VARIABLE, checkpoint_dir

from jax_marlin import inspect, models
from jax_marlin.checkpoints import open_checkpoint

CASES = int(os.environ.get("JAX_MARLIN_FUZZ_CASES", "500"))
SMALL = ("qwen3moe-gptq-sym-g128", "qwen3moe-gptq-sym-desc-dynamic-lmhead")
LARGER = (
    "qwen3moe-awq-asym-g64",
    "qwen3moe-ct-w4a16-sym-g128",
    "qwen3moe-autoround-gptq-asym-g64",
    "gptoss-mxfp4",
    "deepseekv3-gptq-sym-g32",
    "qwen2moe-gptq-asym-g64-bias-shared",
    "mixtral-gptq-sym-g128-classic-sharded",
)
NAMES = SMALL + (LARGER if os.environ.get(CHECKPOINTS_VARIABLE) else ())
OURS = (ValueError, TypeError, NotImplementedError, OSError)
SAYS_WHO = re.compile(r"(open_checkpoint|models\.load|Checkpoint(\.\w+)?|fold_act_order): ")
SPARE_BYTES = 3 * 2**30  # of address space; a damaged size asks for far more
SETTINGS = hypothesis.settings(
    max_examples=CASES,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[
        hypothesis.HealthCheck.too_slow,
        hypothesis.HealthCheck.data_too_large,
        hypothesis.HealthCheck.large_base_example,
    ],
    phases=[hypothesis.Phase.generate],  # a failing case is small as it is
)


def read_files(name: str) -> Files:
    """The files of a checkpoint that are read."""
    paths = sorted(checkpoint_dir(name).iterdir())
    return {
        path.name: path.read_bytes() for path in paths if path.suffix in (".json", ".safetensors")
    }


def shapes(model: models.CausalLM) -> dict[str, tuple[int, ...]]:
    """Shape by path of every leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(model)
    return {jax.tree_util.keystr(path): leaf.shape for path, leaf in leaves}


@pytest.fixture(scope="module")
def whole() -> Iterator[dict[str, tuple[Files, models.CausalLM]]]:
    """Name -> (files, model) of every checkpoint without fault; loading happens on the CPU.

    From here on address space is limited, so that an allocation of a damaged size fails, and takes
    nothing with it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        loaded = {name: (read_files(name), models.load(checkpoint_dir(name))) for name in NAMES}
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + SPARE_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
        yield loaded
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def attempt(function, *args):
    """What a function gives; None where it raises an error of ours that says who raised it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return function(*args)
        except OURS as error:
            if not SAYS_WHO.match(str(error)):
                raise
            return None


def check(files: Files, original: models.CausalLM) -> models.CausalLM | None:
    """Opens, describes and loads; the model, or None after an error of ours."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (pathlib.Path(folder) / name).write_bytes(content)
        text = attempt(inspect.describe, folder)
        opened = attempt(open_checkpoint, folder)
        if opened is None:
            return None
        opened.close()
        assert text is not None
        model = attempt(models.load, folder)
    if model is None:
        return None
    c, got = model.config, shapes(model)
    differing = {p: (got[p], s) for p, s in shapes(original).items() if got.get(p, s) != s}
    assert not differing, differing
    if c != original.config:
        assert np.isfinite(c.rms_norm_eps) and np.isfinite(c.rope.frequencies(c.head_dim)).all()
        logits = jax.eval_shape(model, jnp.zeros((1, 3), jnp.int32))
        assert logits.shape == (1, 3, c.vocab_size)
    return model


def test_checkpoints_without_fault(whole):
    for files, model in whole.values():
        assert check(files, model) is not None


def test_damaged_checkpoints(whole):
    outcomes = {"model": 0, "error": 0}

    @SETTINGS
    @hypothesis.given(st.data())
    def one_case(data):
        files, original = whole[data.draw(st.sampled_from(NAMES))]
        files = dict(files)
        data.draw(st.sampled_from(MUTATIONS))(files, data)
        outcomes["error" if check(files, original) is None else "model"] += 1

    one_case()
    assert min(outcomes.values()) > CASES // 20, outcomes
