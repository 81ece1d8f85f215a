"""`python -m jax_marlin` is the command `jax-marlin`."""

import sys

from jax_marlin.cli import main

if __name__ == "__main__":
    sys.exit(main())
