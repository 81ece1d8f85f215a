"""A checkpoint of random experts, for timing what loads it, and a check of what was loaded."""

import json
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from jax_marlin.bench.check import WrongResultError
from jax_marlin.checkpoints.checkpoint import Checkpoint
from jax_marlin.weights import MarlinExpertStack
from jax_marlin.words import AWQ_COLUMNS

FORMATS = ("gptq", "act-order", "awq")
_BITS, _FIELDS = 4, 8
_SAMPLES = 16  # weights of each expert
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # of a word's columns


def write(
    directory: pathlib.Path, form: str, experts: int, k: int, n: int, group_size: int
) -> list[str]:
    """Writes one file and its config.

    Args:
        directory: exists.
        form: of `FORMATS`: GPTQ with rows in order, GPTQ whose experts each have an order of their
            own, or AWQ with zero points of any value.
        experts: E.
        k, n: of each; n a multiple of 8, k of 8 and of the group size.
        group_size: rows that share a scale.

    Returns:
        The experts' module names.
    """
    rng = np.random.default_rng(0)
    names = [f"model.layers.0.mlp.experts.{e}.down_proj" for e in range(experts)]
    tensors = {
        f"{name}.{part}": array
        for name in names
        for part, array in _tensors(form, rng, k, n, group_size).items()
    }
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")
    config: dict[str, Any] = {"bits": _BITS, "group_size": group_size}
    if form == "awq":
        config |= {"quant_method": "awq", "version": "gemm", "zero_point": True}
    else:
        config |= {"quant_method": "gptq", "sym": True, "desc_act": form == "act-order"}
    text = json.dumps({"model_type": "synthetic", "quantization_config": config})
    (directory / "config.json").write_text(text)
    return names


def weight_of(form: str, tensors: dict[str, np.ndarray], row: int, column: int) -> float:
    """One weight, from its own words: exact, and by no code that loads checkpoints.

    Args:
        form: of `FORMATS`.
        tensors: of one expert by the last part of their names.
        row, column: of the weight as the model sees it.
    """
    scales, words = tensors["scales"], tensors["qweight"].view(np.uint32)
    if form == "awq":
        group = row * len(scales) // len(words)
        place = _BITS * _AWQ_PLACES[column % AWQ_COLUMNS]
        of_column, zeros = column // AWQ_COLUMNS, tensors["qzeros"].view(np.uint32)
        code, zero = int(words[row, of_column]), int(zeros[group, of_column])
        return float(scales[group, column]) * ((code >> place & 15) - (zero >> place & 15))
    code = int(words[row // _FIELDS, column]) >> _BITS * (row % _FIELDS) & 15
    return float(scales[tensors["g_idx"][row], column]) * (code - 8)


def check(form: str, checkpoint: Checkpoint, names: list[str], stack: MarlinExpertStack) -> None:
    """Compares some weights of each expert with the file's words; they are equal, bit by bit.

    Args:
        form: of `FORMATS`.
        checkpoint, names: what `write` wrote.
        stack: of these experts.

    Raises:
        WrongResultError: a weight is not what the file says.
    """
    rng = np.random.default_rng(1)
    for e, name in enumerate(names):
        parts = ("qweight", "scales", "qzeros" if form == "awq" else "g_idx")
        tensors = {part: checkpoint.tensor(f"{name}.{part}") for part in parts}
        weight = np.asarray(stack[e].dequantize(jnp.float32))
        for row, column in zip(*(rng.integers(0, s, _SAMPLES) for s in weight.shape), strict=True):
            expected = weight_of(form, tensors, int(row), int(column))
            if weight[row, column] != expected:
                raise WrongResultError(
                    f"{form}: weight ({row}, {column}) of expert {e} is {weight[row, column]}, "
                    f"expected {expected}; not timed"
                )


def _tensors(form: str, rng: np.random.Generator, k: int, n: int, group_size: int) -> dict:
    groups = k // group_size
    scales = rng.uniform(0.5, 1.0, (groups, n)).astype(np.float16)
    if form == "awq":
        shape, zeros = (k, n // AWQ_COLUMNS), _words(rng, groups, n // AWQ_COLUMNS)
        return {"qweight": _words(rng, *shape), "qzeros": zeros, "scales": scales}
    g_idx = (np.arange(k) // group_size).astype(np.int32)
    return {
        "qweight": _words(rng, k // _FIELDS, n),
        "qzeros": np.full((groups, n // _FIELDS), 0x77777777, np.int32),  # 8, stored minus one
        "scales": scales,
        "g_idx": rng.permutation(g_idx) if form == "act-order" else g_idx,
    }


def _words(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Any words are codes."""
    return rng.integers(0, 2**32, shape, np.uint32).view(np.int32)
