"""Code that travels with exported folders: pipelines and schedulers by version; a version that was published stays as it is."""
