"""route: every scoring rule against a float64 loop, ties, groups that stay shut, and errors."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from jax_marlin.routing import route

NUM_EXPERTS, TOP_K = 24, 5

RULES = {
    "qwen3": {},
    "qwen2_not_renormalized": {"renormalize": False},
    "llama4_sigmoid": {"scoring": "sigmoid", "renormalize": False},
    "glm_sigmoid_bias_scale": {"scoring": "sigmoid", "bias": True, "scale": 1.8},
    "deepseek_v2_best_group": {
        "renormalize": False, "num_groups": 8, "top_groups": 3, "scale": 16.0,
    },
    "deepseek_v3_two_best_of_group": {
        "scoring": "sigmoid", "bias": True, "num_groups": 6, "top_groups": 2, "scale": 2.5,
    },
    "one_group": {"scoring": "sigmoid", "bias": True, "num_groups": 1, "top_groups": 1},
    "groups_of_one_expert": {"bias": True, "num_groups": 24, "top_groups": 7},
}  # fmt: skip


def route_one(logits, top_k, *, scoring="softmax", renormalize=True, correction_bias=None,
              num_groups=1, top_groups=None, scale=1.0):  # fmt: skip
    """One token in float64, by sorting: (weights, ids)."""
    logits = np.asarray(logits, np.float64)
    exp = np.exp(logits - logits.max())
    scores = exp / exp.sum() if scoring == "softmax" else oracle.sigmoid(logits)
    biased = scores if correction_bias is None else scores + np.asarray(correction_bias, np.float64)
    groups = np.split(np.arange(len(logits)), num_groups)
    best_of = 1 if correction_bias is None else 2
    group_scores = [np.sort(biased[g])[::-1][:best_of].sum() for g in groups]
    kept = np.argsort(-np.array(group_scores), kind="stable")[: top_groups or num_groups]
    candidates = np.sort(np.concatenate([groups[g] for g in kept]))
    ids = candidates[np.argsort(-biased[candidates], kind="stable")[:top_k]]
    weights = scores[ids]
    return (weights / weights.sum() if renormalize else weights) * scale, ids


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", RULES)
def test_rule(name, dtype, backend):
    options = dict(RULES[name])
    rng = np.random.default_rng(3)
    logits = jnp.asarray(2 * rng.normal(size=(2, 37, NUM_EXPERTS)), dtype)
    if options.pop("bias", False):
        options["correction_bias"] = rng.normal(size=NUM_EXPERTS).astype(np.float32)
    weights, ids = route(logits, TOP_K, **options)
    assert (weights.dtype, ids.dtype) == (jnp.float32, jnp.int32)
    rows = np.asarray(logits, np.float64).reshape(-1, NUM_EXPERTS)
    expected = [route_one(row, TOP_K, **options) for row in rows]
    np.testing.assert_array_equal(ids.reshape(-1, TOP_K), [e[1] for e in expected])
    np.testing.assert_allclose(
        weights.reshape(-1, TOP_K), np.array([e[0] for e in expected]), rtol=2e-6
    )


def test_ties_go_to_the_lower_expert(backend):
    _, ids = route(jnp.array([[1, 3, 3, 1, 3, 1]], jnp.bfloat16), 5)
    assert ids.tolist() == [[1, 2, 4, 0, 3]]


def test_ties_between_groups_go_to_the_lower_group():
    _, ids = route(jnp.zeros((3, 12)), 4, num_groups=4, top_groups=2)
    assert ids.tolist() == [[0, 1, 2, 3]] * 3


def test_bias_chooses_and_score_weighs():
    logits, bias = jnp.array([[2.0, 1.0, 0.0, -1.0]]), jnp.array([0.0, 0.0, 0.0, 9.0])
    weights, ids = route(
        logits, 2, scoring="sigmoid", correction_bias=bias, renormalize=False, scale=3.0
    )
    assert ids.tolist() == [[3, 0]]
    np.testing.assert_allclose(weights[0], 3 * oracle.sigmoid([-1.0, 2.0]), rtol=1e-6)


@pytest.mark.parametrize("closed", [-40.0, -np.inf])
def test_experts_of_closed_groups_are_never_chosen(closed):
    """Biased scores below zero, or -inf: filling closed groups with 0 or -inf would open them."""
    bias = np.full(12, closed, np.float32)
    bias[4:6] = -30  # group 1 of 4 is the best one; its expert 3 is no better than the others
    _, ids = route(
        jnp.zeros((7, 12)), 3, scoring="sigmoid", correction_bias=bias, num_groups=4, top_groups=1
    )
    assert ids.tolist() == [[4, 5, 3]] * 7


def test_gpt_oss_softmax_over_the_chosen_is_renormalized_softmax():
    logits = jnp.asarray(np.random.default_rng(5).normal(size=(6, 32)), jnp.float32)
    values, chosen = jax.lax.top_k(logits, 4)
    weights, ids = route(logits, 4)
    np.testing.assert_array_equal(ids, chosen)
    np.testing.assert_allclose(weights, jax.nn.softmax(values, axis=-1), rtol=1e-6)


@pytest.mark.parametrize("lead", [(), (7,), (2, 3), (0,), (2, 0, 3)])
def test_leading_axes(lead):
    weights, ids = route(jnp.ones((*lead, 6)), 2)
    assert weights.shape == ids.shape == (*lead, 2)


def test_all_experts_and_one_expert():
    weights, ids = route(jnp.array([[0.0, 2.0, 1.0]]), 3)
    assert ids.tolist() == [[1, 2, 0]]
    assert float(weights.sum()) == pytest.approx(1.0)
    assert route(jnp.array([[-3.0]]), 1)[0].tolist() == [[1.0]]


def test_scores_that_underflow_weigh_nothing():
    weights, _ = route(jnp.full((2, 4), -500.0), 2, scoring="sigmoid")
    assert weights.tolist() == [[0.0, 0.0]] * 2


def test_jit_and_vmap_give_the_same_bits():
    logits = jnp.asarray(np.random.default_rng(6).normal(size=(3, 5, 8)), jnp.float32)

    def rule(logits):
        return route(logits, 3, num_groups=4, top_groups=2)

    expected = rule(logits)
    for transformed in (jax.jit(rule), jax.vmap(rule), jax.jit(jax.vmap(rule))):
        for got, want in zip(transformed(logits), expected, strict=True):
            np.testing.assert_array_equal(got, want)


LOGITS = np.zeros((3, 8), np.float32)
ERRORS = [
    ({"top_k": 9}, ValueError, r"top_k is 9, expected 1 <= top_k <= 8"),
    ({"top_k": 0}, ValueError, r"top_k is 0, expected"),
    ({"top_k": 2.0}, TypeError, r"top_k is 2.0, expected a Python integer"),
    ({"logits": LOGITS.astype(int)}, TypeError, r"logits have dtype int\d+, expected a floating"),
    ({"logits": LOGITS[0, 0]}, ValueError, r"logits have shape \(\)"),
    ({"scoring": "tanh"}, ValueError, r"scoring is 'tanh', expected one of \('softmax', 'sigmoid'"),
    ({"correction_bias": LOGITS[0, :7]}, ValueError, r"correction_bias has shape \(7,\), expected"),
    ({"correction_bias": [1] * 8}, TypeError, r"correction_bias has dtype int32"),
    ({"num_groups": 3, "top_groups": 1}, ValueError, r"num_groups is 3, expected a divisor of 8"),
    ({"num_groups": 4}, ValueError, r"num_groups is 4 and top_groups is None"),
    ({"num_groups": 4, "top_groups": 5}, ValueError, r"top_groups is 5, expected 1 <= top_groups"),
    ({"top_groups": 2}, ValueError, r"top_groups is 2, expected 1 <= top_groups <= .* 1"),
    ({"num_groups": 4, "top_groups": 1, "top_k": 3}, ValueError, r".*1 of 4 groups hold only 2 of"),
]


@pytest.mark.parametrize(("changes", "error", "message"), ERRORS)
def test_errors_name_the_argument(changes, error, message):
    with pytest.raises(error, match="^route: " + message):
        route(**({"logits": LOGITS, "top_k": 2} | changes))


def test_the_largest_allowed_values_are_accepted():
    route(LOGITS, 8)
    route(LOGITS, np.int64(2), num_groups=4, top_groups=1)
    route(LOGITS, 8, num_groups=4, top_groups=4, correction_bias=np.zeros(8, np.float16))


@pytest.mark.parametrize("tokens", [1, 2**16])
def test_zeros_of_both_signs_are_a_tie(tokens):
    """Few rows are ranked by counting, many by a sort."""
    logits = jnp.tile(jnp.array([[-1.0, -0.0, 0.0, -0.0, 0.0]]), (tokens, 1))
    topk_weights, topk_ids = jax.jit(lambda a: route(a, 3))(logits)
    np.testing.assert_array_equal(topk_ids, np.tile([1, 2, 3], (tokens, 1)))
    np.testing.assert_allclose(topk_weights, np.full((tokens, 3), 1 / 3), rtol=1e-6)
