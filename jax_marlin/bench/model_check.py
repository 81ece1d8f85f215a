"""Checks a model's logits before they are timed: against plain float32, and against themselves."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_marlin.bench.check import WrongResultError
from jax_marlin.models.causal_lm import CausalLM
from jax_marlin.models.layers import KVCache

_PROMPT, _STEPS, _BATCH = 150, 3, 2  # long enough for the attention that prompts get on a GPU
_LAYERS = 2  # of the model that plain JAX runs on the CPU
# Root mean square of a deviation over that of the logits. Unrelated logits deviate by 1.4; through
# many layers rounding also sends tokens to other experts, where two are nearly as good.
_LIMITS = {"float32": (1e-3, 1e-3), "float16": (0.02, 0.05), "bfloat16": (0.05, 0.1)}


def check_model(model: CausalLM) -> dict[str, float]:
    """Compares logits of the last position computed in different ways.

    Args:
        model: of any family, at least two layers deep.

    Returns:
        `deviation_reference`: the first layers, read in one call and decoded token by token,
        against the same ones in float32 in plain JAX on the CPU; `deviation_decode`: the whole
        model decoded against the whole prompt read in one call.

    Raises:
        WrongResultError: logits are not finite or deviate by more than the dtype explains.
    """
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (_BATCH, _PROMPT + _STEPS))
    ids = jnp.asarray(ids, jnp.int32)
    near, far = _LIMITS[model.dtype.name]
    shallow = dataclasses.replace(model, layers=model.layers[:_LAYERS])
    expected = _reference(shallow, ids)
    reference = max(_deviation(run(shallow, ids), expected) for run in (_read, _decoded))
    decode = _deviation(_decoded(model, ids), np.asarray(_read(model, ids)))
    for what, deviation, limit in (
        (f"the first {_LAYERS} layers deviate from float32", reference, near),
        ("decoded logits deviate from those of the whole prompt", decode, far),
    ):
        if not deviation <= limit:
            raise WrongResultError(f"model: {what} by {deviation:.2g}, expected at most {limit}")
    return {"deviation_reference": reference, "deviation_decode": decode}


def _read(model: CausalLM, ids: jax.Array) -> jax.Array:
    return _begin(model, ids, model.empty_cache(*ids.shape))[0]


def _decoded(model: CausalLM, ids: jax.Array) -> jax.Array:
    """The same logits from a prompt and single tokens after it."""
    logits, cache = _begin(model, ids[:, :_PROMPT], model.empty_cache(*ids.shape))
    for i in range(_PROMPT, ids.shape[1]):
        logits, cache = _continue(model, ids[:, i : i + 1], cache)
    return logits


@functools.partial(jax.jit, donate_argnames="cache")
def _begin(model: CausalLM, ids: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
    return model.extend(ids, cache, empty=True)


@functools.partial(jax.jit, donate_argnames="cache")
def _continue(model: CausalLM, ids: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
    return model.extend(ids, cache)


def _reference(model: CausalLM, ids: Any) -> np.ndarray:
    """Logits in float32; weights are the same, since packed ones and 16-bit ones fit in it."""
    cpu = jax.devices("cpu")[0]
    wide = jax.tree.map(
        lambda a: a.astype(jnp.float32) if jnp.issubdtype(a.dtype, jnp.floating) else a,
        jax.device_put(model, cpu),
    )
    with jax.default_device(cpu):
        return np.asarray(_read(wide, jax.device_put(ids, cpu)))


def _deviation(logits: jax.Array, expected: np.ndarray) -> float:
    """Root mean square of the difference over that of the expected logits."""
    got = np.asarray(logits)
    if not np.isfinite(got).all():
        raise WrongResultError("model: logits are not finite")
    return float(np.sqrt(np.mean((got - expected) ** 2) / np.mean(expected**2)))
