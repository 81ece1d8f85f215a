"""Upcycling: the MLP of a dense layer becomes experts that together still compute what it did.

The MLP's inner features are cut into `shards`, each an expert of a narrower MLP, whose outputs add
up to the dense one's: SwiGLU works on each inner feature alone. Of every shard there are `copies`,
each with a little noise of its own, so that no two experts are equal. The router scores the copies;
all shards of one copy get the same score, so that with top_k = shards a token goes to all shards of
the copy that it scores highest. Their router weights are 1 / shards each, and down is scaled by
`shards` to undo that. So every token passes one whole, slightly noisy copy of the dense MLP.

Before that, `balance` readies the MLP for 4 bit without changing what it computes.

Nothing is trained: such a model is no better than its dense source, only sparse in the same way as
a trained mixture of experts.

Source: "virtual group initialization" in arXiv:2410.07524.
"""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How one layer is upcycled.

    Attributes:
        copies: noisy copies of the MLP.
        shards: experts that each copy is cut into, and the experts of a token.
        noise: standard deviation of the noise, in those of the weight.
    """

    copies: int = 4
    shards: int = 2
    noise: float = 0.01

    @property
    def num_experts(self) -> int:
        return self.copies * self.shards


@dataclasses.dataclass(frozen=True)
class Experts:
    """One layer's router and experts; E = copies * shards, I the width of a shard.

    Attributes:
        router: float32 `[H, E]`.
        gate, up: float32 `[E, H, I]`.
        down: float32 `[E, I, H]`.
    """

    router: np.ndarray
    gate: np.ndarray
    up: np.ndarray
    down: np.ndarray


def balance(
    norm: np.ndarray, gate: np.ndarray, up: np.ndarray, down: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """`up [H, F]` and `down [F, H]` with a factor for each inner feature moved from up to down.

    The same function: an inner feature is linear in its column of up. But in down 64 features share
    a scale, and those that are large at run time should be rounded most finely. How large they are
    is guessed from the weights: the lengths of a feature's columns in gate and up, behind the
    layer's `norm [H]`, multiplied. Columns of up have scales of their own and lose nothing.

    Source: the scaling of AWQ (arXiv:2306.00978), here without activations to measure.

    >>> import numpy as np
    >>> up, down = balance(np.ones(2), np.eye(2), np.diag([4.0, 1.0]), np.eye(2))
    >>> (up @ down).tolist(), down.diagonal().tolist()
    ([[4.0, 0.0], [0.0, 1.0]], [1.414213562373095, 0.7071067811865475])
    """
    size = np.linalg.norm(norm[:, None] * gate, axis=0) * np.linalg.norm(norm[:, None] * up, axis=0)
    factor = np.sqrt(size / np.exp(np.log(size).mean()))  # [F], around 1
    return up / factor, down * factor[:, None]


def upcycle(
    gate: np.ndarray, up: np.ndarray, down: np.ndarray, recipe: Recipe, seed: int
) -> Experts:
    """Experts for the MLP `gate, up [H, F]`, `down [F, H]`.

    Raises:
        ValueError: F cannot be cut into equal shards.

    >>> import numpy as np
    >>> experts = upcycle(np.ones((4, 6)), np.ones((4, 6)), np.ones((6, 4)), Recipe(), seed=0)
    >>> experts.gate.shape, experts.down.shape, experts.router.shape
    ((8, 4, 3), (8, 3, 4), (4, 8))
    """
    hidden, width = gate.shape
    if width % recipe.shards:
        raise ValueError(f"upcycle: {recipe.shards} shards cannot share {width} features equally")
    rng = np.random.default_rng(seed)

    def copies(weight: np.ndarray) -> np.ndarray:  # [copies, *weight.shape]
        noise = rng.standard_normal((recipe.copies, *weight.shape), np.float32)
        noise *= np.float32(recipe.noise * weight.std())
        noise += weight
        return noise

    def by_columns(weight: np.ndarray) -> np.ndarray:  # [H, F] to [E, H, F / shards]
        cut = copies(weight).reshape(recipe.copies, hidden, recipe.shards, -1)
        return cut.swapaxes(1, 2).reshape(recipe.num_experts, hidden, -1)

    scores = rng.standard_normal((hidden, recipe.copies), np.float32) / np.sqrt(hidden)
    return Experts(
        router=np.repeat(scores.astype(np.float32), recipe.shards, axis=1),
        gate=by_columns(gate),
        up=by_columns(up),
        down=copies(down * recipe.shards).reshape(recipe.num_experts, -1, hidden),
    )
