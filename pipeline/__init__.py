"""The method: configuration, mathematics, training, checkpoints, export, sampling, evaluation."""
