"""The stream: from images on disk to batches whose order is a pure function of (seed, epoch, position).

`prepare` packs images into shards, `index` says what is in them, `order` which
sample comes when, `decode` makes pixels of files, `stream` puts it together.
"""
