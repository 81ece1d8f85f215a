"""Says where a decode step's time goes: `python -m jax_marlin.bench.profile`.

Each batch is decoded once under JAX's profiler, without command buffers, so that the profiler knows
the part of the model that each kernel belongs to. Kernels take as long as within a command buffer;
what launches add is not counted, for there is next to none of it there.
"""

import argparse
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jax_marlin.bench import report
from jax_marlin.bench.decoding_state import in_context
from jax_marlin.bench.model_floor import cache_bytes, weight_bytes
from jax_marlin.bench.options import disable_command_buffers, positive
from jax_marlin.bench.problems import Quantization
from jax_marlin.bench.random_model import CONFIGS, random_model
from jax_marlin.bench.trace import Part, by_part, scopes, traced
from jax_marlin.linear import compute_dtype
from jax_marlin.models.causal_lm import CausalLM
from jax_marlin.models.decoding import decode
from jax_marlin.models.sampling import Sampling

# The innermost of these scopes that a kernel is in.
PARTS = {
    "qkv_proj": "q, k, v projection",
    "o_proj": "output projection",
    "self_attn": "attention, rotation, cache",
    "router": "router",
    "experts": "experts",
    "mlp": "MLP besides experts",
    "norms": "norms",
    "lm_head": "lm_head",
    "sampling": "sampling",
}
_REST = "embedding and loop"
_COLUMNS = {
    "batch": ("batch", "{}"),
    "part": ("part", "{}"),
    "launches": ("launches", "{:.1f}"),
    "us": ("us a step", "{:.1f}"),
    "share": ("share", "{:.1%}"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: the command's options; None takes the shell's.

    Returns:
        0.
    """
    parser = argparse.ArgumentParser(
        prog="python -m jax_marlin.bench.profile", description=(__doc__ or "").split("\n\n")[1]
    )
    add = parser.add_argument
    add("--model", choices=CONFIGS, help="default: qwen3-30b; tiny on a CPU")
    add("--batch", nargs="+", type=positive, metavar="N", default=[1, 32], help="default: 1 32")
    add("--context", type=positive, default=128, metavar="N", help="tokens before (default: 128)")
    add("--new-tokens", type=positive, default=16, metavar="N", help="decoded (default: 16)")
    add("--json", type=pathlib.Path, metavar="FILE", help="write all records")
    args = parser.parse_args(argv)
    disable_command_buffers()
    on_cpu = jax.default_backend() == "cpu"
    name = args.model or ("tiny" if on_cpu else "qwen3-30b")
    dtype = compute_dtype("float32" if on_cpu else "bfloat16", "profile")
    quantization = Quantization(4, 128, dtype)
    model = random_model(name, quantization)
    conditions = report.environment(quantization) | {
        "model": f"{name}, random weights",
        "method": f"{args.new_tokens} greedy tokens after a context of {args.context} random keys "
        "and values, no command buffers; a kernel's time is what it adds to that of the ones "
        "before it",
        "read_gb": {
            batch: round(_read(model, batch, args.context) / 1e9, 3) for batch in args.batch
        },
    }
    records = (
        record
        for batch in args.batch
        for record in profile(model, batch, args.context, args.new_tokens)
    )
    report.streamed(conditions, records, _COLUMNS, args.json)
    return 0


def profile(model: CausalLM, batch: int, context: int, new_tokens: int) -> Iterator[dict[str, Any]]:
    """A record for each part of a decode step, the longest first, then their sum."""
    state = in_context(model, batch, context, 1 + new_tokens)
    none, steps = jnp.zeros((0,), jnp.int32), jnp.int32(new_tokens)
    compiled = decode.lower(model, state, Sampling(), none, steps).compile()
    kernels = traced(lambda: compiled(model, state, Sampling(), none, steps))
    parts = by_part(kernels, scopes(compiled.as_text() or ""), part_of)
    everything = Part(
        sum(part.launches for part in parts.values()), sum(part.ns for part in parts.values())
    )
    in_order = sorted(parts.items(), key=lambda item: -item[1].ns)
    for name, part in [*in_order, ("all", everything)]:
        yield {
            "batch": batch,
            "part": name,
            "launches": part.launches / new_tokens,
            "us": part.ns / new_tokens / 1e3,
            "share": part.ns / everything.ns,
        }


def _read(model: CausalLM, batch: int, context: int) -> float:
    """Bytes that a step reads at least."""
    return weight_bytes(model, batch) + cache_bytes(model, batch, context)


def part_of(scope: str) -> str:
    """The part that a scope belongs to, in words.

    >>> part_of("jit(decode)/while/body/self_attn/o_proj/ffi_call")
    'output projection'
    >>> part_of("jit(decode)/while/body/add")
    'embedding and loop'
    """
    inner = [name for name in scope.split("/") if name in PARTS]
    return PARTS[inner[-1]] if inner else _REST


if __name__ == "__main__":
    sys.exit(main())
