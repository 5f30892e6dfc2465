"""What a folder of shards is on disk: tars, their index, the manifest of all."""
