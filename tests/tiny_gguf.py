"""Writes a small Llama GGUF file with a byte-level tokenizer, as llama.cpp's converter would."""

import gguf
import numpy as np

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 64, 128, 2, 4, 2, 16
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = ("h e", "l l", "he ll", "hell o", "Ġ w")


def byte_letters():
    """GPT-2's letters for the 256 bytes, in the order of the bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [b for b in range(256) if b not in plain]
    return [chr(b) if b in plain else chr(256 + moved.index(b)) for b in range(256)]


TOKENS = (*SPECIAL, *byte_letters(), *(merge.replace(" ", "") for merge in MERGES))


def random_weights(seed=0):
    """float32 weights by a Llama checkpoint's names, linears [N, K].

    float16 holds them; and 8 bits those of the MLP, which use all of the range in every 64 of K.
    """
    rng = np.random.default_rng(seed)
    shapes = {"model.embed_tokens": (len(TOKENS), HIDDEN), "model.norm": (HIDDEN,)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        shapes[f"{layer}.input_layernorm"] = shapes[f"{layer}.post_attention_layernorm"] = (HIDDEN,)
        for name, heads in [("q_proj", HEADS), ("k_proj", KV_HEADS), ("v_proj", KV_HEADS)]:
            shapes[f"{layer}.self_attn.{name}"] = (heads * HEAD_DIM, HIDDEN)
        shapes[f"{layer}.self_attn.o_proj"] = (HIDDEN, HEADS * HEAD_DIM)
        shapes[f"{layer}.mlp.gate_proj"] = shapes[f"{layer}.mlp.up_proj"] = (INNER, HIDDEN)
        shapes[f"{layer}.mlp.down_proj"] = (HIDDEN, INNER)
    weights = {}
    for name, shape in shapes.items():
        if "mlp" in name:
            codes = rng.integers(0, 256, shape)
            codes[:, 0::64], codes[:, 1::64] = 0, 255
            weight = (codes - 128) / 512
        else:
            weight = rng.standard_normal(shape) / (8 if len(shape) == 2 else 1)
        weights[name] = weight.astype(np.float16).astype(np.float32)
    return weights


def pair_neighbours(weight):
    """Rows of each head in the order in which GGUF rotates them: i, i + D / 2, i + 1, ..."""
    rows = []
    for first in range(0, len(weight), HEAD_DIM):
        for i in range(HEAD_DIM // 2):
            rows += [first + i, first + i + HEAD_DIM // 2]
    return weight[rows]


def write_gguf(path, weights, *, architecture="llama", splitter="smollm"):
    """The file of `weights`; embeddings are tied."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_vocab_size(len(TOKENS))
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitter)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "model.layers.": "blk.",
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "mlp.": "",
        "self_attn.": "", "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v",
        "o_proj": "attn_output", "gate_proj": "ffn_gate", "up_proj": "ffn_up",
        "down_proj": "ffn_down",
    }  # fmt: skip
    for name, weight in weights.items():
        if name.endswith(("q_proj", "k_proj")):
            weight = pair_neighbours(weight)
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        writer.add_tensor(f"{name}.weight", np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
