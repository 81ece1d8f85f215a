"""Reads quantized checkpoints from disk into packed weights, one expert at a time; writes GPTQ."""

from jax_marlin.checkpoints.checkpoint import Checkpoint
from jax_marlin.checkpoints.gptq_writer import save_checkpoint
from jax_marlin.checkpoints.modules import ModuleInfo
from jax_marlin.checkpoints.opening import open_checkpoint
from jax_marlin.checkpoints.quantize_config import QuantizeConfig

__all__ = ["Checkpoint", "ModuleInfo", "QuantizeConfig", "open_checkpoint", "save_checkpoint"]
