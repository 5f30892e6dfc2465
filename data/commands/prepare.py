"""`python -m data.prepare` in the checkout; `condot prepare` anywhere."""

import sys

from condot.cli import start

if __name__ == "__main__":
    start("prepare", sys.argv[1:])
