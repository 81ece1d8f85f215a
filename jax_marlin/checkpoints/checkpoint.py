"""An open checkpoint: what it holds, and its modules as packed weights or arrays."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jax_marlin.canonical import CanonicalLinear
from jax_marlin.checkpoints import expert_stack, json_file
from jax_marlin.checkpoints.config_files import read_quantize_config
from jax_marlin.checkpoints.modules import ModuleInfo, find_modules
from jax_marlin.checkpoints.quantize_config import QuantizeConfig
from jax_marlin.checkpoints.quantized_module import read_canonical
from jax_marlin.checkpoints.safetensors_header import FLOATS
from jax_marlin.checkpoints.shards import Shards
from jax_marlin.weights import MarlinExpertStack, MarlinLinear


class Progress(Protocol):
    """What a loader tells how far it is; `tqdm.tqdm(total=...)` is one."""

    def update(self, n: int) -> object:
        """`n` more modules are loaded."""


def open_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Opens a GPTQ, AWQ, compressed-tensors or unquantized directory; reads headers, no weights.

    Which modules are quantized is seen from their tensors; the config says with what parameters. Of
    compressed-tensors the two numbers of each `weight_shape` are read too.

    Args:
        path: directory with config.json and .safetensors files, sharded (with an index) or not.

    Returns:
        A `Checkpoint`; close it, or use it in a `with` statement.

    Raises:
        ValueError: files are missing, truncated or contradict each other; the message names the
            file and the tensor.
        NotImplementedError: a method, format or number of bits that does not load.

    >>> import pathlib, jax_marlin
    >>> path = pathlib.Path(jax_marlin.__file__).parent / "data" / "qwen3moe-gptq-sym-g128"
    >>> with open_checkpoint(path) as checkpoint:
    ...     w = checkpoint.load_linear("model.layers.0.self_attn.q_proj")
    >>> checkpoint.format, w.shape
    ('gptq', (256, 256))
    """
    directory = pathlib.Path(path)
    if not directory.is_dir():
        raise ValueError(
            f"open_checkpoint: {directory} is not a directory; pass the folder with config.json"
        )
    config_path = directory / "config.json"
    config = json_file.read_object(config_path) if config_path.is_file() else {}
    quantization = read_quantize_config(directory, config)
    shards = Shards(directory)
    return Checkpoint(
        directory,
        config,
        quantization,
        shards,
        find_modules(shards.tensors, quantization, shards.read),
    )


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

    @property
    def format(self) -> str:
        """What the config says: "gptq", "gptq_v2", "awq", "compressed-tensors", or "dense"."""
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
        return jnp.asarray(_cast(self.shards.read(name), dtype, name))

    def bias(self, module: str, dtype: DTypeLike | None = None) -> jax.Array | None:
        """The bias [N] of a dense module, or None.

        The bias of a quantized module is part of what `load_linear` gives, so here it is None.
        """
        info = self._info(module, "bias")
        if info.quantization is not None or "bias" not in info.tensors:
            return None
        return self.dense(f"{module}.bias", dtype)

    def linear(self, module: str) -> CanonicalLinear | np.ndarray:
        """One linear on the host: codes and scales if quantized, else its weight [K, N]."""
        info = self._info(module, "linear")
        if info.kind == "dense":
            return self.shards.read(f"{module}.weight").T
        return read_canonical(info, self.shards.read)

    def load_linear(
        self, module: str, dtype: DTypeLike | None = None, *, progress: Progress | None = None
    ) -> MarlinLinear | jax.Array:
        """Loads one linear: packed if quantized, else its weight [K, N].

        Args:
            module: its name, without `.qweight` or `.weight`.
            dtype: compute dtype; None keeps that of the stored scales (or of the stored weight).
            progress: told of the module when it is loaded.

        Raises:
            ValueError: there is no such linear, or its tensors are damaged; names the module.
        """
        if self._info(module, "load_linear").kind == "dense":
            weight = self.dense(f"{module}.weight", dtype).T
            if progress is not None:
                progress.update(1)
            return weight
        return self.load_expert_stack([(module,)], dtype, progress=progress)[0]

    def load_expert_stack(
        self,
        experts: Sequence[str | Sequence[str]],
        dtype: DTypeLike | None = None,
        *,
        progress: Progress | None = None,
    ) -> MarlinExpertStack:
        """Loads experts into one stack; peak host memory is the stack plus one expert.

        Args:
            experts: for each expert its module, or several (gate, up) to put side by side along N.
            dtype: compute dtype; None keeps that of the scales, which then must have one dtype.
            progress: told of each expert's modules when they are loaded.

        Raises:
            ValueError: experts are missing, or differ in shape, bits, group size or (without
                `dtype`) dtype, or modules to put side by side gather their inputs differently
                (act-order): see `can_fuse`.
            NotImplementedError: the experts are not quantized.
        """
        names = [(expert,) if isinstance(expert, str) else tuple(expert) for expert in experts]
        return expert_stack.load_expert_stack(
            self.modules,
            names,
            lambda name: read_canonical(self.modules[name], self.shards.read),
            dtype=dtype,
            on_module=lambda: progress.update(1) if progress is not None else None,
        )

    def load_expert_stacks(
        self,
        experts: Sequence[Sequence[str]],
        dtype: DTypeLike | None = None,
        *,
        progress: Progress | None = None,
    ) -> tuple[MarlinExpertStack, ...]:
        """Like `load_expert_stack`, a stack for each position: `[(gate, up), ...]` gives two."""
        return tuple(
            self.load_expert_stack(column, dtype, progress=progress)
            for column in zip(*experts, strict=True)
        )

    def can_fuse(self, experts: Sequence[Sequence[str]]) -> bool:
        """Whether each expert's modules can be put side by side.

        True when they agree in K, bits, group size and act-order permutation; reads g_idx only.
        """
        return expert_stack.can_fuse(self.modules, experts, self.shards.read)

    def close(self) -> None:
        """Closes the files; reading afterwards opens them again."""
        self.shards.close()

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

    def _info(self, module: str, function: str) -> ModuleInfo:
        if not self.has(module):
            raise ValueError(
                f"Checkpoint.{function}: {self.path} has no module {module} with a qweight or a "
                f"weight; Checkpoint.modules lists those it has"
            )
        return self.modules[module]


def _cast(array: np.ndarray, dtype: DTypeLike | None, name: str) -> np.ndarray:
    if dtype is None or array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        cast = array.astype(dtype)
    # float16 ends at 65504, which bfloat16 weights may pass
    if cast.dtype == np.float16 and not np.isfinite(cast[np.isfinite(array)]).all():
        raise ValueError(
            f"Checkpoint: tensor {name} ({array.dtype}) overflows float16; load with dtype=bfloat16"
        )
    return cast
