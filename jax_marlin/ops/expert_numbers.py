"""Which experts ids count, inside `jax.shard_map`: a device's own, and that their type must say."""

from __future__ import annotations

import math
from typing import Any

import jax

from jax_marlin.dense_stack import DenseExpertStack


def check_own_experts(
    stack: Any, x: Any, ids: Any, name: str, remedy: str, where: str, of: str = "stack"
) -> None:
    """Refuses ids that are the same on devices which hold other experts each, beside the same x.

    Such ids count all experts, and would be read as counting the device's own: rows of all others
    would be dropped in silence. Where x varies, rows are each device's own, and so may ids be that
    are the same (of buffers as large for every expert, say).

    A stack that is cut by columns or rows differs between devices, too; its sizes tell how many
    share it. A `DenseExpertStack`'s do not, and without varying-axis checks nothing is known: there
    the ids are taken as they are.

    Args:
        stack: of packed experts, or dense.
        x: the rows.
        ids: what names the experts.
        name: of the argument that ids come from.
        remedy: what the caller could pass in its place.
        where: public op that errors name.
        of: name of the stack.

    Raises:
        ValueError: the stack's experts vary over a mesh axis that neither ids nor x vary over.
    """
    # All of it is known while the call is traced, and most calls end here.
    if isinstance(stack, DenseExpertStack) or not (axes := _varying(stack.qweight)):
        return
    axes = sorted(axes - _varying(ids) - _varying(x))
    held, whole = stack.held_spec, stack.spec
    sharing = whole.n * whole.k // (held.n * held.k)
    if math.prod(jax.lax.axis_size(axis) for axis in axes) > sharing:
        along = ", ".join(axes)
        raise ValueError(
            f"{where}: {of} holds other experts ({stack.num_experts}) on each device along {along},"
            f" but {name} and x are the same on all of them, expected {name} to count the device's "
            f"own experts; use {remedy}, or where every device does mean those numbers, "
            f"jax.lax.pcast({name}, {axes if len(axes) > 1 else axes[0]!r}, to='varying')"
        )


def _varying(array: Any) -> frozenset[str]:
    return jax.typeof(array).manual_axis_type.varying
