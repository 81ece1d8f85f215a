"""A Llama model in a GGUF file: its weights as a Llama checkpoint names them, and its tokenizer."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np

# our name of a part of layer i -> GGUF's, both followed by ".weight"
_LAYER_PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_MODEL_PARTS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
_CONTROL = 3  # the token type of `<|im_start|>` and the like
# The value of tokenizer.ggml.pre that is understood here: digits one by one, then GPT-2's split.
_SPLITTER = "smollm"


class GgufLlama:
    """One file, memory-mapped; weights are dequantized when they are asked for.

    Args:
        path: a GGUF file of architecture `llama` whose embeddings are tied.

    Raises:
        ImportError: the package `gguf` is not installed.
        ValueError: not such a file.
    """

    def __init__(self, path: pathlib.Path) -> None:
        import gguf

        self._dequantize = gguf.dequantize
        self._fields = (reader := gguf.GGUFReader(path)).fields
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        architecture = self._field("general.architecture")
        if architecture != "llama" or "output.weight" in self._tensors:
            raise ValueError(
                f"GgufLlama: {path} is of architecture {architecture!r}, expected 'llama' with the "
                "embedding as its output"
            )

    def config(self) -> dict[str, Any]:
        """What a Llama's config.json says."""
        heads = self._field("llama.attention.head_count")
        return {
            "vocab_size": self._field("llama.vocab_size"),
            "hidden_size": self._field("llama.embedding_length"),
            "intermediate_size": self._field("llama.feed_forward_length"),
            "num_hidden_layers": self._field("llama.block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._field("llama.attention.head_count_kv"),
            "head_dim": self._field("llama.embedding_length") // heads,
            "max_position_embeddings": self._field("llama.context_length"),
            "rms_norm_eps": round(self._field("llama.attention.layer_norm_rms_epsilon"), 9),
            "rope_theta": self._field("llama.rope.freq_base"),
            "tie_word_embeddings": True,
            "bos_token_id": self._field("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self._field("tokenizer.ggml.eos_token_id"),
        }

    def weight(self, module: str) -> np.ndarray:
        """float32, `[N, K]` of a linear, `[vocab, H]` of the embedding, `[H]` of a norm."""
        name = _MODEL_PARTS.get(module)
        if name is None:
            layer, part = module.removeprefix("model.layers.").split(".", 1)
            name = f"blk.{layer}.{_LAYER_PARTS[part]}"
        tensor = self._tensors[f"{name}.weight"]
        weight = self._dequantize(tensor.data, tensor.tensor_type)
        if module.endswith(("q_proj", "k_proj")):
            # GGUF pairs neighbours for the rotation, (0, 1), (2, 3), ..., checkpoints pair halves.
            part = "head_count" if module.endswith("q_proj") else "head_count_kv"
            heads, (n, k) = self._field(f"llama.attention.{part}"), weight.shape
            weight = weight.reshape(heads, n // heads // 2, 2, k).swapaxes(1, 2).reshape(n, k)
        return weight

    def tokenizer(self) -> Any:
        """The `tokenizers.Tokenizer` that the file describes.

        Raises:
            ImportError: the package `tokenizers` is not installed.
            NotImplementedError: text is split in a way that is not known here.
        """
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers

        kind = (self._field("tokenizer.ggml.model"), self._field("tokenizer.ggml.pre"))
        if kind != ("gpt2", _SPLITTER):
            raise NotImplementedError(
                f"GgufLlama: the tokenizer is {kind}, expected ('gpt2', '{_SPLITTER}')"
            )
        tokens = self._field("tokenizer.ggml.tokens")
        merges = [tuple(pair.split(" ")) for pair in self._field("tokenizer.ggml.merges")]
        vocabulary = {token: i for i, token in enumerate(tokens)}
        tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
        types = self._field("tokenizer.ggml.token_type")
        special = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
        tokenizer.add_special_tokens(special)
        return tokenizer

    def _field(self, key: str) -> Any:
        if key not in self._fields:
            raise ValueError(f"GgufLlama: the file has no {key}, expected a Llama with a tokenizer")
        return self._fields[key].contents()
