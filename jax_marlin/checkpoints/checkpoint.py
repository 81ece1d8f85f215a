"""An open checkpoint: what it holds, and its modules as packed weights or arrays."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping, Sequence
from types import TracebackType

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from jax_marlin.canonical import CanonicalLinear
from jax_marlin.checkpoints import dense_experts, expert_modules, expert_stack
from jax_marlin.checkpoints.modules import ModuleInfo
from jax_marlin.checkpoints.packed_cache import PackedCache, cache_directory
from jax_marlin.checkpoints.progress import Progress, counter
from jax_marlin.checkpoints.quantize_config import QuantizeConfig
from jax_marlin.checkpoints.quantized_module import read_canonical, read_dense
from jax_marlin.checkpoints.safetensors_header import FLOATS
from jax_marlin.checkpoints.shards import Shards
from jax_marlin.dense_stack import DenseExpertStack
from jax_marlin.weights import MarlinExpertStack, MarlinLinear


class Checkpoint:
    """A checkpoint directory, opened by `open_checkpoint`; tensors are read when asked for.

    Attributes:
        path: the directory.
        config: config.json as a dict (empty when there is none).
        quantization: the parsed quantization config, None when unquantized.
        modules: module name -> `ModuleInfo`, layer 2 before layer 10.
    """

    def __init__(
        self,
        path: pathlib.Path,
        config: Mapping,
        quantization: QuantizeConfig | None,
        shards: Shards,
        modules: dict[str, ModuleInfo],
    ) -> None:
        self.path = path
        self.config = config
        self.quantization = quantization
        self.shards = shards
        self.modules = modules
        self._cache: PackedCache | None = None

    @property
    def format(self) -> str:
        """What the config says: a key of `formats.FORMATS` such as "gptq", or "dense"."""
        return self.quantization.checkpoint_format if self.quantization else "dense"

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as stored."""
        return self.shards.nbytes

    @property
    def nbytes_dense(self) -> int:
        """Bytes of the same model with every weight in bfloat16."""
        return sum(module.nbytes_dense for module in self.modules.values())

    def names(self) -> list[str]:
        """Names of all tensors, in the order of `modules`."""
        return [info.name for module in self.modules.values() for info in module.tensors.values()]

    def has(self, module: str) -> bool:
        """Whether there is a module of this name with a weight, quantized or dense."""
        return module in self.modules and self.modules[module].kind != "other"

    def tensor(self, name: str) -> np.ndarray:
        """Reads one tensor as stored: dtype, shape and packing unchanged."""
        if name not in self.shards.tensors:
            raise ValueError(f"Checkpoint.tensor: {self.path} has no tensor {name}")
        return self.shards.read(name)

    def dense(self, name: str, dtype: DTypeLike | None = None) -> jax.Array:
        """Reads one float tensor by its full name, in its shape, cast to `dtype` if given."""
        info = self.shards.tensors.get(name)
        if info is None:
            raise ValueError(f"Checkpoint.dense: {self.path} has no tensor {name}")
        if info.dtype not in FLOATS:
            raise ValueError(
                f"Checkpoint.dense: tensor {name} is {info.dtype}, expected {' or '.join(FLOATS)}"
            )
        return jnp.asarray(dense_experts.cast(self.shards.read(name), dtype, name))

    def bias(self, module: str, dtype: DTypeLike | None = None) -> jax.Array | None:
        """The bias [N] of a module that `load_linear` gives as an array, or None.

        The bias of a packed module is part of what `load_linear` gives, so here it is None.
        """
        info = self._info(module, "bias")
        if info.is_packed or "bias" not in info.tensors:
            return None
        return self.dense(f"{module}.bias", dtype)

    def linear(self, module: str) -> CanonicalLinear | np.ndarray:
        """One linear on the host: codes and scales if it stays packed, else its weight [K, N]."""
        info = self._info(module, "linear")
        if info.is_packed:
            return read_canonical(info, self.shards.read)
        return read_dense(info, self.shards.read)

    def load_linear(
        self, module: str, dtype: DTypeLike | None = None, *, progress: Progress | None = None
    ) -> MarlinLinear | jax.Array:
        """Loads one linear: packed if a kernel reads its format, else its weight [K, N].

        Args:
            module: its name, without `.qweight` or `.weight`.
            dtype: compute dtype; None keeps that of the stored scales (or of the stored weight),
                and means bfloat16 for MXFP4, NVFP4 and FP8, which are dequantized.
            progress: told of the module when it is loaded.

        Raises:
            ValueError: there is no such linear, or its tensors are damaged; names the module.
        """
        info = self._info(module, "load_linear")
        if info.is_packed:
            return self._load_packed([(module,)], dtype, None, progress)[0]
        weight = dense_experts.load_weight(info, self.shards.read, dtype)
        counter(progress)()
        return weight

    def load_expert_stack(
        self,
        experts: Sequence[str | Sequence[str]],
        dtype: DTypeLike | None = None,
        *,
        sharding: NamedSharding | None = None,
        progress: Progress | None = None,
    ) -> MarlinExpertStack | DenseExpertStack:
        """Loads experts into one stack; peak host memory is the stack plus one expert a thread.

        With a `sharding`, a process reads the weights of those experts alone that its devices hold,
        and each part of the stack moves to its device as soon as it is complete. (Of act-order
        checkpoints every process reads all g_idx: which leaves there are depends on them.)

        Args:
            experts: for each expert its module, or several (gate, up) to put side by side along N.
            dtype: compute dtype; None keeps that of the scales, which then must have one dtype.
            sharding: how devices share the stack. Its axes are those of `qweight`: experts, tiles
                of N, tiles of K; the other leaves follow. `NamedSharding(mesh, P("expert"))` gives
                each device whole experts, the only split of a `DenseExpertStack`. None: the
                default device.
            progress: told of each expert's modules when they are loaded.

        Returns:
            A `MarlinExpertStack` of formats that kernels read; a `DenseExpertStack` of experts
            that are not quantized, or that are dequantized here (MXFP4, NVFP4, FP8).

        Raises:
            ValueError: experts are missing, or differ in shape, bits, group size or (without
                `dtype`) dtype, or modules to put side by side gather their inputs differently
                (act-order): see `can_fuse`; or `sharding` does not divide the experts, or cuts a
                tile, a group, or the K of weights in act-order.
            NotImplementedError: some of the experts are packed and some not, or `sharding` splits
                more than the experts of a `DenseExpertStack`.
        """
        names = [(expert,) if isinstance(expert, str) else tuple(expert) for expert in experts]
        where = "Checkpoint.load_expert_stack"
        expert_modules.check_present(self.modules, names, where)
        if expert_modules.all_packed(self.modules, names, where):
            return self._load_packed(names, dtype, sharding, progress)
        return dense_experts.load_dense_stack(
            self.modules,
            names,
            self.shards.read,
            dtype=dtype,
            sharding=sharding,
            on_module=counter(progress),
        )

    def load_fused_stack(
        self,
        module: str,
        dtype: DTypeLike | None = None,
        *,
        columns: np.ndarray | None = None,
        sharding: NamedSharding | None = None,
        progress: Progress | None = None,
    ) -> DenseExpertStack:
        """Loads a module that holds all experts of a layer, as gpt-oss's do.

        Peak host memory is the stack, the module as stored and one expert in float32.

        Args:
            module: its name, `model.layers.0.mlp.experts.gate_up_proj` say.
            dtype: compute dtype; None means bfloat16.
            columns: the order of the columns, ints below N; None leaves them as stored.
            sharding: how devices share the experts, as in `load_expert_stack`.
            progress: told of the module when it is loaded.

        Raises:
            ValueError: there is no such module, it holds no experts, or its tensors are damaged.
        """
        info = self._info(module, "load_fused_stack")
        stack = dense_experts.load_fused_stack(
            info, self.shards.read, dtype=dtype, columns=columns, sharding=sharding
        )
        counter(progress)()
        return stack

    def load_expert_stacks(
        self,
        experts: Sequence[Sequence[str]],
        dtype: DTypeLike | None = None,
        *,
        sharding: NamedSharding | None = None,
        progress: Progress | None = None,
    ) -> tuple[MarlinExpertStack | DenseExpertStack, ...]:
        """Like `load_expert_stack`, a stack for each position: `[(gate, up), ...]` gives two."""
        return tuple(
            self.load_expert_stack(column, dtype, sharding=sharding, progress=progress)
            for column in zip(*experts, strict=True)
        )

    def can_fuse(
        self, experts: Sequence[Sequence[str]], sharding: NamedSharding | None = None
    ) -> bool:
        """Whether each expert's modules can be put side by side.

        True when they agree in K, bits, group size and act-order permutation (unpacked ones: in K);
        reads g_idx only. With `sharding`, as in `load_expert_stack`, where the config says
        desc_act false no g_idx is read, for most would be of other processes' experts.
        """
        return expert_modules.can_fuse(
            self.modules, experts, self.shards.read, trust_config=sharding is not None
        )

    def keep_packed(self, directory: str | os.PathLike | None = None) -> None:
        """From now on packed weights are written to a cache, and read from it where they are there.

        Args:
            directory: the cache; None means `$JAX_MARLIN_CACHE`, or the user's cache directory.
        """
        root = cache_directory() if directory is None else pathlib.Path(directory)
        self._cache = PackedCache(root, self.path, self.shards.tensors)

    def close(self) -> None:
        """Nothing stays open between reads: this is here for the `with` statement."""

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return (
            f"Checkpoint({str(self.path)!r}, format={self.format!r}, modules={len(self.modules)})"
        )

    def _load_packed(
        self,
        names: Sequence[Sequence[str]],
        dtype: DTypeLike | None,
        sharding: NamedSharding | None,
        progress: Progress | None,
    ) -> MarlinExpertStack:
        return expert_stack.load_expert_stack(
            self.modules,
            names,
            self.shards.read,
            dtype=dtype,
            sharding=sharding,
            cache=self._cache,
            on_module=counter(progress),
        )

    def _info(self, module: str, function: str) -> ModuleInfo:
        if not self.has(module):
            raise ValueError(
                f"Checkpoint.{function}: {self.path} has no module {module} with a qweight or a "
                f"weight; Checkpoint.modules lists those it has"
            )
        return self.modules[module]
