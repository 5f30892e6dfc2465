"""Encode shards once: `accelerate launch -m data.encode --config recipe.yaml`."""
