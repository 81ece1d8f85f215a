"""The command `jax-marlin generate`: what it prints, checks and refuses."""

import json
import shutil

import jax
import numpy as np
import pytest

from jax_marlin import cli, models
from jax_marlin.data import bundled_checkpoint

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
    last = err.splitlines()[-1]  # after a bar that says how far loading came
    assert last.startswith("jax-marlin generate: error: ") and "Traceback" not in err
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
