"""The networks. `registry.build` makes one by name; nothing here knows a loss, a path or a data set."""

if __name__ == "models":  # a second name would be a second class of every name
    raise ImportError("condot has one import name: write `import condot.models`, not `import models`.")
