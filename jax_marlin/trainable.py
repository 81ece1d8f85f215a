"""The part of a pytree that is trained, apart from packed weights, which stay as they are."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jax_marlin.weights import MarlinExpertStack


def split_trainable(tree: Any) -> tuple[Any, Any]:
    """Splits a pytree into what gradients are taken of and what packed experts keep frozen.

    Frozen are qweight, scales, zero_points and perm of every `MarlinExpertStack` and `MarlinLinear`
    in the tree, and leaves that are no floating-point arrays. Trainable is the rest: biases, norms,
    embeddings, adapters, a `DenseExpertStack`'s weights. Equinox calls this `partition`.

    Args:
        tree: any pytree; a model, a list of stacks, adapters.

    Returns:
        (trainable, frozen), each of the tree's structure with None in place of the other's leaves.
        `jax.grad` takes the first without `allow_int=True`, an optimizer updates it, and
        `merge_trainable` puts both together again.

    Example:
        >>> import jax, jax.numpy as jnp, numpy as np, jax_marlin as jm
        >>> w = jm.quantize(np.ones((64, 128), np.float32), group_size=32)
        >>> trainable, frozen = jm.split_trainable({"w": w, "scale": jnp.ones(64)})
        >>> def loss(trainable, x):
        ...     layer = jm.merge_trainable(trainable, frozen)
        ...     return jm.matmul(x * layer["scale"][None], layer["w"]).sum()
        >>> jax.grad(loss)(trainable, jnp.ones((2, 64)))["scale"][0].item()
        256.0
    """
    trains = jax.tree.map(_trains, tree, is_leaf=_is_stack)

    def pick(wanted: bool) -> Any:
        return jax.tree.map(lambda leaf, flag: leaf if flag == wanted else None, tree, trains)

    return pick(True), pick(False)


def merge_trainable(trainable: Any, frozen: Any) -> Any:
    """The tree whose two parts `split_trainable` returned; Equinox calls this `combine`.

    Args:
        trainable: the first part, with any values of the same shapes.
        frozen: the second part.

    Returns:
        The whole tree.

    Raises:
        ValueError: the parts are not of one tree.

    Example:
        >>> import jax, numpy as np, jax_marlin as jm
        >>> w = jm.quantize(np.ones((2, 64, 128), np.float32), group_size=32)
        >>> jm.merge_trainable(*jm.split_trainable(w))
        MarlinExpertStack(E=2, K=64, N=128, 4 bit, group_size=32, float32)
    """

    def either(new: Any, old: Any) -> Any:
        if new is not None and old is not None:
            raise ValueError(
                "merge_trainable: a leaf is in both trainable and frozen, expected the two parts "
                "that split_trainable returned"
            )
        return old if new is None else new

    return jax.tree.map(either, trainable, frozen, is_leaf=lambda node: node is None)


def _is_stack(node: Any) -> bool:
    return isinstance(node, MarlinExpertStack)


def _trains(node: Any) -> Any:
    """A flag for a leaf; for a packed stack, a stack of flags."""
    if _is_stack(node):
        flags = jax.tree.map(lambda _: False, node)
        return flags if node.bias is None else dataclasses.replace(flags, bias=True)
    return hasattr(node, "shape") and jnp.issubdtype(jnp.result_type(node), jnp.inexact)
