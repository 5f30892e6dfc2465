"""From a run's parts to its last step: the loop, its state, and what stands guard over both."""
