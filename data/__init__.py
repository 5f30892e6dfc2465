"""The stream: from images in tar shards to batches whose order is a pure function of (seed, epoch, position)."""
