"""Every public name is documented: what it takes, and an example that runs as printed."""

import doctest
import inspect
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_marlin as jm

# What an example may use without importing it, beside the names of its own module.
EXAMPLE_NAMES = {"jax": jax, "jnp": jnp, "np": np, "jm": jm}


def public_objects() -> dict[str, object]:
    """What `jax_marlin.__all__` names; of a submodule, its functions and classes."""
    found = {}
    for name in jm.__all__:
        value = getattr(jm, name)
        if isinstance(value, types.ModuleType):
            members = {k: v for k, v in vars(value).items() if callable(v) and k[0] != "_"}
            found |= {f"{name}.{member}": v for member, v in members.items()}
        elif callable(value):  # and not __version__
            found[name] = value
    return found


PUBLIC = public_objects()
FUNCTIONS = [name for name, value in PUBLIC.items() if not inspect.isclass(value)]


def test_public_surface():
    designed = {
        *("load_gptq", "load_gptq_stacked", "MarlinLinear", "MarlinExpertStack", "matmul"),
        *("ragged_dot", "moe_matmul", "route", "moe_align_block_size", "moe_ffn"),
        *("fold_act_order", "quantize", "backend_info", "scratch_bytes"),
        *("split_trainable", "merge_trainable"),
        *("checkpoints.open_checkpoint", "checkpoints.save_checkpoint"),
        *("models.load", "models.generate", "models.load_tokenizer"),
    }
    assert designed <= PUBLIC.keys()


@pytest.mark.parametrize("name", PUBLIC)
def test_example_runs(name):
    module = inspect.getmodule(PUBLIC[name])
    names = {**vars(module), **EXAMPLE_NAMES}
    tests = doctest.DocTestFinder().find(PUBLIC[name], name, module, names)
    # A class of a submodule is what its functions return; their example shows it.
    if name in FUNCTIONS or "." not in name:
        assert any(test.examples for test in tests), f"{name} has no >>> example"
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    report: list[str] = []
    for test in tests:
        runner.run(test, out=report.append)
    assert runner.failures == 0, "".join(report)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_parameter_is_documented(name):
    documentation = inspect.getdoc(PUBLIC[name]) or ""
    parameters = inspect.signature(PUBLIC[name]).parameters  # type: ignore[arg-type]
    missing = [p for p in parameters if not documents(documentation, p)]
    assert not missing, f"{name}: Args does not explain {missing}"
    assert not parameters or "Args:" in documentation
    assert "Returns:" in documentation


def documents(documentation: str, parameter: str) -> bool:
    """Whether some Args line starts with the parameter; `a, b: ...` explains both."""
    lines = (line.strip() for line in documentation.splitlines())
    heads = (line.split(":")[0] for line in lines if ":" in line)
    return any(parameter in head.replace("`", "").split("(")[0].split(", ") for head in heads)
