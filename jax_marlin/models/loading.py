"""Builds a model from a checkpoint, one expert at a time, and accounts for every tensor in it."""

import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jax_marlin.act_order import fold_act_order
from jax_marlin.checkpoints import Checkpoint, open_checkpoint
from jax_marlin.linear import MarlinLinear
from jax_marlin.models.config import MODEL_TYPE, Qwen3MoeConfig
from jax_marlin.models.decoder_layer import Attention, DecoderLayer, DenseMlp, SparseMlp
from jax_marlin.models.layers import DenseLinear, Linear
from jax_marlin.models.qwen3_moe import Qwen3Moe


def load(path: str | os.PathLike[str], dtype: jax.typing.DTypeLike | None = None) -> Qwen3Moe:
    """Loads a checkpoint directory as a model on the default device.

    Quantized modules stay packed; whether a module is quantized is read from its tensors, so
    attention and lm_head may be either. Peak host memory is the packed model plus one expert.

    Args:
        path: a directory with config.json and safetensors of a Qwen3-MoE model whose experts are
            GPTQ-quantized.
        dtype: compute dtype: float16 or bfloat16 (CUDA kernels), or float32 (plain JAX anywhere).
            None: the dtype that config.json names.

    Returns:
        The model, a pytree: `model(input_ids)` gives logits, `generate(model, ids, n)` decodes.

    Raises:
        NotImplementedError: an architecture, or a setting of config.json, that is not implemented.
        ValueError: tensors are missing, malformed, or unknown to the architecture.

    >>> import jax_marlin as jm
    >>> from jax_marlin.data import bundled_checkpoint
    >>> model = jm.models.load(bundled_checkpoint(), dtype="float32")
    >>> len(model.layers), model.layers[0].mlp.down.shape
    (2, (8, 128, 256))
    """
    with open_checkpoint(path) as checkpoint:
        config = Qwen3MoeConfig.from_dict(checkpoint.config)
        return _Loader(checkpoint, config, _compute_dtype(checkpoint.config, dtype)).model()


def _compute_dtype(config: Mapping[str, Any], dtype: jax.typing.DTypeLike | None) -> jnp.dtype:
    name = dtype if dtype is not None else config.get("dtype", config.get("torch_dtype"))
    try:
        resolved = jnp.dtype(name)
    except TypeError:
        resolved = None
    if resolved in (jnp.float16, jnp.bfloat16, jnp.float32) and resolved is not None:
        return resolved
    origin = "the argument dtype is" if dtype is not None else "config.json's dtype is"
    raise ValueError(
        f"models.load: {origin} {name!r}, expected float16, bfloat16 or float32; pass dtype="
    )


