"""The command `jax-marlin bench-model`: times a whole model's prefill and decoding."""

import argparse
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jax_marlin.bench import report
from jax_marlin.bench.check import WrongResultError
from jax_marlin.bench.decoding_state import in_context, rewound, started
from jax_marlin.bench.floor import Ceilings
from jax_marlin.bench.model_check import check_model
from jax_marlin.bench.model_floor import cache_bytes, prefill_flops, weight_bytes
from jax_marlin.bench.options import add_ceilings, ceilings_of, positive
from jax_marlin.bench.problems import Quantization
from jax_marlin.bench.random_model import CONFIGS, random_model
from jax_marlin.linear import compute_dtype
from jax_marlin.models.causal_lm import CausalLM
from jax_marlin.models.decoding import Decoded, decode, prefill
from jax_marlin.models.sampling import Sampling

_COLUMNS = {
    "phase": ("phase", "{}"),
    "batch": ("batch", "{}"),
    "context": ("context", "{}"),
    "ms": ("ms", "{:.3f}"),
    "floor_ms": ("floor ms", "{:.3f}"),
    "share_of_floor": ("of floor", "{:.0%}"),
    "tokens_per_s": ("tokens/s", "{:,.0f}"),
    "floor_tokens_per_s": ("floor tokens/s", "{:,.0f}"),
    "cache_gb": ("cache GB", "{:.2f}"),
    "peak_gb": ("peak GB", "{:.2f}"),
    "error": ("error", "{}"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: the command's options; None takes the shell's.

    Returns:
        0; or 1 if the model's logits are wrong or it cannot run, with the reason on stderr.
    """
    args = _parser().parse_args(argv)
    try:
        return _run(args)
    except (ValueError, TypeError, OSError, WrongResultError, jax.errors.JaxRuntimeError) as error:
        print(f"jax-marlin bench-model: error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jax-marlin bench-model",
        description="Makes a model of random packed weights on the device, checks its logits, then "
        "times reading a prompt and decoding with a KV cache, against the bytes and flops of both.",
    )
    add = parser.add_argument
    add("--model", choices=CONFIGS, help="default: qwen3-30b; tiny on a CPU")
    add(
        "--batch", nargs="+", type=positive, metavar="N", default=[1, 4, 16, 32],
        help="sequences decoded at once, one model for all of them (default: 1 4 16 32)",
    )  # fmt: skip
    add(
        "--context", nargs="+", type=positive, metavar="N", default=[128, 2048],
        help="positions in the cache when decoding begins (default: 128 2048)",
    )  # fmt: skip
    add("--prompt", type=positive, default=2048, metavar="N", help="of prefill, batch 1")
    add("--new-tokens", type=positive, default=64, metavar="N", help="decoded (default: 64)")
    add("--runs", type=positive, default=5, metavar="N", help="their median (default: 5)")
    add("--dtype", help="float16, bfloat16 or float32 (default: bfloat16; float32 on a CPU)")
    add("--bits", type=int, choices=(4, 8), default=4, help="default: 4")
    add("--group-size", type=int, default=128, metavar="N", help="-1: one group (default: 128)")
    add(
        "--quantized-lm-head", action="store_true",
        help="quantize lm_head, too (default: as real checkpoints, which leave it)",
    )  # fmt: skip
    add_ceilings(parser)
    add("--json", type=pathlib.Path, metavar="FILE", help="write all records")
    return parser


def _run(args: argparse.Namespace) -> int:
    on_cpu = jax.default_backend() == "cpu"
    dtype = compute_dtype(args.dtype or ("float32" if on_cpu else "bfloat16"), "bench-model")
    quantization = Quantization(args.bits, args.group_size, dtype)
    ceilings, given = ceilings_of(args, dtype)
    name = args.model or ("tiny" if on_cpu else "qwen3-30b")
    model = random_model(name, quantization, quantized_lm_head=args.quantized_lm_head)
    conditions = report.environment(quantization)
    conditions |= report.floor_of(ceilings, given=given) | {
        "model": f"{name}, random weights, lm_head {'packed' if args.quantized_lm_head else dtype}",
        "model_gb": round(jax.block_until_ready(model).nbytes / 1e9, 3),
        "method": f"median of {args.runs} runs; decode: {args.new_tokens} greedy tokens in one "
        "call, after a context of random keys and values; floor: weights (experts that uniform "
        "routing reaches), keys and values read once, or the flops",
    }
    conditions |= check_model(model)
    records = report.streamed(conditions, _measure(model, ceilings, args), _COLUMNS, args.json)
    return int(any(record["error"] is not None for record in records))


def _measure(
    model: CausalLM, ceilings: Ceilings, args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Yields a record for the prompt, then one for each context and batch.

    What a batch asks of the device in vain (memory, say) is the `error` of its record.
    """
    cases = [("prefill", 1, args.prompt)]
    cases += [("decode", batch, context) for context in args.context for batch in args.batch]
    for phase, batch, context in cases:
        jax.clear_caches()  # programs of other shapes, which hold memory
        try:
            if phase == "prefill":
                seconds, floor, tokens = _prefill(model, context, ceilings, args)
            else:
                seconds, floor, tokens = _decode(model, batch, context, ceilings, args)
        except jax.errors.JaxRuntimeError as error:
            yield _record(phase, batch, context, model) | {"error": str(error).splitlines()[0]}
            continue
        yield _record(phase, batch, context, model) | {
            "ms": seconds * 1e3,
            "floor_ms": floor * 1e3,
            "share_of_floor": floor / seconds,
            "tokens_per_s": tokens / seconds,
            "floor_tokens_per_s": tokens / floor,
        }


def _prefill(
    model: CausalLM, context: int, ceilings: Ceilings, args: argparse.Namespace
) -> tuple[float, float, int]:
    """Seconds, the least of them, and tokens of a prompt."""
    start = started(model, 1, context, 1)
    seconds = _median(lambda d: _prefilled(model, d, context), start, args.runs)
    flops = prefill_flops(model, 1, context) / ceilings.flops
    floor = max(flops, weight_bytes(model, context) / ceilings.bandwidth)
    return seconds, floor, context


def _decode(
    model: CausalLM, batch: int, context: int, ceilings: Ceilings, args: argparse.Namespace
) -> tuple[float, float, int]:
    """Seconds, the least of them, and tokens of one step."""
    steps = args.new_tokens
    start = in_context(model, batch, context, 1 + steps)
    none = jnp.zeros((0,), jnp.int32)

    def run(decoded: Decoded) -> Decoded:
        return decode(model, rewound(decoded, context), Sampling(), none, jnp.int32(steps))

    seconds = _median(run, start, args.runs) / steps
    read = weight_bytes(model, batch) + cache_bytes(model, batch, context + steps / 2)
    return seconds, read / ceilings.bandwidth, batch


def _prefilled(model: CausalLM, decoded: Decoded, context: int) -> Decoded:
    """A random prompt read into the cache, which is donated."""
    batch, new_tokens = decoded.tokens.shape
    ids = jax.random.randint(jax.random.key(1), (batch, context), 0, model.config.vocab_size)
    none, cache = jnp.zeros((0,), jnp.int32), rewound(decoded, 0).cache
    return prefill(model, ids, None, cache, Sampling(), none, new_tokens)


def _median(run: Callable[[Decoded], Decoded], decoded: Decoded, runs: int) -> float:
    """Seconds of a run, each on what the one before it gave back; the first two compile."""
    samples = []
    for _ in range(2 + runs):
        jax.block_until_ready(decoded)
        started = time.perf_counter()
        decoded = jax.block_until_ready(run(decoded))
        samples.append(time.perf_counter() - started)
    return statistics.median(samples[2:])


def _record(phase: str, batch: int, context: int, model: CausalLM) -> dict[str, Any]:
    """A record whose times are still missing."""
    stats = jax.devices()[0].memory_stats() or {}
    peak = stats.get("peak_bytes_in_use")  # a CPU has no such number
    return {
        "phase": phase,
        "batch": batch,
        "context": context,
        "ms": None,
        "floor_ms": None,
        "share_of_floor": None,
        "tokens_per_s": None,
        "floor_tokens_per_s": None,
        "cache_gb": cache_bytes(model, batch, context) / 1e9,
        "peak_gb": None if peak is None else peak / 1e9,  # of the process until now
        "error": None,
    }


if __name__ == "__main__":
    sys.exit(main())
