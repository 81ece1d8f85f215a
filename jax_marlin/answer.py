"""Text for text: decodes the continuation of a prompt, shows it as it comes, and times it."""

from __future__ import annotations

import itertools
import pathlib
import resource
import sys
import time
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from jax_marlin.models import CausalLM, load_stop_tokens, load_tokenizer
from jax_marlin.models.generation import stream
from jax_marlin.models.tokenizer import chat_prompt

_STEPS = (1, 8)  # tokens between two looks at the device: one that compiles, then eight at a time


def answer(
    model: CausalLM, path: pathlib.Path, prompt: str, max_new_tokens: int, *, raw: bool, **how: Any
) -> None:
    """Prints the continuation of a prompt while it is decoded, and then how fast that went.

    Args:
        model: what `models.load` made of the checkpoint.
        path: the checkpoint's directory, where its tokenizer is.
        prompt: the text; asked as a chat's user where the tokenizer knows how.
        max_new_tokens: where to stop if no stop token comes.
        raw: continue the text itself, without a chat around it.
        how: `temperature`, `top_k`, `top_p` and `key` of `models.generate`.

    Raises:
        ImportError, ValueError: there is no tokenizer, or as `models.generate`.
    """
    tokenizer = load_tokenizer(path)
    ids = tokenizer.encode(prompt if raw else chat_prompt(tokenizer, prompt)).ids
    started = time.perf_counter()
    stops = load_stop_tokens(path)
    runs = stream(model, [ids], max_new_tokens, eos_token_id=stops, steps=_STEPS, **how)
    first = _ids(itertools.islice(runs, 2))
    print_row("compiled", f"in {time.perf_counter() - started:.1f} s, prefill and decoding loop")

    from tokenizers.decoders import DecodeStream

    text = DecodeStream(skip_special_tokens=True)  # knows when the bytes of a character are there
    print_row("answer", "", end="")

    def show(tokens: list[int]) -> int:
        for token in tokens:
            print(text.step(tokenizer, token) or "", end="", flush=True)
        return len(tokens)

    show(first)
    started = time.perf_counter()
    timed = sum(show(_ids([run])) for run in runs)
    seconds = time.perf_counter() - started
    print()
    if timed:
        rate = f"{timed / seconds:,.1f} tokens/s"
        print_row("speed", f"{rate} ({timed} tokens decoded one by one, compile time excluded)")


def _ids(runs: Iterable[jax.Array]) -> list[int]:
    """The tokens of the only row; waits for the device."""
    return [token for run in runs for token in np.asarray(run)[0].tolist()]


def print_row(label: str, value: object, end: str = "\n") -> None:
    """One line of a command's output."""
    print(f"{label:<12}{value}", end=end, flush=True)


def print_memory(model: CausalLM) -> None:
    """What the weights take, and the most that this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, on macOS bytes
    peak *= 1 if sys.platform == "darwin" else 1024
    print_row("memory", f"{_mib(model.nbytes)} of weights; at most {_mib(peak)} in this process")


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"
