"""Experts of a checkpoint into one preallocated stack: a module is read, packed and dropped."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

import ml_dtypes
import numpy as np
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from jax_marlin.act_order import perm_from_g_idx
from jax_marlin.canonical import CanonicalLinear, concat_columns, same_perm
from jax_marlin.checkpoints.module_format import Read
from jax_marlin.checkpoints.modules import ModuleInfo
from jax_marlin.checkpoints.packed_cache import PackedCache
from jax_marlin.checkpoints.placement import Block, Leaves, Placement
from jax_marlin.checkpoints.quantized_module import (
    group_index,
    may_have_zero_points,
    read_canonical,
    scales_of,
    spec_of,
)
from jax_marlin.checkpoints.workers import in_threads
from jax_marlin.layout import TILE
from jax_marlin.quant_spec import QuantSpec
from jax_marlin.stack_builder import StackBuilder
from jax_marlin.weights import MarlinExpertStack

_WHERE = "Checkpoint.load_expert_stack"
_SCALE_DTYPES = {"F16": np.float16, "BF16": ml_dtypes.bfloat16, "F32": np.float32}


def load_expert_stack(
    modules: Mapping[str, ModuleInfo],
    experts: Sequence[Sequence[str]],
    read: Read,
    *,
    dtype: DTypeLike | None,
    sharding: NamedSharding | None,
    cache: PackedCache | None,
    on_module: Callable[[], object],
) -> MarlinExpertStack:
    """Packs experts[e] = (module, ...), columns side by side, into slot e of one stack.

    Args:
        modules: all modules of the checkpoint.
        experts: for each expert the names of its modules, left to right along N.
        read: gives a tensor as stored; called once for each, by several threads.
        dtype: compute dtype of the stack; None keeps the stored one.
        sharding: see `Checkpoint.load_expert_stack`.
        cache: where packed stacks are kept, if they are.
        on_module: called after each module.

    Raises:
        ValueError: experts are missing or differ from each other; names them.
    """
    specs = _specs(modules, experts)
    spec = QuantSpec.create(
        bits=specs[0].bits,
        group_size=specs[0].group_size,
        k=specs[0].k,
        n=sum(part.n for part in specs),
        where=_WHERE,
    )
    chosen = _stored_dtype(modules, experts) if dtype is None else dtype
    placement = Placement(sharding, len(experts), spec, _WHERE)
    optional: tuple[str, ...] = ()
    if sharding is not None:  # other processes must come to the same leaves from other experts
        optional, shared = _optional_leaves(modules, experts, read)
        spec = dataclasses.replace(spec, shared_perm=shared)
        if "perm" in optional and placement.splits_k:
            raise ValueError(
                f"{_WHERE}: sharding splits K, and {experts[0][0]} gathers its input in act-order "
                f"(g_idx), which needs all of K; split experts or N"
            )
    starts = np.cumsum([0, *(part.n for part in specs)]).tolist()

    def pack(blocks: Sequence[Block]) -> dict[Block, Leaves]:
        """The leaves of blocks with the same experts, each of which is read once."""
        held = blocks[0].experts
        builders = {
            block: StackBuilder(len(held), block.spec(spec), chosen, optional) for block in blocks
        }

        def pack_expert(e: int) -> None:
            for where, canonical, start in _parts_of_expert(modules, experts[e], starts, read):
                columns = range(start, start + canonical.shape[1])
                for block, builder in builders.items():
                    _set_part(builder, block, held.index(e), canonical, columns, spec, where)

        for e in in_threads(pack_expert, held):
            for _ in experts[e]:
                on_module()
        return {block: builder.take_leaves()[0] for block, builder in builders.items()}

    for _, group in itertools.groupby(placement.blocks, lambda block: block.experts):
        blocks = list(group)
        found = _through_cache(cache, (experts, str(np.dtype(chosen)), optional), blocks, pack)
        for block in blocks:
            leaves = found.pop(block)
            if sharding is None:  # else it is known, and of all experts
                perm = leaves["perm"]
                shared = perm is not None and bool((perm == perm[:1]).all())
                spec = dataclasses.replace(spec, shared_perm=shared)
            placement.put(block, leaves)
    return placement.finish(spec)


def _through_cache(
    cache: PackedCache | None,
    what: tuple,
    blocks: Sequence[Block],
    pack: Callable[[Sequence[Block]], dict[Block, Leaves]],
) -> dict[Block, Leaves]:
    """`pack(blocks)`, out of the cache if all of it is there, else into it."""
    if cache is None:
        return pack(blocks)
    keys = {block: (*what, str(block.experts), str(block.columns), str(block.rows))
            for block in blocks}  # fmt: skip
    cached = {block: cache.load(key) for block, key in keys.items()}
    found = {block: leaves for block, leaves in cached.items() if leaves is not None}
    if len(found) < len(blocks):
        found = pack(blocks)
        for block, leaves in found.items():
            cache.store(keys[block], leaves)
    return found


def _parts_of_expert(
    modules: Mapping[str, ModuleInfo], names: Sequence[str], starts: Sequence[int], read: Read
) -> Iterator[tuple[str, CanonicalLinear, int]]:
    """(name for errors, weight, first column) of each part that can be packed by itself."""
    # Columns can be written one module at a time where each but the last ends on a tile's edge.
    if all(start % TILE == 0 for start in starts[:-1]):
        for name, start in zip(names, starts[:-1], strict=True):
            yield f"{_WHERE}: module {name}", read_canonical(modules[name], read), start
        return
    where = f"{_WHERE}: module {' | '.join(names)}"
    join = functools.partial(concat_columns, where=where)
    yield where, functools.reduce(join, (read_canonical(modules[n], read) for n in names)), 0


def _set_part(
    builder: StackBuilder,
    block: Block,
    e: int,
    canonical: CanonicalLinear,
    columns: range,
    spec: QuantSpec,
    where: str,
) -> None:
    """Packs what of one part, which holds `columns` of an expert, lies in `block`."""
    start, stop = max(columns.start, block.columns.start), min(columns.stop, block.columns.stop)
    if start >= stop:
        return
    if canonical.shape != (len(block.rows), stop - start):
        canonical.check(dataclasses.replace(spec, n=len(columns)), where)
        inside = range(start - columns.start, stop - columns.start)
        canonical = canonical.window(block.rows, inside, spec.group_size)
    first = block.columns.start
    builder.set_expert(e, canonical, where, slice(start - first, stop - first))


def _optional_leaves(
    modules: Mapping[str, ModuleInfo], experts: Sequence[Sequence[str]], read: Read
) -> tuple[tuple[str, ...], bool]:
    """The optional leaves of the whole stack, and whether perm is shared.

    Follows from headers and g_idx alone, of all experts, so that every process finds the same.
    """
    infos = [modules[name] for names in experts for name in names]
    found = []
    if any(may_have_zero_points(info) for info in infos):
        found.append("zero_points")
    if any("bias" in info.tensors for info in infos):
        found.append("bias")
    perms = []
    for names in experts:
        info, part = modules[names[0]], spec_of(modules[names[0]])
        g_idx = group_index(info, read)
        where = f"{_WHERE}: module {names[0]}"
        perm = perm_from_g_idx(g_idx, k=part.k, group_size=part.group_size, where=where)
        perms.append(perm)
    if any(perm is not None for perm in perms):
        found.append("perm")
    shared = "perm" in found and all(same_perm(perm, perms[0]) for perm in perms)
    return tuple(found), shared


def _stored_dtype(modules: Mapping[str, ModuleInfo], experts: Sequence[Sequence[str]]) -> DTypeLike:
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
    modules: Mapping[str, ModuleInfo], experts: Sequence[Sequence[str]], read: Read
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
        first, *others = (group_index(modules[name], read) for name in names)
        if not all(np.array_equal(first, other) for other in others):
            return False
    return True


def _specs(modules: Mapping[str, ModuleInfo], experts: Sequence[Sequence[str]]) -> list[QuantSpec]:
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
