"""`open_checkpoint`: a directory's config and headers, read and checked before any weight."""

from __future__ import annotations

import os
import pathlib

from jax_marlin.checkpoints import json_file
from jax_marlin.checkpoints.checkpoint import Checkpoint
from jax_marlin.checkpoints.config_files import read_quantize_config
from jax_marlin.checkpoints.modules import find_modules
from jax_marlin.checkpoints.shards import Shards


def open_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Opens a quantized or unquantized directory; reads headers, no weights.

    Which modules are quantized is seen from their tensors; the config says with what parameters. Of
    compressed-tensors the two numbers of each `weight_shape` are read too. GPTQ, AWQ,
    compressed-tensors (pack-quantized) and AutoRound weights stay packed; MXFP4, NVFP4 and FP8
    weights are dequantized when they are loaded.

    Args:
        path: directory with config.json and .safetensors files, sharded (with an index) or not.

    Returns:
        A `Checkpoint`, which may be used in a `with` statement.

    Raises:
        ValueError: files are missing, truncated or contradict each other; the message names the
            file and the tensor.
        NotImplementedError: a method, format or number of bits that does not load.

    >>> import pathlib, jax_marlin
    >>> path = pathlib.Path(jax_marlin.__file__).parent / "data" / "qwen3moe-gptq-sym-g128"
    >>> with open_checkpoint(path) as checkpoint:
    ...     w = checkpoint.load_linear("model.layers.0.self_attn.q_proj")
    >>> checkpoint.format, w.shape
    ('gptq', (256, 256))
    """
    directory = pathlib.Path(path)
    if not directory.is_dir():
        raise ValueError(
            f"open_checkpoint: {directory} is not a directory; pass the folder with config.json"
        )
    config_path = directory / "config.json"
    config = json_file.read_object(config_path) if config_path.is_file() else {}
    quantization = read_quantize_config(directory, config)
    shards = Shards(directory)
    return Checkpoint(
        directory,
        config,
        quantization,
        shards,
        find_modules(shards.tensors, quantization, shards.read),
    )
