"""`python -m data.encode` in the checkout; `condot encode` anywhere."""

import sys

from condot.cli import start

if __name__ == "__main__":
    start("encode", sys.argv[1:])
