"""`models.generate`: equal to decoding without a cache, for prompts of any lengths; sampling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_marlin import models
from jax_marlin.data import bundled_checkpoint
from jax_marlin.models.decoding import decode, prefill
from jax_marlin.models.generation import _stop_tokens, stream
from jax_marlin.models.sampling import Sampling

PROMPTS = np.array([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8, 9, 7], [0, 511, 27, 18, 2, 81, 8]])


@pytest.fixture(scope="module")
def model():
    return models.load(bundled_checkpoint(), "float32")


@pytest.fixture(scope="module")
def greedy(model):
    """What decoding without a cache gives: 9 new tokens, the whole sequence read again for each."""
    ids = np.zeros((3, 16), np.int32)
    ids[:, :7] = PROMPTS
    logits_of = jax.jit(lambda model, ids: model(ids))
    for last in range(6, 15):  # causal, so the zeros after `last` change nothing
        ids[:, last + 1] = np.asarray(logits_of(model, ids))[:, last].argmax(-1)
    return ids[:, 7:]


def test_greedy_equals_decoding_without_a_cache(model, greedy):
    tokens = models.generate(model, PROMPTS, 9)
    assert tokens.dtype == jnp.int32
    np.testing.assert_array_equal(tokens, greedy)


def test_one_token_and_one_token_prompts(model, greedy):
    np.testing.assert_array_equal(models.generate(model, PROMPTS, 1), greedy[:, :1])
    first = np.asarray(model(PROMPTS[:, :1]))[:, 0].argmax(-1)
    np.testing.assert_array_equal(models.generate(model, PROMPTS[:, :1], 4)[:, 0], first)


def test_progress_changes_nothing(model, greedy, capsys):
    np.testing.assert_array_equal(models.generate(model, PROMPTS, 9, progress=True), greedy)
    assert "9/9" in capsys.readouterr().err


def test_row_that_ended_is_filled_with_the_end_token(model, greedy):
    eos = int(greedy[1, 3])
    tokens = np.asarray(models.generate(model, PROMPTS, 9, eos_token_id=eos))
    for got, free in zip(tokens, greedy, strict=True):
        ends = np.flatnonzero(free == eos)
        expected = free.copy()
        if ends.size:
            expected[ends[0] :] = eos
        np.testing.assert_array_equal(got, expected)


def test_decoding_stops_when_all_rows_ended(model, greedy):
    eos = int(greedy[0, 2])
    for steps in ([1], [2], [3], [9], [1, 4]):
        runs = list(stream(model, PROMPTS[:1], 9, eos_token_id=eos, steps=steps))
        np.testing.assert_array_equal(np.concatenate(runs, axis=1), greedy[:1, :3])
    assert models.generate(model, PROMPTS[:1], 9, eos_token_id=eos).shape == (1, 9)


def test_sampling_follows_its_key(model, greedy):
    def sample(seed, temperature):
        key = jax.random.key(seed)
        return np.asarray(models.generate(model, PROMPTS, 9, temperature=temperature, key=key))

    np.testing.assert_array_equal(sample(1, 2.0), sample(1, 2.0))
    assert (sample(1, 2.0) != sample(2, 2.0)).any()
    np.testing.assert_array_equal(sample(1, 1e-4), greedy)


def test_prompts_of_different_lengths_as_if_alone(model):
    prompts = [list(map(int, PROMPTS[0])), [6], np.array([0, 511, 27, 18]), [2, 81, 8, 9, 1, 4]]
    tokens = np.asarray(models.generate(model, prompts, 6))
    for prompt, row in zip(prompts, tokens, strict=True):
        np.testing.assert_array_equal(row, models.generate(model, np.asarray(prompt)[None], 6)[0])


def test_prompts_of_different_lengths_end_by_themselves(model):
    prompts = [[3, 1, 4], [1, 5], [9, 2, 6, 5, 3]]
    free = np.asarray(models.generate(model, prompts, 8))
    stops = [int(free[0, 1]), int(free[2, 4])]
    tokens = np.asarray(models.generate(model, prompts, 8, eos_token_id=stops))
    for row, expected in zip(tokens, free, strict=True):
        ends = np.flatnonzero(np.isin(expected, stops))
        if ends.size:
            expected = expected.copy()
            expected[ends[0] :] = expected[ends[0]]
        np.testing.assert_array_equal(row, expected)


@pytest.mark.parametrize(
    ("steps", "lengths"),
    [([1], [1] * 9), ([3], [1, 3, 3, 2]), ([8], [1, 8]), ([99], [1, 8]), ([1, 4], [1, 1, 4, 3])],
)
def test_runs_are_parts_of_the_whole(model, greedy, steps, lengths):
    runs = list(stream(model, PROMPTS, 9, steps=steps))
    assert [run.shape[1] for run in runs] == lengths
    np.testing.assert_array_equal(np.concatenate(runs, axis=1), greedy)


def test_top_k_of_one_and_tiny_top_p_are_greedy(model, greedy):
    key = jax.random.key(3)
    for top_k, top_p in [(1, None), (None, 1e-6), (1, 0.5)]:
        tokens = models.generate(
            model, PROMPTS, 9, temperature=3.0, key=key, top_k=top_k, top_p=top_p
        )
        np.testing.assert_array_equal(tokens, greedy)


def test_compiles_once_whatever_the_numbers(model, monkeypatch):
    numbers = {"temperature": 1.0, "top_k": 5, "top_p": 0.5, "eos_token_id": 300}
    models.generate(model, PROMPTS[:2], 5, key=jax.random.key(0), **numbers)
    # Only tracing runs the model's Python code: from here on it would fail.
    monkeypatch.setattr(models.CausalLM, "extend", None)
    numbers = {"temperature": 0.5, "top_k": 500, "top_p": 0.9, "eos_token_id": 7}
    tokens = models.generate(model, PROMPTS[1:] // 2, 5, key=jax.random.key(1), **numbers)
    assert tokens.shape == (2, 5)


def test_cache_is_donated(model):
    sampling, stops = Sampling(), _stop_tokens(None)
    cache = model.empty_cache(3, 9)
    decoded = prefill(model, jnp.asarray(PROMPTS), None, cache, sampling, stops, 3)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(cache.layers))
    decode(model, decoded, sampling, stops, jnp.int32(2))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(decoded))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens is 0, expected at least 1"),
        ({"max_new_tokens": 507}, ValueError, "need 513 positions, expected at most .* = 512"),
        ({"temperature": -1.0}, ValueError, "temperature is -1.0"),
        ({"temperature": float("nan")}, ValueError, "temperature is nan"),
        ({"temperature": 0.5}, ValueError, r"expected key=jax\.random\.key"),
        ({"top_k": 0}, ValueError, "top_k is 0, expected at least 1"),
        ({"top_p": 0.0}, ValueError, "top_p is 0.0, expected above 0"),
        ({"top_p": 1.5}, ValueError, "top_p is 1.5, .* at most 1"),
        ({"eos_token_id": 1.5}, TypeError, "eos_token_id is 1.5, expected an id"),
        ({"ids": [[1, 2], []]}, ValueError, r"input_ids\[1\] is empty"),
        ({"ids": [[1, 2], [512]]}, IndexError, r"expected 0\.\.511"),
        ({"ids": [[1, 2], [0.5]]}, TypeError, "input_ids have dtype float64"),
        ({"ids": []}, TypeError, "input_ids have dtype float64"),
        ({"ids": [[1.0]]}, TypeError, "input_ids have dtype float64"),
        ({"ids": [[512]]}, IndexError, r"expected 0\.\.511"),
        ({"ids": np.zeros((2, 0), np.int32)}, ValueError, r"shape \(2, 0\)"),
    ],
)
def test_bad_arguments(model, changes, error, message):
    with pytest.raises(error, match=f"^generate: .*{message}"):
        models.generate(model, **{"ids": PROMPTS, "max_new_tokens": 3} | changes)
