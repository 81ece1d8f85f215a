"""What experts of a stack have in common: by headers and config, and in act-order by g_idx."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import ml_dtypes
import numpy as np
from jax.typing import DTypeLike

from jax_marlin.act_order import perm_from_g_idx
from jax_marlin.canonical import same_perm
from jax_marlin.checkpoints.module_format import Read
from jax_marlin.checkpoints.modules import ModuleInfo
from jax_marlin.checkpoints.quantized_module import (
    group_index,
    may_have_zero_points,
    may_reorder_rows,
    scales_of,
    spec_of,
)
from jax_marlin.quant_spec import QuantSpec

_WHERE = "Checkpoint.load_expert_stack"
_SCALE_DTYPES = {"F16": np.float16, "BF16": ml_dtypes.bfloat16, "F32": np.float32}


def optional_leaves(
    modules: Mapping[str, ModuleInfo], experts: Sequence[Sequence[str]], read: Read
) -> tuple[tuple[str, ...], bool]:
    """The optional leaves of the whole stack, and whether perm is shared.

    Follows from headers and config, and in act-order from g_idx of the first experts, up to one
    that differs: every process finds the same, and reads little of what others hold.
    """
    infos = [modules[name] for names in experts for name in names]
    found = []
    if any(may_have_zero_points(info) for info in infos):
        found.append("zero_points")
    if any("bias" in info.tensors for info in infos):
        found.append("bias")
    if not any(may_reorder_rows(info) for info in infos):
        return tuple(found), False

    def row_order(names: Sequence[str]) -> np.ndarray | None:
        info, part = modules[names[0]], spec_of(modules[names[0]])
        g_idx, where = group_index(info, read), f"{_WHERE}: module {names[0]}"
        return perm_from_g_idx(g_idx, k=part.k, group_size=part.group_size, where=where)

    first = row_order(experts[0])
    shared = all(same_perm(first, row_order(names)) for names in experts[1:])
    if first is None and shared:
        return tuple(found), False
    return (*found, "perm"), shared


def stored_dtype(modules: Mapping[str, ModuleInfo], experts: Sequence[Sequence[str]]) -> DTypeLike:
    """The one dtype of all scales; an error where one of them would be rounded to another."""
    first = scales_of(modules[experts[0][0]])
    for name in (name for names in experts for name in names):
        scales = scales_of(modules[name])
        if scales.dtype != first.dtype:
            raise ValueError(
                f"{_WHERE}: tensor {scales.name} is {scales.dtype}, expected {first.dtype} as "
                f"{first.name}; pass dtype= to choose one"
            )
    return _SCALE_DTYPES[first.dtype]


def check_present(
    modules: Mapping[str, ModuleInfo], experts: Sequence[Sequence[str]], where: str
) -> None:
    """Raises unless every module of every expert is there; names all that are not."""
    if not experts or not all(experts):
        raise ValueError(
            f"{where}: experts is {experts!r}, expected at least one module for each expert"
        )
    missing = {
        e: [name for name in names if name not in modules or modules[name].kind == "other"]
        for e, names in enumerate(experts)
    }
    missing = {e: names for e, names in missing.items() if names}
    if missing:
        first = ", ".join(next(iter(missing.values())))
        raise ValueError(
            f"{where}: missing experts {list(missing)} of {len(experts)}, the first lacks {first}; "
            f"is the number of experts in config.json right, and are all shards there?"
        )


def all_packed(
    modules: Mapping[str, ModuleInfo], experts: Sequence[Sequence[str]], where: str
) -> bool:
    """True if every module stays packed, False if none does; raises for a mixture."""
    names = [name for names in experts for name in names]
    dense = [name for name in names if not modules[name].is_packed]
    if dense and len(dense) < len(names):
        raise NotImplementedError(
            f"{where}: {len(dense)} of {len(names)} modules are not packed, the first is {dense[0]}"
            f" ({modules[dense[0]].kind}), expected all or none; read those with Checkpoint.dense "
            f"and pack them with jax_marlin.quantize"
        )
    return not dense


def can_fuse(
    modules: Mapping[str, ModuleInfo],
    experts: Sequence[Sequence[str]],
    read: Read,
    *,
    trust_config: bool,
) -> bool:
    """Whether each expert's modules agree in K, bits, group size and g_idx; see `Checkpoint`."""
    check_present(modules, experts, "Checkpoint.can_fuse")
    infos = [modules[name] for names in experts for name in names]
    if not all(info.is_packed for info in infos):  # a dense weight has no permutation to differ in
        return not any(info.is_packed for info in infos) and all(
            len({modules[name].shape[0] for name in names}) == 1 for names in experts
        )
    for names in experts:
        specs = [spec_of(modules[name]) for name in names]
        if any(_words(spec) != _words(specs[0]) for spec in specs):
            return False
        if trust_config and not any(may_reorder_rows(modules[name]) for name in names):
            continue
        first, *others = (group_index(modules[name], read) for name in names)
        if not all(np.array_equal(first, other) for other in others):
            return False
    return True


def specs_of_parts(
    modules: Mapping[str, ModuleInfo], experts: Sequence[Sequence[str]]
) -> list[QuantSpec]:
    """Specs of the modules of expert 0, after checking that all experts have the same."""
    first = [spec_of(modules[name]) for name in experts[0]]
    for part, name in zip(first, experts[0], strict=True):
        if _words(part) != _words(first[0]):
            raise ValueError(
                f"{_WHERE}: module {name} has {_words(part)}, expected {_words(first[0])} as "
                f"{experts[0][0]}; load each into a stack of its own with load_expert_stacks"
            )
    for e, names in enumerate(experts):
        if len(names) != len(first):
            raise ValueError(
                f"{_WHERE}: expert {e} has {len(names)} modules, expected {len(first)} as expert 0"
            )
        for part, like, name in zip(first, experts[0], names, strict=True):
            spec = spec_of(modules[name])
            if spec != part:
                raise ValueError(
                    f"{_WHERE}: module {name} has {_words(spec)}, N={spec.n}, expected "
                    f"{_words(part)}, N={part.n} as {like}; experts of one stack must be alike"
                )
    return first


def _words(spec: QuantSpec) -> str:
    return f"K={spec.k}, bits={spec.bits}, group_size={spec.group_size}"
