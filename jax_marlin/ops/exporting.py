"""What `jax.export` must be told: our custom calls keep their meaning, names carry versions."""

import jax.export

from jax_marlin.ops import layer_call, matmul, moe_align_block_size, moe_matmul

# A target `jax_marlin_<op>_v<n>` never changes: other operands or attributes get another n.
TARGETS = (
    matmul.TARGET,
    moe_matmul.TARGET,
    moe_align_block_size.TARGET,
    layer_call.TARGET,
)

DISABLE_JAX_EXPORT_CHECKS = tuple(
    jax.export.DisabledSafetyCheck.custom_call(target) for target in TARGETS
)
