"""What a run shows: progress bar, metrics.jsonl, trackers, utilisation of the device."""
