"""Schemes of a compressed-tensors config whose weights are floats: MXFP4, NVFP4 and FP8."""

from __future__ import annotations

from collections.abc import Mapping

from jax_marlin.checkpoints import mxfp4, nvfp4
from jax_marlin.checkpoints.fp8 import block_sizes, fp8_scheme
from jax_marlin.checkpoints.quantize_config import ModuleQuantization

# format -> bits, strategies
FLOAT_FORMATS: Mapping[str, tuple[int, tuple[str, ...]]] = {
    "mxfp4-pack-quantized": (4, ("group",)),
    "nvfp4-pack-quantized": (4, ("tensor_group",)),
    "float-quantized": (8, ("channel", "block", "group", "tensor")),
    "naive-quantized": (8, ("channel", "block", "group", "tensor")),  # the same tensors
}


def float_scheme(raw: Mapping, name: str, where: str) -> ModuleQuantization:
    """The scheme of a config group's `weights`.

    Args:
        raw: the object, its keys known.
        name: the format, one of `FLOAT_FORMATS`.
        where: what errors start with.

    Raises:
        NotImplementedError: a strategy, type or width that the format does not have, or that is not
            read.
        ValueError: a size is missing or wrong.
    """
    bits, strategies = FLOAT_FORMATS[name]
    fixed = {"type": ("float",), "num_bits": (bits,), "symmetric": (None, True)}
    fixed |= {"strategy": strategies, "actorder": (None, False)}
    for key, values in fixed.items():
        if raw.get(key) not in values:
            raise NotImplementedError(
                f"{where}: {key} is {raw.get(key)!r}, expected {' or '.join(map(repr, values))} "
                f"with format {name!r}"
            )
    strategy, size = raw["strategy"], raw.get("group_size")
    if bits == 4:
        expected = mxfp4.GROUP_SIZE if name.startswith("mx") else nvfp4.GROUP_SIZE
        if size not in (None, expected):
            raise NotImplementedError(
                f"{where}: group_size is {size!r}, expected {expected} with format {name!r}"
            )
        return ModuleQuantization(4, expected, True, False, name)
    if strategy == "block":
        return fp8_scheme(block_sizes(raw.get("block_structure"), f"{where}: block_structure"))
    if strategy == "group" and (type(size) is not int or size < 1):
        raise ValueError(f"{where}: group_size is {size!r}, expected at least 1 for 'group'")
    return fp8_scheme({"tensor": (-1, -1), "channel": (1, -1), "group": (1, size)}[strategy])
