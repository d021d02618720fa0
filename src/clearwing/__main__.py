"""`python -m clearwing`: the command line."""

import sys

from clearwing.cli import main

if __name__ == "__main__":
    sys.exit(main())
