"""The demo: a small real language model, upcycled to a mixture of experts and quantized, once."""
