"""What models read of a checkpoint's modules otherwise than as they are stored."""

import jax.numpy as jnp
import numpy as np
import pytest
from synthetic_checkpoints import gptq_tensors, quantization, write

from jax_marlin.checkpoints import open_checkpoint
from jax_marlin.models.module_reader import ModuleReader


@pytest.mark.parametrize("bits", [4, 8])
def test_a_packed_weight_is_dequantized_and_taken_apart(tmp_path, bits):
    parts, weight = gptq_tensors(1, 64, 96, bits=bits, act_order=True)
    other = gptq_tensors(2, 64, 96, bits=bits, act_order=True, bias=True)[0]
    parts["bias"] = np.zeros(96, np.float16)  # as old writers add to all
    path = write(tmp_path, {"a": parts, "b": other}, quantization(bits=bits, desc_act=True))
    with open_checkpoint(path) as checkpoint:
        reader = ModuleReader(checkpoint, jnp.dtype(jnp.float32))
        first, last = reader.dequantized("a", (64, 96), lambda w: (w[:, :32], w[:, 32:]))
        np.testing.assert_array_equal(first, weight[:, :32].astype(np.float32))
        np.testing.assert_array_equal(last, weight[:, 32:].astype(np.float32))
        with pytest.raises(ValueError, match=r"a has shape \(64, 96\), expected \(64, 80\)"):
            reader.dequantized("a", (64, 80), lambda w: w)
        with pytest.raises(ValueError, match="b has a bias that is not zero, expected none"):
            reader.dequantized("b", (64, 96), lambda w: w)
