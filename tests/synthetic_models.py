"""Writes the parts that small synthetic decoders share: embedding, norms, attention, head."""

import numpy as np
from synthetic_checkpoints import gptq_tensors

HIDDEN, LAYERS, VOCAB, HEADS, KV_HEADS, HEAD_DIM = 64, 2, 80, 6, 2, 16
# The keys of config.json about those parts, by their newer names.
CONFIG = {
    "dtype": "float32", "vocab_size": VOCAB, "hidden_size": HIDDEN, "head_dim": HEAD_DIM,
    "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 64, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}  # fmt: skip
IDS = np.array([[3, 1, 4, 1, 5, 79], [9, 2, 6, 5, 3, 58]])


class Modules:
    """Random modules for `synthetic_checkpoints.write`, and what they mean.

    Attributes:
        parts: module -> part -> array as stored.
        weights: module -> float64 [K, N] of those that are linears.
    """

    def __init__(self, seed, *, qkv_bias=False):
        self._rng = np.random.default_rng(seed)
        self.parts, self.weights = {}, {}
        for module in ("model.embed_tokens", "lm_head"):
            self.dense(module, HIDDEN, VOCAB)
        self.norm("model.norm")
        queries, keys = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
        for i in range(LAYERS):
            layer = f"model.layers.{i}"
            self.norm(f"{layer}.input_layernorm")
            self.norm(f"{layer}.post_attention_layernorm")
            for name, width in [("q_proj", queries), ("k_proj", keys), ("v_proj", keys)]:
                self.packed(f"{layer}.self_attn.{name}", HIDDEN, width, bias=qkv_bias)
            self.packed(f"{layer}.self_attn.o_proj", queries, HIDDEN)

    def norm(self, module):
        self.parts[module] = {"weight": self._rng.standard_normal(HIDDEN).astype(np.float16)}

    def dense(self, module, k, n):
        weight = (self._rng.standard_normal((n, k)) / 8).astype(np.float16)
        self.parts[module], self.weights[module] = {"weight": weight}, weight.T.astype(np.float64)

    def packed(self, module, k, n, *, bias=False):
        seed = int(self._rng.integers(1 << 30))
        tensors, weight = gptq_tensors(seed, k, n, symmetric=False, bias=bias)
        self.parts[module], self.weights[module] = tensors, weight
