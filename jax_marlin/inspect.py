"""`python -m jax_marlin inspect DIR`: what a checkpoint holds, from its headers alone."""

from __future__ import annotations

import argparse
import collections
import os
import pathlib
import re
import sys
from collections.abc import Iterable, Sequence

from jax_marlin.checkpoints import Checkpoint, open_checkpoint
from jax_marlin.checkpoints.formats import FORMATS
from jax_marlin.checkpoints.modules import ModuleInfo
from jax_marlin.checkpoints.quantize_config import ModuleQuantization
from jax_marlin.checkpoints.shards import Shards

_COUNTED = ("modules", "in experts", "packed", "dense")
_EXPERT = re.compile(r"(?P<layer>.+)\.experts\.(?P<expert>\d+)\.")


def main(argv: list[str]) -> int:
    """Runs the command; returns the exit status (1: the checkpoint is damaged)."""
    parser = argparse.ArgumentParser(
        prog="jax-marlin inspect",
        description="Prints what a checkpoint holds; reads its headers, no weights.",
    )
    parser.add_argument("directory", help="folder with config.json and .safetensors files")
    parser.add_argument("--modules", action="store_true", help="also list every module")
    arguments = parser.parse_args(argv)
    try:
        print(describe(arguments.directory, modules=arguments.modules))
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def describe(path: str | os.PathLike, *, modules: bool = False) -> str:
    """Format, modules, experts and bytes of a checkpoint as text; reads no tensor data.

    Args:
        path: a checkpoint directory; of formats that cannot be loaded yet only dtypes are counted.
        modules: also a line for every module.

    Raises:
        ValueError: files are missing, damaged or contradict each other.

    >>> import pathlib, jax_marlin
    >>> path = pathlib.Path(jax_marlin.__file__).parent / "data" / "qwen3moe-gptq-sym-g128"
    >>> print(describe(path).splitlines()[1])
    format      gptq, 4 bit, group size 128, symmetric
    """
    try:
        with open_checkpoint(path) as checkpoint:
            return _describe_checkpoint(checkpoint, modules)
    except NotImplementedError as error:
        return _describe_tensors(pathlib.Path(path), str(error))


def _describe_checkpoint(checkpoint: Checkpoint, list_modules: bool) -> str:
    infos = list(checkpoint.modules.values())
    packed, dense = checkpoint.nbytes, checkpoint.nbytes_dense
    unpacked = [info for info in infos if info.is_dequantized]
    of_latents = [info for info in infos if info.is_packed and info.name.endswith(".kv_b_proj")]
    lines = [
        f"checkpoint  {checkpoint.path}",
        f"format      {_format(checkpoint)}",
        f"model       {checkpoint.config.get('model_type', 'not said')}",
        f"experts     {_experts(infos)}",
        f"shards      {len(checkpoint.shards.paths)}",
        f"bytes       {_size(packed)} packed, {_size(dense)} dense (in bfloat16)",
        *([_at_load(unpacked)] if unpacked else []),
        *([_in_models(of_latents)] if of_latents else []),
        "",
    ]
    # one row for each way of storing a module
    rows = collections.defaultdict(list)
    for info in infos:
        rows[_scheme(info)].append(info)
    table: list[Sequence[str]] = [("kind", "bits", "group size", "zero points", *_COUNTED)]
    for scheme in sorted(rows, key=lambda s: ({"dense": 1, "other": 2}.get(s[0], 0), s)):
        table.append((*scheme, *_counts(rows[scheme])))
    table.append(("total", "", "", "", *_counts(infos)))
    lines += _aligned(table)
    if list_modules:
        shape = {info.name: " x ".join(map(str, info.shape)) or "-" for info in infos}
        table = [("module", "kind", "bits", "group size", "zero points", "K x N", "packed")]
        table += [(i.name, *_scheme(i), shape[i.name], _size(i.nbytes)) for i in infos]
        lines += ["", *_aligned(table)]
    return "\n".join(lines)


