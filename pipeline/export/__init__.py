"""The folder that diffusers loads: written, read back, and described by its card.

`runtime/` holds the code that travels with a folder.
"""
