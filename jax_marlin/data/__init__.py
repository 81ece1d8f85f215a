"""Where the checkpoint that comes with the package lies."""

import pathlib


def bundled_checkpoint() -> pathlib.Path:
    """Directory of a genuine GPTQ Qwen3-MoE checkpoint, small enough to ship (2 MB).

    4 bit, symmetric, group 128, 2 layers of 8 experts, written by GPTQModel from random weights;
    its README says how. `expected.npz` beside it holds float32 logits to compare with.

    >>> bundled_checkpoint().name
    'qwen3moe-gptq-sym-g128'
    """
    return pathlib.Path(__file__).parent / "qwen3moe-gptq-sym-g128"