class _Loader:
    """Reads modules by name and remembers which, so that a tensor nobody asked for is noticed."""

    def __init__(self, checkpoint: Checkpoint, config: Qwen3MoeConfig, dtype: jnp.dtype):
        self._checkpoint, self._config, self._dtype = checkpoint, config, dtype
        self._names = set(checkpoint.names())
        self._modules_read: set[str] = set()

    def model(self) -> Qwen3Moe:
        c = self._config
        embed = self._weight("model.embed_tokens", (c.vocab_size, c.hidden_size))
        layers = tuple(self._layer(i) for i in range(len(c.sparse_layers)))
        norm = self._weight("model.norm", (c.hidden_size,))
        lm_head = None
        if c.tie_word_embeddings:
            self._modules_read.add("lm_head")  # some writers repeat the embedding here
        else:
            lm_head = self._linear("lm_head", (c.hidden_size, c.vocab_size))
        self._check_all_read()
        return Qwen3Moe(embed, layers, norm, lm_head, c)

    def _layer(self, i: int) -> DecoderLayer:
        c, prefix = self._config, f"model.layers.{i}"
        return DecoderLayer(
            input_layernorm=self._weight(f"{prefix}.input_layernorm", (c.hidden_size,)),
            self_attn=self._attention(f"{prefix}.self_attn"),
            post_attention_layernorm=self._weight(
                f"{prefix}.post_attention_layernorm", (c.hidden_size,)
            ),
            mlp=(self._sparse_mlp if c.sparse_layers[i] else self._dense_mlp)(f"{prefix}.mlp"),
        )

    def _attention(self, prefix: str) -> Attention:
        c = self._config
        queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        return Attention(
            q_proj=self._linear(f"{prefix}.q_proj", (c.hidden_size, queries), c.attention_bias),
            k_proj=self._linear(f"{prefix}.k_proj", (c.hidden_size, keys), c.attention_bias),
            v_proj=self._linear(f"{prefix}.v_proj", (c.hidden_size, keys), c.attention_bias),
            o_proj=self._linear(f"{prefix}.o_proj", (queries, c.hidden_size), c.attention_bias),
            q_norm=self._weight(f"{prefix}.q_norm", (c.head_dim,)),
            k_norm=self._weight(f"{prefix}.k_norm", (c.head_dim,)),
            config=c,
        )

    def _dense_mlp(self, prefix: str) -> DenseMlp:
        c = self._config
        wide, narrow = (c.hidden_size, c.intermediate_size), (c.intermediate_size, c.hidden_size)
        return DenseMlp(
            gate_proj=self._linear(f"{prefix}.gate_proj", wide),
            up_proj=self._linear(f"{prefix}.up_proj", wide),
            down_proj=self._linear(f"{prefix}.down_proj", narrow),
            config=c,
        )

    def _sparse_mlp(self, prefix: str) -> SparseMlp:
        c, ckpt = self._config, self._checkpoint
        experts = [f"{prefix}.experts.{e}" for e in range(c.num_experts)]
        pairs = [(f"{expert}.gate_proj", f"{expert}.up_proj") for expert in experts]
        downs = [f"{expert}.down_proj" for expert in experts]
        if ckpt.can_fuse(pairs):
            gate_up = ckpt.load_expert_stack(pairs, self._dtype)
        else:
            gate, up = ckpt.load_expert_stacks(pairs, self._dtype)
            gate_up = (gate, up)
        down = ckpt.load_expert_stack(downs, self._dtype)
        self._modules_read.update(*pairs, downs)
        expected = (c.num_experts, c.hidden_size, c.moe_intermediate_size)
        for half in gate_up if isinstance(gate_up, tuple) else (gate_up,):
            width = expected[2] * (1 if isinstance(gate_up, tuple) else 2)
            self._check_shape(f"{prefix}.experts gate and up", half.shape, (*expected[:2], width))
        self._check_shape(
            f"{prefix}.experts down", down.shape, (expected[0], expected[2], expected[1])
        )
        # gate_up writes its columns in down's row order: only gate_up's input is gathered.
        gate_up, down = fold_act_order(gate_up, down)
        router = self._linear(f"{prefix}.gate", (c.hidden_size, c.num_experts))
        return SparseMlp(router, gate_up, down, c)

    def _linear(self, module: str, shape: tuple[int, int], needs_bias: bool = False) -> Linear:
        """One linear [K, N], packed if its tensors are, with the bias that lies beside them."""
        weight = self._checkpoint.load_linear(module, self._dtype)
        self._modules_read.add(module)
        self._check_shape(module, weight.shape, shape)
        if needs_bias and f"{module}.bias" not in self._names:
            raise ValueError(
                f"models.load: {module} has no bias, expected one because config.json "
                "says attention_bias"
            )
        if isinstance(weight, MarlinLinear):
            return weight
        return DenseLinear(weight, self._checkpoint.bias(module, self._dtype))

    def _weight(self, module: str, shape: tuple[int, ...]) -> jax.Array:
        """The `weight` of a norm or an embedding."""
        weight = self._checkpoint.dense(f"{module}.weight", self._dtype)
        self._modules_read.add(module)
        self._check_shape(module, weight.shape, shape)
        return weight

    def _check_shape(self, module: str, got: tuple[int, ...], expected: tuple[int, ...]) -> None:
        if got != expected:
            raise ValueError(
                f"models.load: {module} has shape {got}, expected {expected} by config.json"
            )

    def _check_all_read(self) -> None:
        """A tensor left over means that the model computes something else than the checkpoint's."""
        left = sorted(
            name
            for name in self._names
            if name.rpartition(".")[0] not in self._modules_read
            and not name.endswith("rotary_emb.inv_freq")  # follows from rope_theta
        )
        if left:
            raise ValueError(
                f"models.load: {len(left)} tensors have no place in {MODEL_TYPE} as config.json "
                f"describes it, such as {', '.join(left[:3])}"
            )
