"""Models with random weights, made on the device: any family, any size, without a checkpoint."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jax_marlin.bench.problems import Quantization, random_key, random_stack
from jax_marlin.models.causal_lm import CausalLM
from jax_marlin.models.layers import DenseLinear, Linear, SideBySide
from jax_marlin.models.loading import read_config, read_model
from jax_marlin.models.module_reader import ModuleReader
from jax_marlin.quant_spec import QuantSpec
from jax_marlin.weights import MarlinExpertStack

_QWEN3_MOE = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "norm_topk_prob": True,
}
# name -> config.json
CONFIGS: dict[str, dict[str, Any]] = {
    "tiny": _QWEN3_MOE | {
        "vocab_size": 512, "hidden_size": 128, "head_dim": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 8,
        "num_experts_per_tok": 2, "moe_intermediate_size": 64, "max_position_embeddings": 4096,
    },
    "qwen3-30b": _QWEN3_MOE | {  # Qwen3-30B-A3B
        "vocab_size": 151936, "hidden_size": 2048, "head_dim": 128, "num_hidden_layers": 48,
        "num_attention_heads": 32, "num_key_value_heads": 4, "num_experts": 128,
        "num_experts_per_tok": 8, "moe_intermediate_size": 768, "max_position_embeddings": 40960,
    },
}  # fmt: skip
# What quantized checkpoints leave as it is; lm_head unless asked for.
_UNQUANTIZED = ("gate", "shared_expert_gate")


def random_model(
    name: str, quantization: Quantization, *, quantized_lm_head: bool = False
) -> CausalLM:
    """A model of `CONFIGS` whose activations stay of order one.

    Args:
        name: of the config.
        quantization: of all linears but the routers (and lm_head).
        quantized_lm_head: quantize it, too; real checkpoints seldom do.

    Returns:
        The model as `models.load` builds it, on the default device; its weights never exist on the
        host.

    Raises:
        ValueError: there is no such config.
    """
    if name not in CONFIGS:
        raise ValueError(f"bench: no model is named {name!r}, expected one of {', '.join(CONFIGS)}")
    family, config = read_config(CONFIGS[name])
    return read_model(_RandomModules(quantization, quantized_lm_head), family, config)


class _RandomModules(ModuleReader):
    """In a checkpoint's place: each module that is asked for is made, in the shape asked for."""

    def __init__(self, quantization: Quantization, quantized_lm_head: bool):
        self._quantization = quantization
        self._unquantized = _UNQUANTIZED if quantized_lm_head else (*_UNQUANTIZED, "lm_head")
        self._made = 0

    def has(self, module: str) -> bool:
        return True

    def linear(self, module: str, shape: tuple[int, int], needs_bias: bool = False) -> Linear:
        dtype = self._quantization.dtype
        bias = jax.random.normal(self._key(), shape[1:], dtype) if needs_bias else None
        if module.split(".")[-1] in self._unquantized:
            weight = jax.random.normal(self._key(), shape[::-1], dtype) / math.sqrt(shape[0])
            return DenseLinear(weight.astype(dtype), bias)
        return dataclasses.replace(self._stack(1, *shape)[0], bias=bias)

    def side_by_side(
        self, widths: Mapping[str, int], k: int, needs_bias: bool = False
    ) -> SideBySide:
        return self.linear(next(iter(widths)), (k, sum(widths.values())), needs_bias)

    def parameter(
        self, module: str, part: str, shape: tuple[int, ...], dtype: DTypeLike | None = None
    ) -> jax.Array:
        dtype = dtype or self._quantization.dtype
        if module.endswith("q_norm"):  # so large that queries attend to few keys, as trained ones
            return jnp.full(shape, 4, dtype)
        if len(shape) == 1:
            return jnp.ones(shape, dtype)
        return jax.random.normal(self._key(), shape, dtype)

    def experts(
        self, prefix: str, names: tuple[str, str, str], shape: tuple[int, int, int]
    ) -> tuple[MarlinExpertStack, MarlinExpertStack]:
        num_experts, outer, inner = shape
        return (
            self._stack(num_experts, outer, 2 * inner),
            self._stack(num_experts, inner, outer),
        )

    def mark_read(self, *modules: str) -> None:
        """Nothing was there to be read."""

    def skip(self, prefix: str) -> None:
        """Nothing was there to be read."""

    def unread(self) -> list[str]:
        return []

    def _stack(self, num_experts: int, k: int, n: int) -> MarlinExpertStack:
        bits, group_size, dtype = self._quantization
        spec = QuantSpec.create(bits=bits, group_size=group_size, k=k, n=n, where="bench")
        return random_stack(self._key(), num_experts, spec, dtype)

    def _key(self) -> jax.Array:
        self._made += 1
        return random_key(self._made)
