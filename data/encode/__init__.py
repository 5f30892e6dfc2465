"""Encode shards once: `condot encode --config recipe.yaml`."""
