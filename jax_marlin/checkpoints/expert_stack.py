"""Experts of a checkpoint into one preallocated stack: read a few at a time, packed and dropped."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from jax_marlin.canonical import CanonicalLinear, concat_columns
from jax_marlin.checkpoints.expert_modules import optional_leaves, specs_of_parts, stored_dtype
from jax_marlin.checkpoints.module_format import Read
from jax_marlin.checkpoints.modules import ModuleInfo
from jax_marlin.checkpoints.packed_cache import PackedCache
from jax_marlin.checkpoints.placement import Block, Leaves, Placement
from jax_marlin.checkpoints.quantized_module import read_canonical
from jax_marlin.checkpoints.workers import in_threads
from jax_marlin.layout import TILE
from jax_marlin.quant_spec import QuantSpec
from jax_marlin.stack_builder import StackBuilder
from jax_marlin.weights import MarlinExpertStack
from jax_marlin.words import WORDS_AT_ONCE

_WHERE = "Checkpoint.load_expert_stack"
_FEWEST_TURNS = 32  # in which a stack is packed: threads share them, and memory beside it is little
_Part = tuple[str, CanonicalLinear, int]  # name for errors, weight, first column


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
    specs = specs_of_parts(modules, experts)
    spec = QuantSpec.create(
        bits=specs[0].bits,
        group_size=specs[0].group_size,
        k=specs[0].k,
        n=sum(part.n for part in specs),
        where=_WHERE,
    )
    chosen = stored_dtype(modules, experts) if dtype is None else dtype
    placement = Placement(sharding, len(experts), spec, _WHERE)
    optional: tuple[str, ...] = ()
    if sharding is not None:  # other processes must come to the same leaves from other experts
        optional, shared = optional_leaves(modules, experts, read)
        spec = dataclasses.replace(spec, shared_perm=shared)
        if "perm" in optional and placement.splits_k:
            raise ValueError(
                f"{_WHERE}: sharding splits K, and {experts[0][0]} gathers its input in act-order "
                f"(g_idx), which needs all of K; split experts or N"
            )
    words = max(part.k * part.n // part.pack_factor for part in specs)  # packed in one go
    starts = np.cumsum([0, *(part.n for part in specs)]).tolist()

    def pack(blocks: Sequence[Block]) -> dict[Block, Leaves]:
        """The leaves of blocks with the same experts, each of which is read once."""
        held = blocks[0].experts
        builders = {
            block: StackBuilder(len(held), block.spec(spec), chosen, optional) for block in blocks
        }

        def pack_experts(some: range) -> None:
            read_parts = [_parts_of_expert(modules, experts[e], starts, read) for e in some]
            places = range(held.index(some[0]), held.index(some[-1]) + 1)
            for parts in zip(*read_parts, strict=True):
                for block, builder in builders.items():
                    _set_part(builder, block, places, parts, spec)

        together = experts_at_once(words, len(held))
        for some in in_threads(
            pack_experts, [held[i : i + together] for i in range(0, len(held), together)]
        ):
            for _ in (name for e in some for name in experts[e]):
                on_module()
        packed = {block: builder.take_leaves()[0] for block, builder in builders.items()}
        if sharding is not None and "perm" not in optional:
            _check_in_order(packed.values(), experts[held[0]][0])
        return packed

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


def experts_at_once(words: int, experts: int) -> int:
    """How many experts a thread packs together, given the words of one and how many there are."""
    return max(1, min(WORDS_AT_ONCE // words, experts // _FEWEST_TURNS))


def _check_in_order(packed: Iterable[Leaves], module: str) -> None:
    """Raises for experts in act-order of a checkpoint that does not say so: see below."""
    if any(leaves["perm"] is not None for leaves in packed):
        raise ValueError(
            f"{_WHERE}: g_idx of module {module}, or of an expert after it, reorders rows, but the "
            f"quantization config has desc_act false, by which devices that hold other experts go; "
            f"set desc_act true in it, or load without sharding"
        )


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
) -> Iterator[_Part]:
    """The parts of an expert that can be packed each by itself."""
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
    places: range,
    parts: Sequence[_Part],
    spec: QuantSpec,
) -> None:
    """Packs what of the same part of some experts lies in `block`, whose `places` they are."""
    wheres, weights, (first, *_) = zip(*parts, strict=True)
    whole = range(first, first + weights[0].shape[1])
    start, stop = max(first, block.columns.start), min(whole.stop, block.columns.stop)
    if start >= stop:
        return
    if weights[0].shape != (len(block.rows), stop - start):
        for canonical, where in zip(weights, wheres, strict=True):
            canonical.check(dataclasses.replace(spec, n=len(whole)), where)
        inside = range(start - first, stop - first)
        weights = [one.window(block.rows, inside, spec.group_size) for one in weights]
    start, stop = start - block.columns.start, stop - block.columns.start
    builder.set_experts(places, weights, wheres, slice(start, stop))
