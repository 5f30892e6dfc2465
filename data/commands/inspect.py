"""`python -m data.inspect` in the checkout; `condot inspect` anywhere."""

import sys

from condot.cli import start

if __name__ == "__main__":
    start("inspect", sys.argv[1:])
