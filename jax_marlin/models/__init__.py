"""Models built from checkpoints: `load` a directory, call it, or `generate` with it."""

from jax_marlin.models.causal_lm import CausalLM
from jax_marlin.models.generation import generate
from jax_marlin.models.loading import load

__all__ = ["CausalLM", "generate", "load"]
