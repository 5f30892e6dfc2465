"""From opened shards to batches: order, buckets, captions, latents encoded before.

`build.build` opens what a recipe names.
"""
