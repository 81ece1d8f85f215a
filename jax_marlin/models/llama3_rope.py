"""Llama 3's scaled rope: slow rotations are slowed further, so that longer contexts fit."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import numpy as np

from jax_marlin.models.rope import Rope, positive_number


@dataclasses.dataclass(frozen=True)
class Llama3Rope(Rope):
    """What config.json says beside theta.

    A rotation that turns more than `high_freq_factor` times within the context that the model was
    first trained on stays; one that turns less than `low_freq_factor` times is slowed by `factor`;
    in between, the two are mixed in proportion to the number of turns.

    Source: `_compute_llama3_parameters` of huggingface/transformers.

    >>> rope = Llama3Rope(5e5, 8.0, 1.0, 4.0, 8192)
    >>> (Rope(5e5).frequencies(64) / rope.frequencies(64))[[0, 31]].round(6).tolist()
    [1.0, 8.0]
    """

    keys: ClassVar[tuple[str, ...]] = (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    )

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: float

    @classmethod
    def parse(cls, rope: Mapping[str, Any], theta: float, context: int) -> Self:
        """As `Rope.parse`; all keys must be there, the limits in order."""
        scaled = cls(theta, *(positive_number(rope, key, "llama3") for key in cls.keys))
        if not scaled.low_freq_factor < scaled.high_freq_factor:
            raise ValueError(
                f"models.load: config.json has low_freq_factor {rope['low_freq_factor']}, expected "
                f"less than high_freq_factor, {rope['high_freq_factor']}"
            )
        return scaled

    def frequencies(self, dim: int) -> np.ndarray:
        """Radians a position, float64 `[dim / 2]`."""
        plain = super().frequencies(dim)
        turns = self.original_context * plain / (2 * math.pi)
        span = self.high_freq_factor - self.low_freq_factor
        kept = np.clip((turns - self.low_freq_factor) / span, 0.0, 1.0)
        return plain * (kept + (1.0 - kept) / self.factor)
