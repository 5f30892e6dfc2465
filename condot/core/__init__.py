"""What all rooms may import: errors, files written whole, locks, processes, safe reading and printing, options that both sides know.

Nothing here knows a model, a data set or a loss.
"""
