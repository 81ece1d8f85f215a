"""Finds the family of a checkpoint, builds its model, and accounts for every tensor in it."""

import contextlib
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from jax_marlin.checkpoints import open_checkpoint
from jax_marlin.models import (
    deepseek_v3,
    gpt_oss,
    llama,
    mixtral,
    qwen2_moe,
    qwen3,
    qwen3_moe,
)
from jax_marlin.models.causal_lm import CausalLM
from jax_marlin.models.config import DecoderConfig
from jax_marlin.models.config_keys import names
from jax_marlin.models.family import Family
from jax_marlin.models.module_reader import ModuleReader

_FAMILIES = {
    family.model_type: family
    for family in (
        llama.FAMILY,
        mixtral.FAMILY,
        qwen2_moe.FAMILY,
        qwen3.FAMILY,
        qwen3_moe.FAMILY,
        deepseek_v3.FAMILY,
        deepseek_v3.KIMI_K2,
        gpt_oss.FAMILY,
    )
}


def load(
    path: str | os.PathLike[str],
    dtype: jax.typing.DTypeLike | None = None,
    *,
    sharding: NamedSharding | None = None,
    cache: bool | str | os.PathLike[str] = False,
    progress: bool = False,
) -> CausalLM:
    """Loads a checkpoint directory as a model, on the default device or where `sharding` says.

    Modules in formats that kernels read (GPTQ, AWQ, compressed-tensors' pack-quantized) stay
    packed; MXFP4, NVFP4 and FP8 are dequantized to `dtype`, experts into a `DenseExpertStack`, and
    so is DeepSeek's kv_b_proj in any format, since its cache holds latents (see `inspect`).
    Whether a module is quantized is read from its tensors, so attention, experts and lm_head may
    be either. Both generations of config keys are read (`num_experts` or `num_local_experts`,
    `rope_theta` or `rope_parameters`). Peak host memory is what the host's devices hold plus one
    expert a thread, for gpt-oss plus the stored experts of one layer; with devices of their own
    memory one expert stack, or one device's part of it.

    Args:
        path: a directory with config.json and safetensors of a Llama, Mixtral, Qwen2-MoE, Qwen3,
            Qwen3-MoE, DeepSeek-V3 (R1, Kimi-K2) or gpt-oss model.
        dtype: compute dtype: float16 or bfloat16 (CUDA kernels), or float32 (plain JAX anywhere).
            None: the dtype that config.json names.
        sharding: how devices share each stack of experts, as in `Checkpoint.load_expert_stack`:
            `NamedSharding(mesh, PartitionSpec("expert"))` gives each device whole experts. Parts go
            straight to their devices, and of several processes each reads the weights of its own
            experts alone. Everything else is placed on every device of the mesh.
        cache: a directory in which packed weights are kept, so that the next start reads them at
            the speed of the disk; True means `$JAX_MARLIN_CACHE`, or the user's cache directory.
            Weights of a checkpoint whose files or config changed in any way are packed anew.
        progress: shows a tqdm bar of bytes on stderr.

    Returns:
        The model, a pytree: `model(input_ids)` gives logits, `generate(model, ids, n)` decodes.

    Raises:
        NotImplementedError: an architecture, or a setting of config.json that changes the result,
            that is not implemented: a sliding window where the family has none, a rope other than
            plain, Llama 3's and YaRN, an unknown activation.
        ValueError: tensors are missing, malformed, or unknown to the architecture; keys of
            config.json are missing or contradict each other.

    >>> import jax_marlin as jm
    >>> from jax_marlin.data import bundled_checkpoint
    >>> model = jm.models.load(bundled_checkpoint(), dtype="float32")
    >>> len(model.layers), model.layers[0].mlp.down.shape
    (2, (8, 128, 256))
    """
    with open_checkpoint(path) as checkpoint, contextlib.ExitStack() as stack:
        family, config = read_config(checkpoint.config)
        if cache:
            checkpoint.keep_packed(None if cache is True else cache)
        bar = None
        if progress:
            import tqdm  # a progress bar is no reason for the library to load it

            bar = stack.enter_context(
                tqdm.tqdm(
                    total=checkpoint.nbytes, desc="loading", unit="B", unit_scale=True, leave=False
                )
            )
        chosen = _compute_dtype(checkpoint.config, dtype)
        reader = ModuleReader(checkpoint, chosen, sharding, bar)
        return read_model(reader, family, config)


def read_config(config: Mapping[str, Any]) -> tuple[Family, DecoderConfig]:
    """The family that config.json names, and what that family keeps of it."""
    model_type, architectures = config.get("model_type"), names(config, "architectures")
    family = _FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None or (architectures is not None and family.architecture not in architectures):
        known = ", ".join(f"{f.model_type!r} with {f.architecture}" for f in _FAMILIES.values())
        raise NotImplementedError(
            f"models.load: config.json has model_type {model_type!r} and architectures "
            f"{architectures}, expected one of: {known}; no other model is implemented"
        )
    return family, family.read_config(config)


def read_model(reader: ModuleReader, family: Family, c: DecoderConfig) -> CausalLM:
    embed = reader.weight("model.embed_tokens", (c.vocab_size, c.hidden_size))
    layers = tuple(family.read_layer(reader, c, i) for i in range(len(c.sparse_layers)))
    norm = reader.weight("model.norm", (c.hidden_size,))
    for prefix in family.unused(c):
        reader.skip(prefix)
    lm_head = None
    if c.tie_word_embeddings:
        reader.mark_read("lm_head")  # some writers repeat the embedding here
    else:
        lm_head = reader.linear("lm_head", (c.hidden_size, c.vocab_size))
    if left := reader.unread():  # the model would compute something else than the checkpoint's
        raise ValueError(
            f"models.load: {len(left)} tensors have no place in {c.model_type} as config.json "
            f"describes it, such as {', '.join(left[:3])}"
        )
    return CausalLM(embed, layers, norm, lm_head, c)


def _compute_dtype(config: Mapping[str, Any], dtype: jax.typing.DTypeLike | None) -> jnp.dtype:
    name = dtype if dtype is not None else config.get("dtype", config.get("torch_dtype"))
    resolved = None
    # NumPy would read a file's text as a dtype of many fields, an object as one with names.
    if dtype is not None or name in ("float16", "bfloat16", "float32"):
        with contextlib.suppress(TypeError):
            resolved = jnp.dtype(name)
    if resolved in (jnp.float16, jnp.bfloat16, jnp.float32) and resolved is not None:
        return resolved
    origin = "the argument dtype is" if dtype is not None else "config.json's dtype is"
    raise ValueError(
        f"models.load: {origin} {name!r}, expected float16, bfloat16 or float32; pass dtype="
    )
