"""Benchmarks: each operation is checked, then timed inside one program, against this GPU's floor.

`python -m jax_marlin.bench` or `jax-marlin bench`; `--help` lists the options.
"""
