# SPDX-License-Identifier: Apache-2.0
"""`python -m k3jax`."""

import sys

from k3jax.cli.main import main


if __name__ == "__main__":
    sys.exit(main())
