"""Finds the compiled CUDA extension, checks that this jaxlib can load it, registers it once."""

import functools
import importlib
import logging
import pathlib
import re
from types import ModuleType

import jax

_logger = logging.getLogger("jax_marlin")


def extension() -> ModuleType:
    """The compiled module; RuntimeError with the reason when it cannot be used."""
    reason = cuda_unavailable_reason()
    if reason is not None:
        raise RuntimeError(f"jax_marlin: {reason}")
    return importlib.import_module("_jax_marlin")


@functools.cache
def cuda_unavailable_reason() -> str | None:
    """Why the CUDA kernels cannot be used in this process, or None when they can.

    Says nothing about GPUs: lowering for CUDA works on a machine that has none.
    """
    try:
        module = importlib.import_module("_jax_marlin")
    except ModuleNotFoundError as error:
        if error.name != "_jax_marlin":
            raise
        return (
            "the CUDA extension `_jax_marlin` is not installed (built without nvcc?); "
            "reinstall jax_marlin where nvcc is on the PATH"
        )
    except ImportError as error:
        return f"the CUDA extension `_jax_marlin` does not load: {error}"
    built, installed = module.ffi_api_version(), installed_ffi_api_version()
    if built[0] != installed[0] or built[1] > installed[1]:
        return (
            f"the CUDA extension was built for XLA FFI {built[0]}.{built[1]}, but the installed "
            f"jaxlib has {installed[0]}.{installed[1]}; upgrade jax, or rebuild jax_marlin with it"
        )
    return None


@functools.cache
def ensure_registered() -> None:
    """Registers every handler for platform CUDA; called by the first CUDA lowering."""
    for name, capsule in extension().registrations().items():
        jax.ffi.register_ffi_target(name, capsule, platform="CUDA")
    _logger.debug("registered the CUDA handlers of _jax_marlin")


@functools.cache
def installed_ffi_api_version() -> tuple[int, int]:
    """(major, minor) of the XLA FFI of the installed jaxlib, read from the headers it ships."""
    header = pathlib.Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h"
    found = dict(re.findall(r"#define XLA_FFI_API_(MAJOR|MINOR) (\d+)", header.read_text()))
    return int(found["MAJOR"]), int(found["MINOR"])


def scratch_bytes(
    rows, moe_block_size: int, k: int, n: int, bits: int, *, transposed: bool = False
) -> int:
    """Bytes of scratch one call of a handler needs; `rows` may be a symbolic dimension."""
    # A symbolic batch has no size yet: reserve for more rows than any call can have.
    rows = rows if isinstance(rows, int) else 2**30
    return extension().scratch_bytes(rows, moe_block_size, k, n, bits, transposed)
