"""Text in and out: the tokenizer and the stop tokens that lie beside a checkpoint's weights."""

from __future__ import annotations

import os
import pathlib
from typing import TYPE_CHECKING

from jax_marlin.checkpoints import json_file

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a checkpoint directory, from its tokenizer.json.

    Args:
        path: the directory that `models.load` takes.

    Returns:
        A `tokenizers.Tokenizer`: `encode(text).ids`, `decode(ids)`.

    Raises:
        ImportError: the package `tokenizers` is not installed.
        ValueError: there is no tokenizer.json, or it is damaged.

    >>> import pathlib, tempfile, tokenizers, jax_marlin as jm
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     words = tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a")
    ...     tokenizers.Tokenizer(words).save(str(pathlib.Path(folder) / "tokenizer.json"))
    ...     jm.models.load_tokenizer(folder).encode("b").ids
    [1]
    """
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            "load_tokenizer: text needs the package tokenizers, which is not installed; it comes "
            "with the extra: pip install 'jax_marlin[demo]', or '.[demo]' in a checkout"
        ) from error
    file = pathlib.Path(path) / "tokenizer.json"
    if not file.is_file():
        raise ValueError(
            f"load_tokenizer: {path} has no tokenizer.json; give token ids in place of text"
        )
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:
        raise ValueError(f"load_tokenizer: {file} is no tokenizer: {error}") from error


def load_stop_tokens(path: str | os.PathLike[str]) -> tuple[int, ...]:
    """The tokens that end an answer, by generation_config.json, or else by config.json.

    Args:
        path: the directory that `models.load` takes.

    Returns:
        Token ids for `generate`'s `eos_token_id`; none if neither file names any.

    Raises:
        ValueError: a file is damaged, or its eos_token_id is neither an id nor a list of them.

    >>> import jax_marlin as jm
    >>> from jax_marlin.data import bundled_checkpoint
    >>> jm.models.load_stop_tokens(bundled_checkpoint())
    (511,)
    """
    for name in ("generation_config.json", "config.json"):
        file = pathlib.Path(path) / name
        found = json_file.read_object(file).get("eos_token_id") if file.is_file() else None
        if found is None:
            continue
        ids = found if isinstance(found, list) else [found]
        if not all(type(i) is int for i in ids):
            raise ValueError(
                f"load_stop_tokens: {file} has eos_token_id {found!r}, expected an id or a list"
            )
        return tuple(ids)
    return ()


def chat_prompt(tokenizer: Tokenizer, text: str) -> str:
    """`text` as a user's turn, where the tokenizer knows the marks of ChatML; else as it is.

    Qwen's and SmolLM's models are trained on ChatML; its end mark is their stop token.
    """
    if tokenizer.token_to_id("<|im_start|>") is None:
        return text
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
