"""The command `jax-marlin generate`: load a checkpoint, check its logits, decode and time it."""

import argparse
import itertools
import pathlib
import sys
import time
import zipfile
import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jax_marlin.data import bundled_checkpoint
from jax_marlin.inspect import describe
from jax_marlin.models import CausalLM, load
from jax_marlin.models.generation import stream, with_progress

# Largest difference allowed between logits (of std about 1.35) and a float32 reference.
LOGITS_LIMITS = {"float32": 2e-3, "float16": 0.05, "bfloat16": 0.3}
_REFERENCE = "expected.npz"
_PROMPT = (1, 2, 3, 4, 5, 6, 7, 8)  # where neither an argument nor a reference gives one


def main(argv: Sequence[str]) -> int:
    """Runs the command; the arguments are those after `generate`.

    Args:
        argv: the command's options.

    Returns:
        0; or 1 if the checkpoint cannot be run or its logits are off, with the reason on stderr.
    """
    args = _parser().parse_args(argv)
    try:
        return _run(args)
    except (ValueError, TypeError, NotImplementedError, IndexError, OSError) as error:
        print(f"jax-marlin generate: error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jax-marlin generate",
        description="Loads a checkpoint, compares its logits with the reference beside it "
        f"({_REFERENCE}, if there is one), decodes tokens greedily and prints tokens per second.",
    )
    parser.add_argument(
        "--checkpoint", type=pathlib.Path, metavar="DIR",
        help="a model directory (default: the small Qwen3-MoE that comes with the package)",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=LOGITS_LIMITS, help="default: float32 on a CPU, config.json's on a GPU"
    )
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="default: 64")
    parser.add_argument(
        "--prompt-ids", type=_token_ids, metavar="ID,ID,...",
        help="token ids to continue (default: the reference's first sequence)",
    )  # fmt: skip
    parser.add_argument("--batch", type=int, default=1, help="copies of the prompt (default: 1)")
    return parser


def _token_ids(text: str) -> list[int]:
    parts = text.replace(",", " ").split()
    if not parts or not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of token ids such as 3,1,4")
    return [int(part) for part in parts]


def _run(args: argparse.Namespace) -> int:
    if args.batch < 1:
        raise ValueError(f"--batch is {args.batch}, expected at least 1")
    path = args.checkpoint or bundled_checkpoint()
    print(describe(path), end="\n\n", flush=True)
    on_cpu = jax.default_backend() == "cpu"
    started = time.perf_counter()
    model = load(path, args.dtype or ("float32" if on_cpu else None))
    jax.block_until_ready(model)
    seconds = time.perf_counter() - started
    _print("loaded", f"in {seconds:.1f} s as {model.dtype} on {jax.devices()[0].device_kind}")

    expected = _reference(path / _REFERENCE)
    status = 0 if expected is None else _check_logits(model, expected)
    prompt = args.prompt_ids or (_PROMPT if expected is None else expected["input_ids"][0])
    _decode(model, np.tile(np.asarray(prompt), (args.batch, 1)), args.max_new_tokens)
    return status


def _reference(path: pathlib.Path) -> dict[str, np.ndarray] | None:
    """The arrays to compare with, None if there is no such file."""
    if not path.is_file():
        return None
    try:
        # NumPy leaves a file that it opened itself open if that is no archive.
        with path.open("rb") as file, np.load(file) as arrays:
            return {name: arrays[name] for name in ("input_ids", "logits")}
    except (KeyError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is no archive of input_ids and logits: {error}") from error


def _check_logits(model: CausalLM, expected: dict[str, np.ndarray]) -> int:
    logits = jax.jit(lambda model, ids: model(ids))(model, jnp.asarray(expected["input_ids"]))
    difference = float(np.abs(np.asarray(logits) - expected["logits"]).max())
    limit = LOGITS_LIMITS[model.dtype.name]
    within = difference <= limit  # false for NaN, too
    _print("logits", f"largest difference to {_REFERENCE} {difference:.2e}, limit {limit:g}")
    if not within:
        print(
            f"jax-marlin generate: error: logits differ from {_REFERENCE} by {difference:.2e}, "
            f"expected at most {limit:g} in {model.dtype.name}",
            file=sys.stderr,
        )
    return 0 if within else 1


def _decode(model: CausalLM, prompt: np.ndarray, max_new_tokens: int) -> None:
    """Decodes and times; the first two tokens (prefill, first step) are those that compile."""
    started = time.perf_counter()
    steps = stream(model, prompt, max_new_tokens)
    tokens = jax.block_until_ready(list(itertools.islice(steps, 2)))
    seconds = time.perf_counter() - started
    _print("compiled", f"in {seconds:.1f} s, with the prefill of {prompt.shape} and a first step")

    started = time.perf_counter()
    timed = max_new_tokens - len(tokens)
    if timed:
        tokens += with_progress(steps, max_new_tokens, done=len(tokens))
    seconds = time.perf_counter() - started
    rows = np.stack(tokens, axis=1)  # [batch, max_new_tokens]
    _print("tokens", " ".join(map(str, rows[0])))
    if timed:
        rate = f"{timed * len(rows) / seconds:,.1f} tokens/s"
        _print("speed", f"{rate} (batch {len(rows)}, {timed} steps, compile time excluded)")


def _print(label: str, value: object) -> None:
    print(f"{label:<12}{value}", flush=True)
