"""Models built from checkpoints: `load` a directory, call it, or `generate` with it."""

from jax_marlin.models.causal_lm import CausalLM
from jax_marlin.models.generation import generate
from jax_marlin.models.loading import load
from jax_marlin.models.tokenizer import load_stop_tokens, load_tokenizer

__all__ = ["CausalLM", "generate", "load", "load_stop_tokens", "load_tokenizer"]
