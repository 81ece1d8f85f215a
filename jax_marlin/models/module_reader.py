"""Reads modules of a checkpoint by name and notes which, so that a forgotten tensor is noticed."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from jax_marlin.act_order import fold_act_order
from jax_marlin.checkpoints import Checkpoint
from jax_marlin.checkpoints.placement import replicate
from jax_marlin.checkpoints.progress import Progress
from jax_marlin.dense_stack import DenseExpertStack
from jax_marlin.linear import MarlinLinear
from jax_marlin.models.layers import DenseLinear, Linear, SideBySide
from jax_marlin.ops.moe_matmul import ExpertStack
from jax_marlin.weights import MarlinExpertStack

T = TypeVar("T")


class ModuleReader:
    """A checkpoint read for one model, each module in the shape that config.json gives it."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: jnp.dtype,
        sharding: NamedSharding | None = None,
        progress: Progress | None = None,
    ):
        """`sharding` is of expert stacks; all else is on every device of its mesh."""
        self._checkpoint, self._dtype = checkpoint, dtype
        self._sharding, self._progress = sharding, progress
        self._names = set(checkpoint.names())
        self._modules_read: set[str] = set()

    def has(self, module: str) -> bool:
        """Whether the checkpoint has a weight of this name, quantized or dense."""
        return self._checkpoint.has(module)

    def linear(self, module: str, shape: tuple[int, int], needs_bias: bool = False) -> Linear:
        """One linear [K, N], packed if its tensors are, with the bias that lies beside them."""
        weight = self._checkpoint.load_linear(module, self._dtype)
        self._note(module)
        self._check_shape(module, weight.shape, shape)
        if needs_bias:
            self._check_bias(module)
        if isinstance(weight, MarlinLinear):
            return self._everywhere(weight)
        dense = DenseLinear(weight.T, self._checkpoint.bias(module, self._dtype))
        return self._everywhere(dense)

    def dequantized(
        self, module: str, shape: tuple[int, int], taken_apart: Callable[[jax.Array], T]
    ) -> T:
        """What `taken_apart` makes of a linear's weight [K, N], dequantized if it is packed.

        For a weight that is multiplied otherwise than as it is stored; its bias, which some writers
        add to every linear, must be zero.
        """
        weight = self._checkpoint.load_linear(module, self._dtype)
        self._note(module)
        self._check_shape(module, weight.shape, shape)
        if isinstance(weight, MarlinLinear):
            bias = weight.stack.bias if weight.bias is None else weight.bias
            weight = weight.dequantize()
        else:
            bias = self._checkpoint.bias(module, self._dtype)
        if bias is not None and np.asarray(bias).any():
            raise ValueError(
                f"models.load: {module} has a bias that is not zero, expected none in this model; "
                "look whether config.json names another model, or remove the tensor"
            )
        return self._everywhere(taken_apart(weight))

    def side_by_side(
        self, widths: Mapping[str, int], k: int, needs_bias: bool = False
    ) -> SideBySide:
        """Linears `[k, N]` of one input, each module's N given: one where they are packed alike.

        They are packed as one from the start, which needs no memory for both forms.
        """
        modules = list(widths)
        known = self._checkpoint.modules
        packed = all(module in known and known[module].is_packed for module in modules)
        if not packed or not self._checkpoint.can_fuse([modules]):
            return tuple(self.linear(module, (k, n), needs_bias) for module, n in widths.items())
        for module, n in widths.items():
            self._check_shape(module, known[module].shape, (k, n))
            if needs_bias:
                self._check_bias(module)
        stack = self._checkpoint.load_expert_stack([modules], self._dtype)
        assert isinstance(stack, MarlinExpertStack)  # noqa: S101
        self._note(*modules)
        return self._everywhere(stack[0])

    def _check_bias(self, module: str) -> None:
        if f"{module}.bias" not in self._names:
            raise ValueError(
                f"models.load: {module} has no bias, expected one by the model's config.json"
            )

    def weight(self, module: str, shape: tuple[int, ...]) -> jax.Array:
        """The `weight` of a norm or an embedding."""
        return self.parameter(module, "weight", shape)

    def parameter(
        self, module: str, part: str, shape: tuple[int, ...], dtype: DTypeLike | None = None
    ) -> jax.Array:
        """The tensor `{module}.{part}`, in the compute dtype or another."""
        array = self._checkpoint.dense(f"{module}.{part}", dtype or self._dtype)
        self._note(module)
        self._check_shape(module if part == "weight" else f"{module}.{part}", array.shape, shape)
        return self._everywhere(array)

    def fused_experts(
        self, module: str, shape: tuple[int, int, int], *, in_turn: bool = False
    ) -> DenseExpertStack:
        """The stack [E, K, N] of a module that holds all experts, with their biases.

        `in_turn`: the stored columns are gate's and up's in turn, and all of gate come first here.
        """
        info = self._checkpoint.modules.get(module)
        if info is None:
            raise ValueError(
                f"models.load: no module {module}, expected all experts in {module}_blocks and "
                f"_scales (MXFP4), the one form in which this model's experts load"
            )
        self._check_shape(module, info.shape, shape)
        columns = np.arange(shape[2]).reshape(-1, 2).T.ravel() if in_turn else None
        stack = self._checkpoint.load_fused_stack(
            module, self._dtype, columns=columns, sharding=self._sharding
        )
        self._note(module)
        if stack.bias is None:
            raise ValueError(
                f"models.load: {module} has no bias, expected one by the model's config.json"
            )
        return stack

    def experts(
        self,
        prefix: str,
        names: tuple[str, str, str],
        shape: tuple[int, int, int],
    ) -> tuple[ExpertStack | tuple[ExpertStack, ExpertStack], ExpertStack]:
        """The stacks gate|up (a pair where they gather their inputs differently) and down.

        Args:
            prefix: the modules are `{prefix}.{expert}.{name}`.
            names: what gate, up and down are called.
            shape: (E, H, I), the experts and an expert's outer and inner width.
        """
        num_experts, outer, inner = shape
        if num_experts > len(self._checkpoint.modules):
            raise ValueError(
                f"models.load: config.json has {num_experts} experts, expected no more than there "
                f"are modules in the checkpoint, {len(self._checkpoint.modules)}"
            )
        pairs = [tuple(f"{prefix}.{e}.{name}" for name in names[:2]) for e in range(num_experts)]
        downs = [f"{prefix}.{e}.{names[2]}" for e in range(num_experts)]
        how: dict[str, Any] = {"sharding": self._sharding}
        if self._checkpoint.can_fuse(pairs, self._sharding):
            gate_up = self._checkpoint.load_expert_stack(pairs, self._dtype, **how)
        else:
            gate, up = self._checkpoint.load_expert_stacks(pairs, self._dtype, **how)
            gate_up = (gate, up)
        self._note(*(name for pair in pairs for name in pair))
        down = self._checkpoint.load_expert_stack(downs, self._dtype, **how)
        self._note(*downs)
        for part in gate_up if isinstance(gate_up, tuple) else (gate_up,):
            width = inner if isinstance(gate_up, tuple) else 2 * inner
            self._check_shape(f"{prefix} gate and up", part.shape, (num_experts, outer, width))
        self._check_shape(f"{prefix} down", down.shape, (num_experts, inner, outer))
        stacks = (*(gate_up if isinstance(gate_up, tuple) else (gate_up,)), down)
        packed = [stack for stack in stacks if isinstance(stack, MarlinExpertStack)]
        if len(packed) < len(stacks) or not all(
            leaf.is_fully_addressable for leaf in jax.tree.leaves(packed)
        ):
            return gate_up, down  # the latter: no process has all of down's row order
        # gate_up writes its columns in down's row order: only gate_up's input is gathered.
        if len(packed) == 3:
            return fold_act_order((packed[0], packed[1]), packed[2])
        return fold_act_order(packed[0], packed[1])

    def mark_read(self, *modules: str) -> None:
        """Accounts for modules whose tensors the model does not need."""
        self._modules_read.update(modules)

    def skip(self, prefix: str) -> None:
        """Accounts for all modules whose names begin so."""
        names = self._checkpoint.modules
        self._modules_read.update(name for name in names if name.startswith(prefix))

    def unread(self) -> Sequence[str]:
        """Names of the tensors that belong to no module read so far."""
        return sorted(
            tensor.name
            for module, info in self._checkpoint.modules.items()
            if module not in self._modules_read
            for tensor in info.tensors.values()
            if not tensor.name.endswith("rotary_emb.inv_freq")  # follows from rope_theta
        )

    def _note(self, *modules: str) -> None:
        """Accounts for modules that were read, to the progress bar as well."""
        self._modules_read.update(modules)
        if self._progress is not None:
            infos = self._checkpoint.modules
            self._progress.update(sum(infos[name].nbytes for name in modules if name in infos))

    def _everywhere(self, tree: Any) -> Any:
        return tree if self._sharding is None else replicate(tree, self._sharding.mesh)

    def _check_shape(self, module: str, got: tuple[int, ...], expected: tuple[int, ...]) -> None:
        if got != expected:
            raise ValueError(
                f"models.load: {module} has shape {got}, expected {expected} by config.json"
            )
