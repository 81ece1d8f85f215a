"""Rotary position embedding as a model's config describes it: how fast features turn."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from jax_marlin.models.config_keys import number
from jax_marlin.models.layers import rotate


@dataclasses.dataclass(frozen=True)
class Rope:
    """The plain rope, and what scaled ones derive from; called with heads, it turns them.

    Attributes:
        theta: base of the frequencies; pair i of `dim` features turns by `theta^(-2i / dim)`
            radians a position.
    """

    keys: ClassVar[tuple[str, ...]] = ()  # of config.json that a scaled rope reads beside theta

    theta: float

    @classmethod
    def parse(cls, rope: Mapping[str, Any], theta: float, context: int) -> Self:
        """Reads config.json's `rope_parameters` or `rope_scaling`, whose keys are known, none null.

        Args:
            rope: the dictionary.
            theta: base of the frequencies.
            context: `max_position_embeddings`.

        Raises:
            ValueError: a key is missing or has no valid value.
        """
        return cls(theta)

    def frequencies(self, dim: int) -> np.ndarray:
        """Radians a position, float64 `[dim / 2]`, for rotated heads of `dim` features."""
        return self.theta ** (-2 * np.arange(dim // 2) / dim)

    @property
    def attention_factor(self) -> float:
        """What cosines and sines are multiplied by."""
        return 1.0

    @property
    def softmax_factor(self) -> float:
        """What DeepSeek's attention scores are multiplied by beside `head_dim**-0.5`."""
        return 1.0

    def __call__(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """Queries or keys `[batch, seq, heads, dim]` turned to positions int32 `[seq]`."""
        frequencies = jnp.asarray(self.frequencies(x.shape[-1]), jnp.float32)
        return rotate(x, positions, frequencies, self.attention_factor)


def positive_number(rope: Mapping[str, Any], key: str, kind: str) -> float:
    """A key of a rope dictionary of that type that must be a positive number."""
    return number(rope, key, of=f" for its rope of type {kind!r}")
