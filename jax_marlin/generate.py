"""The command `jax-marlin generate`: load a checkpoint, check its logits, answer or decode."""

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

from jax_marlin.answer import answer, print_memory, print_row
from jax_marlin.checkpoints.packed_cache import CACHE_VARIABLE, cache_directory
from jax_marlin.data import bundled_checkpoint
from jax_marlin.demo.build import ABOUT, demo_checkpoint
from jax_marlin.inspect import describe
from jax_marlin.models import CausalLM, load
from jax_marlin.models.generation import stream, with_progress

# Largest difference allowed between logits (of std about 1.35) and a float32 reference.
LOGITS_LIMITS = {"float32": 2e-3, "float16": 0.05, "bfloat16": 0.3}
_REFERENCE = "expected.npz"
_STEPS = (1, 16)  # decoded at a time: one that compiles, then the moves of the progress bar
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
    except (ValueError, TypeError, NotImplementedError, IndexError, OSError, ImportError) as error:
        print(f"jax-marlin generate: error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jax-marlin generate",
        description="Loads a checkpoint, compares its logits with the reference beside it "
        f"({_REFERENCE}, if there is one), continues a prompt and prints tokens per second.",
    )
    parser.add_argument(
        "prompt", nargs="?",
        help="text to answer; without --checkpoint by the demo's model, a small one that is built "
        "once (extra: demo). Without a prompt, token ids are decoded",
    )  # fmt: skip
    parser.add_argument(
        "--checkpoint", type=pathlib.Path, metavar="DIR",
        help="a model directory (default without a prompt: the small Qwen3-MoE that comes with the "
        "package, which knows no words)",
    )  # fmt: skip
    parser.add_argument(
        "--cache", action="store_true",
        help="keep the packed weights on disk, so that the next start packs nothing",
    )  # fmt: skip
    parser.add_argument(
        "--cache-dir", type=pathlib.Path, metavar="DIR",
        help="where the demo's model and packed weights are kept "
        f"(default: ${CACHE_VARIABLE}, or the user's cache)",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=LOGITS_LIMITS, help="default: float32 on a CPU, config.json's on a GPU"
    )
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="default: 64")
    parser.add_argument(
        "--prompt-ids", type=_token_ids, metavar="ID,ID,...",
        help="token ids to continue (default: the reference's first sequence)",
    )  # fmt: skip
    parser.add_argument("--batch", type=int, default=1, help="copies of the ids (default: 1)")
    parser.add_argument(
        "--raw", action="store_true", help="continue the text itself, not as a chat"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T",
        help="above 0: sample; default: 0, the likeliest token",
    )  # fmt: skip
    parser.add_argument("--top-k", type=int, metavar="K", help="sample among the K likeliest")
    parser.add_argument("--top-p", type=float, metavar="P", help="... that reach probability P")
    parser.add_argument("--seed", type=int, default=0, help="of the samples (default: 0)")
    return parser


def _token_ids(text: str) -> list[int]:
    parts = text.replace(",", " ").split()
    if not parts or not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of token ids such as 3,1,4")
    return [int(part) for part in parts]


def _run(args: argparse.Namespace) -> int:
    if args.batch < 1:
        raise ValueError(f"--batch is {args.batch}, expected at least 1")
    if args.prompt is not None and (args.prompt_ids or args.batch > 1):
        raise ValueError("a prompt in words goes without --prompt-ids and --batch")
    path = args.checkpoint or bundled_checkpoint()
    if args.prompt is not None and args.checkpoint is None:
        path = demo_checkpoint(args.cache_dir or cache_directory())
        print(ABOUT, end="\n\n", flush=True)
    print(describe(path), end="\n\n", flush=True)
    on_cpu = jax.default_backend() == "cpu"
    started = time.perf_counter()
    cache = (args.cache_dir or True) if args.cache else False
    model = load(path, args.dtype or ("float32" if on_cpu else None), cache=cache, progress=True)
    jax.block_until_ready(model)
    seconds = time.perf_counter() - started
    print_row("loaded", f"in {seconds:.1f} s as {model.dtype} on {jax.devices()[0].device_kind}")

    expected = _reference(path / _REFERENCE)
    status = 0 if expected is None else _check_logits(model, expected)
    how = {
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "key": jax.random.key(args.seed),
    }
    if args.prompt is not None:
        answer(model, path, args.prompt, args.max_new_tokens, raw=args.raw, **how)
    else:
        ids = args.prompt_ids or (_PROMPT if expected is None else expected["input_ids"][0])
        _decode(model, np.tile(np.asarray(ids), (args.batch, 1)), args.max_new_tokens, how)
    print_memory(model)
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
    print_row("logits", f"largest difference to {_REFERENCE} {difference:.2e}, limit {limit:g}")
    if not within:
        print(
            f"jax-marlin generate: error: logits differ from {_REFERENCE} by {difference:.2e}, "
            f"expected at most {limit:g} in {model.dtype.name}",
            file=sys.stderr,
        )
    return 0 if within else 1


def _decode(model: CausalLM, prompt: np.ndarray, max_new_tokens: int, how: dict) -> None:
    """Decodes and times; the first two tokens (prefill, first step) are those that compile."""
    started = time.perf_counter()
    runs = stream(model, prompt, max_new_tokens, steps=_STEPS, **how)
    tokens = jax.block_until_ready(list(itertools.islice(runs, 2)))
    seconds = time.perf_counter() - started
    print_row(
        "compiled", f"in {seconds:.1f} s, with the prefill of {prompt.shape} and a first step"
    )

    started = time.perf_counter()
    timed = max_new_tokens - len(tokens)
    if timed:
        tokens += with_progress(runs, max_new_tokens, done=len(tokens))
    seconds = time.perf_counter() - started
    rows = np.concatenate(tokens, axis=1)  # [batch, max_new_tokens]
    print_row("tokens", " ".join(map(str, rows[0])))
    if timed:
        rate = f"{timed * len(rows) / seconds:,.1f} tokens/s"
        print_row("speed", f"{rate} (batch {len(rows)}, {timed} steps, compile time excluded)")