def _describe_tensors(path: pathlib.Path, reason: str) -> str:
    """Dtypes and bytes of a checkpoint whose format cannot be loaded."""
    shards = Shards(path)
    table: list[Sequence[str]] = [("dtype", "tensors", "bytes")]
    by_dtype = collections.defaultdict(list)
    for info in shards.tensors.values():
        by_dtype[info.dtype].append(info.nbytes)
    for dtype, sizes in sorted(by_dtype.items()):
        table.append((dtype, str(len(sizes)), _size(sum(sizes))))
    table.append(("total", str(len(shards.tensors)), _size(shards.nbytes)))
    lines = [
        f"checkpoint  {path}",
        f"format      cannot be loaded: {reason}",
        f"shards      {len(shards.paths)}",
        "",
    ]
    return "\n".join([*lines, *_aligned(table)])


def _format(checkpoint: Checkpoint) -> str:
    config = checkpoint.quantization
    if config is None:
        return "dense (nothing is quantized)"
    if len(config.checkpoint_formats) > 1:
        return f"each module one of {', '.join(config.checkpoint_formats)}"
    base, size = config.base, _group_size(config.base)
    if FORMATS[checkpoint.format].canonical is None:
        return f"{checkpoint.format}, {base.bits} bit, group size {size}, dequantized at load"
    zeros = {True: "symmetric", False: "asymmetric", None: "zero points as stored"}[base.symmetric]
    order = ", act-order" if base.desc_act else ""
    count = len(config.dynamic)
    rules = f", {count} dynamic rule{'s' * (count > 1)}" if count else ""
    return f"{checkpoint.format}, {base.bits} bit, group size {size}, {zeros}{order}{rules}"


def _experts(infos: Iterable[ModuleInfo]) -> str:
    experts = collections.defaultdict(set)
    for info in infos:
        match = _EXPERT.match(info.name)
        if match:
            experts[match["layer"]].add(match["expert"])
        elif len(info.shape) == 3:  # all experts in one module
            experts[info.name.rpartition(".experts.")[0]].update(map(str, range(info.shape[0])))
    counts = sorted({len(found) for found in experts.values()})
    if not counts:
        return "none"
    layers = "1 layer" if len(experts) == 1 else f"each of {len(experts)} layers"
    return f"{' or '.join(map(str, counts))} in {layers}"


def _scheme(info: ModuleInfo) -> tuple[str, str, str, str]:
    """How a module is stored: kind, bits, group size, zero points."""
    if info.quantization is None:
        return info.kind, "-", "-", "-"
    zeros = {True: "symmetric", False: "stored", None: "stored"}[info.quantization.symmetric]
    if info.is_dequantized:
        zeros = "none"
    return info.kind, str(info.quantization.bits), _group_size(info.quantization), zeros


def _group_size(quantization: ModuleQuantization) -> str:
    """Neighbours along K that share a scale; K x N where columns share it too."""
    size = "K" if quantization.group_size == -1 else str(quantization.group_size)
    if quantization.block_n == 1:
        return size
    return f"{size} x {'N' if quantization.block_n == -1 else quantization.block_n}"


def _at_load(infos: Sequence[ModuleInfo]) -> str:
    """What no kernel reads packed."""
    size = _size(sum(info.nbytes_dense for info in infos))
    verb = "module is" if len(infos) == 1 else "modules are"
    return f"at load     {len(infos)} {verb} dequantized, to {size} in bfloat16"


def _in_models(infos: Sequence[ModuleInfo]) -> str:
    """What latent attention multiplies head by head, and so not packed."""
    size = _size(sum(info.nbytes_dense for info in infos))
    return f"in models   {len(infos)} packed kv_b_proj become {size} in bfloat16 (models.load)"


def _counts(infos: Sequence[ModuleInfo]) -> tuple[str, ...]:
    """The columns of `_COUNTED`."""
    packed, dense = (sum(getattr(i, name) for i in infos) for name in ("nbytes", "nbytes_dense"))
    in_experts = sum(_EXPERT.match(info.name) is not None or len(info.shape) == 3 for info in infos)
    return str(len(infos)), str(in_experts), _size(packed), _size(dense)


def _size(nbytes: int) -> str:
    """Bytes in the largest unit that keeps the number at 1 or more."""
    value, units = float(nbytes), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{nbytes} B" if units[0] == "B" else f"{value:.2f} {units[0]}"


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """Rows with columns lined up: the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]
