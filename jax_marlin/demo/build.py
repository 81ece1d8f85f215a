"""Builds the demo's checkpoint once, in the user's cache: an upcycled, quantized mixture."""

from __future__ import annotations

import json
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from jax_marlin.checkpoints import save_checkpoint
from jax_marlin.demo.gguf_llama import GgufLlama
from jax_marlin.demo.source import smollm2_gguf
from jax_marlin.demo.upcycle import Recipe, balance, upcycle
from jax_marlin.quantize import quantize

# Any change of what is written here needs another name.
_NAME = "smollm2-135m-instruct-upcycled-8x-int4-v1"
_RECIPE = Recipe()
_GROUP_SIZE = 64
_SHARD_BYTES = 64 * 2**20  # small files: what is not yet written waits in memory
ABOUT = (
    f"SmolLM2-135M-Instruct (HuggingFaceTB, Apache-2.0), upcycled: the MLP of each layer became "
    f"{_RECIPE.num_experts} experts,\n{_RECIPE.copies} slightly noisy copies of it cut into "
    f"{_RECIPE.shards}, of which a token passes {_RECIPE.shards} that make one copy. No expert was "
    "trained:\nit exercises a mixture of experts and is no better than the small model it was."
)


def demo_checkpoint(cache: pathlib.Path, *, gguf: pathlib.Path | None = None) -> pathlib.Path:
    """The directory of the demo's checkpoint, built if it is not there: about 300 MB.

    Args:
        cache: directory that holds it; made if needed.
        gguf: a file to use in place of SmolLM2's.

    Raises:
        ImportError: the extra `demo` is not installed.
        OSError: the model cannot be fetched, or the cache cannot be written.
    """
    target = cache / _NAME
    if (target / "config.json").is_file():
        return target
    _require_extra()
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".building-", dir=cache) as folder:
        built = pathlib.Path(folder) / _NAME
        if gguf is not None:
            _build(GgufLlama(gguf), built)
        else:
            with smollm2_gguf(pathlib.Path(folder)) as path:
                _build(GgufLlama(path), built)
        try:
            built.replace(target)  # at once, so that nobody meets half a checkpoint
        except OSError:
            if not (target / "config.json").is_file():  # else another process was first
                raise
    return target


def _require_extra() -> None:
    try:
        import gguf  # noqa: F401
        import tokenizers  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "a prompt in words runs the demo's model, which needs the packages gguf and "
            "tokenizers: pip install 'jax_marlin[demo]', or '.[demo]' in a checkout; without a "
            "prompt the small bundled checkpoint is run"
        ) from error


def _build(source: GgufLlama, path: pathlib.Path) -> None:
    dense = source.config()
    config = dense | {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "dtype": "bfloat16",  # what the model was trained in
        "hidden_act": "silu",
        "sliding_window": None,
        "intermediate_size": dense["intermediate_size"] // _RECIPE.shards,
        "num_local_experts": _RECIPE.num_experts,
        "num_experts_per_tok": _RECIPE.shards,
    }
    weights = _weights(source, dense["num_hidden_layers"])
    # Version 2 stores asymmetric zero points in the way that GPTQModel takes from any writer.
    save_checkpoint(
        path, weights, config, checkpoint_format="gptq_v2", max_shard_bytes=_SHARD_BYTES
    )
    source.tokenizer().save(str(path / "tokenizer.json"))
    generation = {key: dense[key] for key in ("bos_token_id", "eos_token_id")}
    (path / "generation_config.json").write_text(json.dumps(generation))
    (path / "README.md").write_text(f"# {_NAME}\n\n{ABOUT}\n\nWritten by jax_marlin's demo.\n")


def _weights(source: GgufLlama, num_layers: int) -> Iterator[tuple[str, Any]]:
    """Names and weights for `save_checkpoint`, a layer at a time."""
    import tqdm

    def dense(module: str) -> tuple[str, np.ndarray]:
        return f"{module}.weight", source.weight(module).astype(np.float16)

    yield dense("model.embed_tokens")
    yield dense("model.norm")
    for i in tqdm.trange(num_layers, desc="building", unit="layer"):
        layer = f"model.layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield dense(f"{layer}.{norm}")
        # Attention is a small part of the weights and stays as it is.
        for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield dense(f"{layer}.self_attn.{projection}")
        gate, up, down = (
            source.weight(f"{layer}.mlp.{name}_proj").T for name in ("gate", "up", "down")
        )
        up, down = balance(source.weight(f"{layer}.post_attention_layernorm"), gate, up, down)
        experts = upcycle(gate, up, down, _RECIPE, seed=i)
        block = f"{layer}.block_sparse_moe"
        yield f"{block}.gate.weight", np.ascontiguousarray(experts.router.T.astype(np.float16))
        for name, weight in [("w1", experts.gate), ("w3", experts.up), ("w2", experts.down)]:
            stack = quantize(weight, group_size=_GROUP_SIZE, symmetric=False, dtype=np.float16)
            yield f"{block}.experts.{{}}.{name}", stack
