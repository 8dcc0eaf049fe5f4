"""`python -m zamba2_jax` is the console command `zamba2`."""

import sys

from zamba2_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
