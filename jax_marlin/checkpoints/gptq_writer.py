"""`save_checkpoint`: packed weights back to an ordinary GPTQ checkpoint that other tools read."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jax_marlin.canonical import CanonicalLinear
from jax_marlin.checkpoints.gptq_config import Parameters, quantization_config
from jax_marlin.checkpoints.shard_writer import ShardWriter
from jax_marlin.dense_stack import DenseExpertStack
from jax_marlin.gptq_format import canonical_to_gptq
from jax_marlin.host_arrays import host_array
from jax_marlin.unpack import unpack_linear
from jax_marlin.weights import MarlinExpertStack, MarlinLinear

Name = str | tuple[str, ...]
_FORMATS = ("gptq", "gptq_v2")


def save_checkpoint(
    path: str | os.PathLike[str],
    weights: Mapping[Any, Any] | Iterable[tuple[Name, Any]],
    config: Mapping[str, Any] | None = None,
    *,
    checkpoint_format: str = "gptq",
    max_shard_bytes: int = 4 * 2**30,
) -> None:
    """Writes weights as a GPTQ checkpoint: safetensors and a config.json that says how to read it.

    Codes, scales, zero points, act-order and biases are those that the weights hold, bit for bit.
    The directory appears when it is complete, never half written. Host memory holds one file's
    tensors; give an iterator, and weights need not exist all at once.

    Args:
        path: the directory to write; it must not exist, or be empty.
        weights: names and weights. A `MarlinLinear` goes under its module's name; a
            `MarlinExpertStack` under a name with `{}` for the number of the expert; several names,
            as `("experts.{}.gate_proj", "experts.{}.up_proj")`, share the columns equally. A
            `DenseExpertStack` is named so too, and stays unquantized. Any other array is stored as
            it is under its full name (`model.norm.weight`).
        config: what else config.json says of the model; its quantization_config is replaced.
        checkpoint_format: `"gptq"`, version 1, which every reader knows; or `"gptq_v2"`, which
            GPTQModel wants for asymmetric weights that it has not written itself.
        max_shard_bytes: above this another file is begun.

    Returns:
        None.

    Raises:
        FileExistsError: the directory holds files.
        TypeError: a traced weight, or something that is neither a weight nor an array.
        ValueError: names and weights do not fit, a name is given twice, or there are no weights.

    Source: `qlinear/__init__.py` and `utils/model.py` of ModelCloud/GPTQModel.

    >>> import pathlib, tempfile, jax_marlin as jm, numpy as np
    >>> stack = jm.quantize(np.ones((2, 64, 128), np.float16), group_size=32)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder) / "model"
    ...     jm.checkpoints.save_checkpoint(path, {"experts.{}.up_proj": stack})
    ...     with jm.checkpoints.open_checkpoint(path) as checkpoint:
    ...         checkpoint.format, list(checkpoint.modules)
    ('gptq', ['experts.0.up_proj', 'experts.1.up_proj'])
    """
    where = "save_checkpoint"
    if checkpoint_format not in _FORMATS:
        raise ValueError(
            f"{where}: checkpoint_format is {checkpoint_format!r}, expected one of {_FORMATS}"
        )
    target = pathlib.Path(path)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{where}: {target} exists, expected a new or an empty directory")
    target.parent.mkdir(parents=True, exist_ok=True)
    parameters: dict[str, Parameters] = {}
    dense, desc_act = [], False
    partial = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        writer = ShardWriter(partial, max_shard_bytes)
        items: Any = weights.items() if isinstance(weights, Mapping) else weights
        for name, weight in items:
            if isinstance(weight, DenseExpertStack):
                for module, tensors in _dense_modules(name, weight, where):
                    writer.add({f"{module}.{key}": array for key, array in tensors.items()}, where)
                    dense.append(module)
                continue
            if not isinstance(weight, MarlinLinear | MarlinExpertStack):
                array = _dense_tensor(name, weight, where)
                writer.add({str(name): array}, where)
                if array.ndim == 2 and str(name).endswith(".weight"):
                    dense.append(str(name).removesuffix(".weight"))
                continue
            spec = (weight if isinstance(weight, MarlinExpertStack) else weight.stack).spec
            for module, part in _modules(name, weight, where):
                tensors = canonical_to_gptq(
                    part,
                    group_size=spec.group_size,
                    checkpoint_format=checkpoint_format,
                )
                writer.add({f"{module}.{key}": array for key, array in tensors.items()}, where)
                parameters[module] = Parameters(
                    spec.bits, spec.group_size, part.zero_points is None, spec.k
                )
                desc_act |= part.perm is not None
        if not parameters and not dense:
            raise ValueError(f"{where}: weights is empty, expected at least one weight")
        writer.finish()
        contents = {k: v for k, v in (config or {}).items() if k != "quantization_config"}
        if parameters:
            contents["quantization_config"] = quantization_config(
                parameters, dense, desc_act, checkpoint_format
            )
        (partial / "config.json").write_text(json.dumps(contents, indent=2) + "\n")
        partial.chmod(0o755)  # mkdtemp's is for the owner alone
        partial.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _dense_tensor(name: Name, weight: Any, where: str) -> np.ndarray:
    if not isinstance(name, str):
        raise ValueError(f"{where}: {name} names an array, expected one full name")
    array = np.ascontiguousarray(host_array(weight, name, where))
    if array.dtype == object:
        raise TypeError(
            f"{where}: {name} is {type(weight).__name__}, expected a MarlinLinear, a "
            "MarlinExpertStack, a DenseExpertStack or an array"
        )
    return array


def _modules(
    name: Name, weight: MarlinLinear | MarlinExpertStack, where: str
) -> Iterator[tuple[str, CanonicalLinear]]:
    """Each module of one packed weight: its name, and its part of the columns."""
    stacked = isinstance(weight, MarlinExpertStack) and not weight.is_single
    parts = _parts(name, weight, stacked, where)
    if isinstance(weight, MarlinLinear):
        linears: Iterable[MarlinLinear] = [weight]
    else:
        linears = (weight[e] for e in range(len(weight))) if stacked else [weight.as_linear()]
    for e, linear in enumerate(linears):
        whole = unpack_linear(linear, where)
        for one, columns in parts:
            yield one.replace("{}", str(e)), _columns(whole, columns)


def _dense_modules(
    name: Name, stack: DenseExpertStack, where: str
) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Each module of unquantized experts: its name, and `weight` [N, K] and `bias` of its part."""
    parts = _parts(name, stack, not stack.is_single, where)
    for e in range(len(stack)):
        one_expert = stack if stack.is_single else jax.tree.map(lambda leaf, e=e: leaf[e], stack)
        leaves = {"weight": one_expert.weight.T, "bias": one_expert.bias}
        tensors = {key: host_array(a, key, where) for key, a in leaves.items() if a is not None}
        for one, columns in parts:
            module = {key: np.ascontiguousarray(array[columns]) for key, array in tensors.items()}
            yield one.replace("{}", str(e)), module


def _parts(name: Name, weight: Any, stacked: bool, where: str) -> list[tuple[str, slice]]:
    """The names of a weight's modules, checked, and the columns of each."""
    names = (name,) if isinstance(name, str) else tuple(name)
    for one in names:
        if stacked != ("{}" in one):
            expected = "`{}` for the number of the expert" if stacked else "no `{}`"
            raise ValueError(f"{where}: name {one!r} of {weight!r}, expected {expected} in it")
    n = weight.shape[-1]
    if n % len(names):
        raise ValueError(f"{where}: {names} cannot share {n} columns equally")
    width = n // len(names)
    return [(one, slice(i * width, (i + 1) * width)) for i, one in enumerate(names)]


def _columns(whole: CanonicalLinear, columns: slice) -> CanonicalLinear:
    def take(array: np.ndarray | None) -> np.ndarray | None:
        return None if array is None else np.ascontiguousarray(array[..., columns])

    return dataclasses.replace(
        whole,
        words=whole.words[:, columns],
        scales=whole.scales[:, columns],
        zero_points=take(whole.zero_points),
        bias=take(whole.bias),
    )
