"""The networks. `registry.build` makes one by name; nothing here knows a loss, a path or a data set."""
