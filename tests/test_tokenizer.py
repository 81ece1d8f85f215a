"""The tokenizer beside a checkpoint: found, missing or damaged; stop tokens; the chat frame."""

import json
import sys

import pytest

from jax_marlin import cli, models
from jax_marlin.data import bundled_checkpoint
from jax_marlin.models.tokenizer import chat_prompt

tokenizers = pytest.importorskip("tokenizers", reason="the extra demo is not installed")


def word_level(*words):
    vocabulary = {word: i for i, word in enumerate(words)}
    return tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=words[0]))


def test_tokenizer_is_found(tmp_path):
    word_level("a", "b").save(str(tmp_path / "tokenizer.json"))
    assert models.load_tokenizer(tmp_path).encode("b").ids == [1]


def test_tokenizer_missing_or_damaged(tmp_path):
    with pytest.raises(ValueError, match=r"has no tokenizer\.json; give token ids"):
        models.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is no tokenizer"):
        models.load_tokenizer(tmp_path)


def test_package_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"load_tokenizer: .* pip install 'jax_marlin\[demo\]'"):
        models.load_tokenizer(tmp_path)


def test_command_with_a_checkpoint_that_has_no_tokenizer(capsys):
    assert cli.main(["generate", "hello", "--checkpoint", str(bundled_checkpoint())]) == 1
    assert "has no tokenizer.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [5, 6]}, {"eos_token_id": 7}, (5, 6)),
        ({}, {"eos_token_id": 7}, (7,)),
        (None, {"eos_token_id": 7}, (7,)),
        (None, {}, ()),
    ],
)
def test_stop_tokens(tmp_path, generation, config, expected):
    for name, content in [("generation_config", generation), ("config", config)]:
        if content is not None:
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
    assert models.load_stop_tokens(tmp_path) == expected


def test_stop_tokens_that_are_none(tmp_path):
    (tmp_path / "config.json").write_text('{"eos_token_id": "end"}')
    with pytest.raises(ValueError, match=r"config\.json has eos_token_id 'end', expected an id"):
        models.load_stop_tokens(tmp_path)


def test_chat_frame():
    assert chat_prompt(word_level("a"), "hi") == "hi"
    framed = chat_prompt(word_level("<|im_start|>", "<|im_end|>"), "hi")
    assert framed == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
