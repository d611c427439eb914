"""`python -m gakernels` is `gakernels`."""

import sys

from gakernels.cli import main

if __name__ == "__main__":
    sys.exit(main())
