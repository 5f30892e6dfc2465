"""Where shards lie, here or elsewhere, and how their samples are read by number."""
