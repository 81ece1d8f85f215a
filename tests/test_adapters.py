"""Adapters (LoRA) trained through frozen packed experts of a whole model: the loss falls."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_marlin as jm
from jax_marlin.data import bundled_checkpoint

RANK = 4


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Adapted:
    """A module with an update of low rank: `base(x) + x a b`."""

    base: Any
    a: jax.Array  # [K, RANK]
    b: jax.Array  # [RANK, N]

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.base(x) + jnp.tensordot(x, self.a, 1) @ self.b


def new_adapters(model):
    """For each layer, (a, b) of its output projection and of its experts; b is zero at first."""
    adapters, key = [], jax.random.key(0)
    for layer in model.layers:
        shapes = {"o_proj": layer.self_attn.o_proj.shape, "mlp": (layer.mlp.down.shape[2],) * 2}
        key, *keys = jax.random.split(key, 3)
        adapters.append(
            {
                name: (jax.random.normal(k, (rows, RANK)) / rows**0.5, jnp.zeros((RANK, columns)))
                for k, (name, (rows, columns)) in zip(keys, shapes.items(), strict=True)
            }
        )
    return adapters


def with_adapters(model, adapters):
    layers = []
    for layer, own in zip(model.layers, adapters, strict=True):
        attention = dataclasses.replace(
            layer.self_attn, o_proj=Adapted(layer.self_attn.o_proj, *own["o_proj"])
        )
        mlp = Adapted(layer.mlp, *own["mlp"])
        layers.append(dataclasses.replace(layer, self_attn=attention, mlp=mlp))
    return dataclasses.replace(model, layers=tuple(layers))


def next_token_loss(model, ids):
    log_probabilities = jax.nn.log_softmax(model(ids[:, :-1]))
    return -jnp.take_along_axis(log_probabilities, ids[:, 1:, None], axis=-1).mean()


def test_adapters_learn_through_frozen_experts():
    model = jm.models.load(bundled_checkpoint(), dtype=jnp.float32)
    adapters = new_adapters(model)
    ids = jnp.asarray(np.random.default_rng(1).integers(0, 500, (2, 12)), jnp.int32)

    @jax.jit
    def step(adapters, model):
        loss = lambda adapters: next_token_loss(with_adapters(model, adapters), ids)  # noqa: E731
        value, gradient = jax.value_and_grad(loss)(adapters)
        return value, jax.tree.map(lambda p, g: p - 0.5 * g, adapters, gradient), gradient

    losses = [float(next_token_loss(model, ids))]
    for i in range(10):
        value, adapters, gradient = step(adapters, model)
        losses.append(float(value))
        if i == 1:  # b is no longer zero: every adapter, of the first layer too, has a gradient
            assert all(leaf.any() for leaf in jax.tree.leaves(gradient))
    assert np.isclose(losses[0], losses[1], rtol=1e-5)  # with b = 0 the model is itself
    assert losses[1:] == sorted(losses[1:], reverse=True)
    assert losses[-1] < 0.8 * losses[0], losses


def test_a_models_trainable_part_learns():
    """Norms, embeddings and routers of the same model, apart from its packed weights."""
    trainable, frozen = jm.split_trainable(jm.models.load(bundled_checkpoint(), dtype=jnp.float32))
    assert not [a for a in jax.tree.leaves(trainable) if a.dtype == jnp.uint32]
    ids = jnp.asarray(np.random.default_rng(2).integers(0, 500, (2, 9)), jnp.int32)

    @jax.jit
    def step(trainable, frozen):
        def loss(trainable):
            return next_token_loss(jm.merge_trainable(trainable, frozen), ids)

        value, gradient = jax.value_and_grad(loss)(trainable)
        return value, jax.tree.map(lambda p, g: p - 0.1 * g, trainable, gradient)

    losses = []
    for _ in range(4):
        value, trainable = step(trainable, frozen)
        losses.append(float(value))
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.01
