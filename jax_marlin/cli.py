"""The command `jax-marlin`: hands its arguments to one of its commands, each of them a module."""

import argparse
import importlib
from collections.abc import Sequence

# command -> (module whose `main(argv)` runs it, help)
_COMMANDS = {
    "inspect": ("jax_marlin.inspect", "what a checkpoint holds, from its headers alone"),
    "generate": (
        "jax_marlin.generate",
        "answer a prompt; or check a checkpoint's logits and decode tokens",
    ),
    "bench": ("jax_marlin.bench.__main__", "time the operations on this machine's GPU"),
    "bench-model": ("jax_marlin.bench.model", "time a whole model's prefill and decoding"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the arguments after the program's name; None takes the shell's.

    Returns:
        The exit status: 0, or 1 if the command failed (argparse exits with 2 for bad arguments).
    """
    parser = argparse.ArgumentParser(
        prog="jax-marlin",
        description="INT4 mixture-of-experts inference inside jax.jit.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="commands:\n"
        + "\n".join(f"  {name:<13}{text}" for name, (_, text) in _COMMANDS.items())
        + "\n\n`jax-marlin COMMAND --help` lists a command's options.",
    )
    parser.add_argument("command", choices=_COMMANDS, metavar="COMMAND", help="see below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the command's own options")
    args = parser.parse_args(argv)
    # Imported only now: `bench` and `inspect` need not load what `generate` needs.
    command = importlib.import_module(_COMMANDS[args.command][0])
    return command.main(args.arguments) or 0
