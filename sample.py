"""Sample, evaluate and export: `python sample.py --pipeline runs/digits/export --class_labels 0 1 2 --output three.png`.

Verbs: `images` (the default), `evaluate`, `retrieve`, `export`, `likelihood`, `restore`; each has its own `--help`.
"""

import sys

from condot.cli import start

if __name__ == "__main__":
    start("sample", sys.argv[1:])
