"""The recipe: its schema, its model section, and how YAML and the command line fill it."""
