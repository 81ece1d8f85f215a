"""A module that stands in for the compiled extension, so that tests need neither nvcc nor a GPU."""

import inspect
import sys
import types

from jax_marlin.ops import ffi_targets


def stand_in(**changes) -> types.ModuleType:
    module = types.ModuleType("_jax_marlin")
    functions = {
        "registrations": dict,
        "ffi_api_version": lambda: (0, 1),
        "cuda_version": lambda: 12090,
        "architectures": lambda: ["80", "90a"],
        "scratch_bytes": lambda rows, moe_block_size, k, n, bits, transposed=False: (
            4 * min(rows, 64) * n
        ),
    }
    for name, function in (functions | changes).items():
        setattr(module, name, function)
    return module


def install(monkeypatch, module):
    """Puts `module` (None: nothing) in the place of the extension for one test."""
    monkeypatch.setitem(sys.modules, "_jax_marlin", module)
    # What is found out about it must not outlive the test: no cache, no registration.
    uncached = inspect.unwrap(ffi_targets.cuda_unavailable_reason)
    monkeypatch.setattr(ffi_targets, "cuda_unavailable_reason", uncached)
    monkeypatch.setattr(ffi_targets, "ensure_registered", lambda: None)
