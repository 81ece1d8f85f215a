"""Decoding with the cache equals decoding without it; the command `jax-marlin generate`."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_marlin import cli, models
from jax_marlin.data import bundled_checkpoint
from jax_marlin.models.generation import _advance, stream

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
    assert len(list(stream(model, PROMPTS[:1], 9, eos_token_id=eos))) == 3
    assert models.generate(model, PROMPTS[:1], 9, eos_token_id=eos).shape == (1, 9)


def test_sampling_follows_its_key(model, greedy):
    def sample(seed, temperature):
        key = jax.random.key(seed)
        return np.asarray(models.generate(model, PROMPTS, 9, temperature=temperature, key=key))

    np.testing.assert_array_equal(sample(1, 2.0), sample(1, 2.0))
    assert (sample(1, 2.0) != sample(2, 2.0)).any()
    np.testing.assert_array_equal(sample(1, 1e-4), greedy)


def test_steps_compile_once(model, monkeypatch):
    models.generate(model, PROMPTS[:2], 5)
    # Only tracing runs the model's Python code: from here on it would fail.
    monkeypatch.setattr(models.CausalLM, "extend", None)
    assert models.generate(model, PROMPTS[1:] // 2, 5, eos_token_id=300).shape == (2, 5)


def test_cache_is_donated(model):
    cache = model.empty_cache(3, 7)
    ended = jnp.zeros(3, bool)
    _advance(model, jnp.asarray(PROMPTS), cache, ended, None, np.float32(0), np.int32(-1))
    assert all(leaf.is_deleted() for leaf in (*cache.keys, *cache.values))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens is 0, expected at least 1"),
        ({"max_new_tokens": 507}, ValueError, "need 513 positions, expected at most .* = 512"),
        ({"temperature": -1.0}, ValueError, "temperature is -1.0"),
        ({"temperature": float("nan")}, ValueError, "temperature is nan"),
        ({"temperature": 0.5}, ValueError, r"expected key=jax\.random\.key"),
        ({"ids": [[1.0]]}, TypeError, "input_ids have dtype float64"),
        ({"ids": [[512]]}, IndexError, r"expected 0\.\.511"),
        ({"ids": np.zeros((2, 0), np.int32)}, ValueError, r"shape \(2, 0\)"),
    ],
)
def test_bad_arguments(model, changes, error, message):
    with pytest.raises(error, match=f"^generate: .*{message}"):
        models.generate(model, **{"ids": PROMPTS, "max_new_tokens": 3} | changes)


def test_command_without_options(capsys):
    assert cli.main(["generate", "--max-new-tokens", "5"]) == 0
    out, err = capsys.readouterr()
    for part in ("MiB packed", "gptq", "group size 128", "limit 0.002", "tokens/s", "compiled"):
        assert part in out
    assert "decoding" in err and "5/5" in err


def test_command_with_options(capsys, greedy):
    prompt = ",".join(map(str, PROMPTS[2]))
    options = f"--prompt-ids {prompt} --batch 2 --max-new-tokens 2 --dtype float32".split()
    assert cli.main(["generate", "--checkpoint", str(bundled_checkpoint()), *options]) == 0
    out = capsys.readouterr().out
    assert "tokens      " + " ".join(map(str, greedy[2, :2])) in out
    assert "tokens/s" not in out  # both steps compiled: nothing to time


def broken_copy(directory, edit):
    """A copy of the bundled checkpoint after `edit(path)`."""
    path = directory / "checkpoint"
    shutil.copytree(bundled_checkpoint(), path)
    edit(path)
    return str(path)


def test_command_fails_on_wrong_logits(tmp_path, capsys):
    def shift(path):
        arrays = dict(np.load(path / "expected.npz"))
        arrays["logits"][1, 5, 7] += 0.5
        np.savez(path / "expected.npz", **arrays)

    path = broken_copy(tmp_path, shift)
    assert cli.main(["generate", "--checkpoint", path, "--max-new-tokens", "1"]) == 1
    assert "error: logits differ from expected.npz by 5.00e-01" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"model_type": "mixtral"}, "model_type 'mixtral'"), ({"vocab_size": 9}, "vocab")],
)
def test_command_fails_in_one_sentence(tmp_path, capsys, changes, message):
    def edit(path):
        config = json.loads((path / "config.json").read_text()) | changes
        (path / "config.json").write_text(json.dumps(config))

    path = broken_copy(tmp_path, edit)
    assert cli.main(["generate", "--checkpoint", path]) == 1
    err = capsys.readouterr().err
    assert err.startswith("jax-marlin generate: error: ") and "Traceback" not in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("content", [b"PK\x03\x04no", b"no archive", b""])
def test_command_with_a_damaged_reference(tmp_path, capsys, content):
    path = broken_copy(tmp_path, lambda path: (path / "expected.npz").write_bytes(content))
    assert cli.main(["generate", "--checkpoint", path]) == 1
    assert "no archive of input_ids and logits" in capsys.readouterr().err


@pytest.mark.parametrize("ids", ["", "3,-1", "3,x"])
def test_command_with_bad_token_ids(capsys, ids):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["generate", "--prompt-ids", ids])
    assert "no list of token ids" in capsys.readouterr().err


def test_command_without_a_directory(capsys):
    assert cli.main(["generate", "--checkpoint", "no/such/directory"]) == 1
    assert "no/such/directory" in capsys.readouterr().err


def test_help_names_the_commands(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    out = capsys.readouterr().out
    assert all(name in out for name in ("inspect", "generate", "bench"))
    with pytest.raises(SystemExit, match="0"):
        cli.main(["generate", "--help"])
    assert "--prompt-ids" in capsys.readouterr().out
