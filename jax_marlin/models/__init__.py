"""Models built from checkpoints: `load` a directory, call it, or `generate` with it."""

from jax_marlin.models.generation import generate
from jax_marlin.models.loading import load
from jax_marlin.models.qwen3_moe import Qwen3Moe

__all__ = ["Qwen3Moe", "generate", "load"]
