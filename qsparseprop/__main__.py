"""Entry of ``python -m qsparseprop``."""

import sys

from qsparseprop.cli import main

if __name__ == "__main__":
    sys.exit(main())
