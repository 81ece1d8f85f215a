"""Benchmarks: each operation is checked, then timed in a loop on the device, against its floor.

`python -m jax_marlin.bench` or `jax-marlin bench`; `--help` lists the options.
"""
