"""What a model must at least read and compute for a decode step, or for a prompt."""

import math

import jax

from jax_marlin.dense_stack import DenseExpertStack
from jax_marlin.models.causal_lm import CausalLM
from jax_marlin.models.decoder_layer import SparseMlp
from jax_marlin.weights import MarlinExpertStack


def touched_experts(num_experts: int, top_k: int, tokens: int) -> float:
    """How many experts `tokens` tokens reach on average if each is as likely as any other.

    >>> touched_experts(128, 8, 1), round(touched_experts(128, 8, 32), 1)
    (8.0, 111.8)
    """
    return num_experts * (1 - (1 - top_k / num_experts) ** tokens)


def weight_bytes(model: CausalLM, tokens: int) -> float:
    """Bytes of weights that one call for `tokens` tokens reads: experts by `touched_experts`."""
    c = model.config
    touched = touched_experts(c.num_experts, c.num_experts_per_tok, tokens) if c.num_experts else 0
    # Of the embedding rows are read, unless it is lm_head, too.
    table = 0 if model.lm_head is None else model.embed_tokens.nbytes
    experts = sum(stack.nbytes for stack in _expert_stacks(model))
    return model.nbytes - table - experts + experts * touched / max(c.num_experts, 1)


def cache_bytes(model: CausalLM, batch: int, positions: float) -> float:
    """Bytes that layers keep of so many positions."""
    numbers = sum(math.prod(of_position) for of_position in model.config.cached)
    return len(model.layers) * batch * positions * numbers * model.dtype.itemsize


def prefill_flops(model: CausalLM, batch: int, seq: int) -> float:
    """Multiplications and additions of a prompt: linears, causal attention, one row of logits."""
    c, tokens = model.config, batch * seq
    weights = sum(_weights(layer) for layer in model.layers)
    experts = sum(math.prod(stack.shape) for stack in _expert_stacks(model))
    active = weights + experts * c.num_experts_per_tok / max(c.num_experts, 1)
    pairs = batch * seq * (seq + 1) / 2
    attention = len(model.layers) * pairs * c.num_attention_heads * (c.head_dim + c.value_head_dim)
    return 2 * (tokens * active + attention + batch * c.hidden_size * c.vocab_size)


def _expert_stacks(model: CausalLM) -> list[MarlinExpertStack | DenseExpertStack]:
    mlps = [layer.mlp for layer in model.layers if isinstance(layer.mlp, SparseMlp)]
    stacks = [(*m.gate_up, m.down) if isinstance(m.gate_up, tuple) else (m.gate_up, m.down)
              for m in mlps]  # fmt: skip
    return [stack for group in stacks for stack in group]


def _weights(layer) -> int:
    """Elements of a layer's linears that are not experts."""
    stacks = (MarlinExpertStack, DenseExpertStack)
    parts = jax.tree.leaves(layer, is_leaf=lambda part: isinstance(part, stacks))
    linears = [
        part
        for part in parts
        if (part.num_experts == 1 if isinstance(part, stacks) else part.ndim >= 2)
    ]
    return sum(math.prod(part.shape) for part in linears)
