"""Train an image generator: `accelerate launch train.py --config configs/digits.yaml`; the same command resumes.

The story is in `condot/cli/train.py`.
"""

import sys

from condot.cli import start

if __name__ == "__main__":
    start("train", sys.argv[1:])
