"""`python -m jaxopt_ext.bench`."""

import sys

from jaxopt_ext.bench.cli import main

if __name__ == "__main__":
    sys.exit(main())
