"""The method: configuration, mathematics, training, checkpoints, export, sampling, evaluation."""

if __name__ == "pipeline":  # a second name would be a second class of every name
    raise ImportError("condot has one import name: write `import condot.pipeline`, not `import pipeline`.")
