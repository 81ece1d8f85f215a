"""How the tokens of a benchmark choose their experts: evenly, by Zipf's law, or half of them alike.

A layer's time depends on how many experts its tokens reach and on how many of them the fullest
expert has; random routers reach more experts, and more evenly, than trained ones.
"""

import functools

import jax
import jax.numpy as jnp

from jax_marlin.bench.shapes import Shape

# name -> what it does
ROUTINGS = {
    "uniform": "every expert is as likely",
    "zipf": "the expert of rank r is 1 / r times as likely as the first, in an order new each call",
    "one-hot": "half of the tokens have one and the same expert first, and most experts have none",
}
_FAR = 1e4  # added to a score, decides against every draw


def touched_experts(shape: Shape, rows: int, routing: str | None) -> int:
    """The most experts that `rows` tokens can reach; `routing` is None for a dense product."""
    reachable = _pool(shape) if routing == "one-hot" else shape.experts
    return min(reachable, shape.touched_experts(rows))


@functools.partial(jax.jit, static_argnames=("rows", "shape", "routing"))
def random_routes(key, rows: int, shape: Shape, routing: str) -> tuple[jax.Array, jax.Array]:
    """Draws the experts of each token.

    Args:
        key: of the draw.
        rows: tokens.
        shape: with `experts` and `top_k`.
        routing: a name in `ROUTINGS`.

    Returns:
        topk_weights float32 `[rows, top_k]`, which sum to 1, and topk_ids int32 `[rows, top_k]`,
        distinct for a token.
    """
    order_key, draw_key = jax.random.split(key)
    rank = jax.random.permutation(order_key, shape.experts)  # of each expert
    # The largest of log p + Gumbel noise are a draw from p without replacement.
    noise = jax.random.gumbel(draw_key, (rows, shape.experts))
    if routing == "zipf":
        likelihood = -jnp.log1p(rank.astype(jnp.float32))
    elif routing == "one-hot":
        likelihood = jnp.where(rank < _pool(shape), 0.0, -_FAR)
    else:
        likelihood = jnp.zeros(shape.experts)
    scores = noise + likelihood[None]
    if routing == "one-hot":  # every other token has the first expert, and the others have not
        token = jnp.arange(rows)[:, None]
        scores += jnp.where((rank == 0)[None], jnp.where(token % 2 == 0, _FAR, -_FAR), 0.0)
    topk_ids = jax.lax.top_k(scores, shape.top_k)[1]
    logits = jnp.take_along_axis(noise, topk_ids, axis=1)
    return jax.nn.softmax(logits), topk_ids


def _pool(shape: Shape) -> int:
    """Experts that have tokens in a one-hot routing: a quarter, and enough to choose others."""
    return min(shape.experts, max(-(-shape.experts // 4), shape.top_k + 1))
