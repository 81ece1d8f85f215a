"""Reads modules of a checkpoint by name and notes which, so that a forgotten tensor is noticed."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jax_marlin.act_order import fold_act_order
from jax_marlin.checkpoints import Checkpoint
from jax_marlin.linear import MarlinLinear
from jax_marlin.models.layers import DenseLinear, Linear
from jax_marlin.weights import MarlinExpertStack


class ModuleReader:
    """A checkpoint read for one model, each module in the shape that config.json gives it."""

    def __init__(self, checkpoint: Checkpoint, dtype: jnp.dtype):
        self._checkpoint, self._dtype = checkpoint, dtype
        self._names = set(checkpoint.names())
        self._modules_read: set[str] = set()

    def has(self, module: str) -> bool:
        """Whether the checkpoint has a weight of this name, quantized or dense."""
        return self._checkpoint.has(module)

    def linear(self, module: str, shape: tuple[int, int], needs_bias: bool = False) -> Linear:
        """One linear [K, N], packed if its tensors are, with the bias that lies beside them."""
        weight = self._checkpoint.load_linear(module, self._dtype)
        self._modules_read.add(module)
        self._check_shape(module, weight.shape, shape)
        if needs_bias and f"{module}.bias" not in self._names:
            raise ValueError(
                f"models.load: {module} has no bias, expected one by the model's config.json"
            )
        if isinstance(weight, MarlinLinear):
            return weight
        return DenseLinear(weight, self._checkpoint.bias(module, self._dtype))

    def weight(self, module: str, shape: tuple[int, ...]) -> jax.Array:
        """The `weight` of a norm or an embedding."""
        weight = self._checkpoint.dense(f"{module}.weight", self._dtype)
        self._modules_read.add(module)
        self._check_shape(module, weight.shape, shape)
        return weight

    def experts(
        self,
        prefix: str,
        names: tuple[str, str, str],
        shape: tuple[int, int, int],
    ) -> tuple[
        MarlinExpertStack | tuple[MarlinExpertStack, MarlinExpertStack],
        MarlinExpertStack,
    ]:
        """The stacks gate|up (a pair where they gather their inputs differently) and down.

        Args:
            prefix: the modules are `{prefix}.{expert}.{name}`.
            names: what gate, up and down are called.
            shape: (E, H, I), the experts and an expert's outer and inner width.
        """
        num_experts, outer, inner = shape
        pairs = [tuple(f"{prefix}.{e}.{name}" for name in names[:2]) for e in range(num_experts)]
        downs = [f"{prefix}.{e}.{names[2]}" for e in range(num_experts)]
        if self._checkpoint.can_fuse(pairs):
            gate_up = self._checkpoint.load_expert_stack(pairs, self._dtype)
        else:
            gate, up = self._checkpoint.load_expert_stacks(pairs, self._dtype)
            gate_up = (gate, up)
        down = self._checkpoint.load_expert_stack(downs, self._dtype)
        self.mark_read(*(name for pair in pairs for name in pair), *downs)
        for part in gate_up if isinstance(gate_up, tuple) else (gate_up,):
            width = inner if isinstance(gate_up, tuple) else 2 * inner
            self._check_shape(f"{prefix} gate and up", part.shape, (num_experts, outer, width))
        self._check_shape(f"{prefix} down", down.shape, (num_experts, inner, outer))
        # gate_up writes its columns in down's row order: only gate_up's input is gathered.
        return fold_act_order(gate_up, down)

    def mark_read(self, *modules: str) -> None:
        """Accounts for modules whose tensors the model does not need."""
        self._modules_read.update(modules)

    def unread(self) -> Sequence[str]:
        """Names of the tensors that belong to no module read so far."""
        return sorted(
            name
            for name in self._names
            if name.rpartition(".")[0] not in self._modules_read
            and not name.endswith("rotary_emb.inv_freq")  # follows from rope_theta
        )

    def _check_shape(self, module: str, got: tuple[int, ...], expected: tuple[int, ...]) -> None:
        if got != expected:
            raise ValueError(
                f"models.load: {module} has shape {got}, expected {expected} by config.json"
            )
