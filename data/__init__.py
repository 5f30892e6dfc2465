"""The stream: from images in tar shards to batches whose order is a pure function of (seed, epoch, position)."""

import os

if __name__ == "data":  # `python -m data.prepare` in the checkout; the library has one name, condot.data, and its classes one identity
    __path__ = [os.path.join(os.path.dirname(__file__), "commands")]
