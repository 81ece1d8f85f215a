"""backend_info, scratch_bytes, and what is said where the extension is missing or too new."""

import importlib
import sys

import jax.numpy as jnp
import numpy as np
import problems
import pytest
from extension_stand_in import install, stand_in

from jax_marlin.backend import backend_info, scratch_bytes
from jax_marlin.ops import ffi_targets
from jax_marlin.ops.matmul import matmul

X = np.ones((7, 96), np.float16)


def build(**changes):
    return problems.build(
        problems.Problem("backend", k=96, n=200, group_size=32, **changes)
    ).stack()


class TestWithoutTheExtension:
    def test_cuda_by_name_says_why(self, monkeypatch):
        install(monkeypatch, None)
        x, stack = X, build()
        with pytest.raises(NotImplementedError, match="`_jax_marlin` is not installed"):
            matmul(x, stack[0], implementation="cuda")
        assert matmul(x, stack[0], implementation=None).shape == (7, 200)

    def test_built_for_a_newer_ffi(self, monkeypatch):
        install(monkeypatch, stand_in(ffi_api_version=lambda: (0, 99)))
        x, stack = X, build()
        with pytest.raises(NotImplementedError, match=r"XLA FFI 0.99, but .* upgrade jax"):
            matmul(x, stack[0], implementation="cuda")
        assert "0.99" in (backend_info().why_not or "")

    def test_a_library_that_does_not_load(self, monkeypatch):
        install(monkeypatch, None)
        monkeypatch.delitem(sys.modules, "_jax_marlin")

        def refuse(name, *rest, **options):
            if name == "_jax_marlin":
                raise ImportError("libcuda.so.1: cannot open shared object file")
            return original(name, *rest, **options)

        original = importlib.import_module
        monkeypatch.setattr(importlib, "import_module", refuse)
        assert "does not load: libcuda.so.1" in (ffi_targets.cuda_unavailable_reason() or "")


def test_backend_info(monkeypatch):
    install(monkeypatch, stand_in())
    info = backend_info()
    assert info.extension and info.cuda_version == "12.9" and info.architectures == ("80", "90a")
    assert "CUDA 12.9 for 80, 90a" in str(info)
    assert (info.why_not is None) == bool(info.gpus)
    install(monkeypatch, None)
    info = backend_info()
    assert not info.extension and info.ffi_built is None
    assert "why not        the CUDA extension" in str(info)


def test_scratch_bytes(monkeypatch):
    install(monkeypatch, stand_in())
    stack = build(g_idx="per_expert")
    assert scratch_bytes(5, stack[0][:, 64:128]) == 4 * 5 * 64
    assert scratch_bytes(7, stack[0].astype(jnp.float32)) == 0
    slots = 14 + 3 * 7  # 7 tokens, top 2, three experts, blocks of 8
    gathered = 14 * 96 * 2
    assert scratch_bytes(7, stack, top_k=2, moe_block_size=8) == 4 * slots * 200 + gathered
    with pytest.raises(ValueError, match="scratch_bytes: m is -1, expected an integer of at"):
        scratch_bytes(-1, stack)
    with pytest.raises(ValueError, match=r"scratch_bytes: m is 1\.5, expected an integer"):
        scratch_bytes(1.5, stack)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="scratch_bytes: w is ndarray, expected a MarlinLinear"):
        scratch_bytes(7, X)  # type: ignore[arg-type]
    install(monkeypatch, None)
    assert scratch_bytes(7, stack) == 0


def test_installed_ffi_version_is_that_of_the_headers():
    major, minor = ffi_targets.installed_ffi_api_version()
    assert major == 0 and minor >= 3
