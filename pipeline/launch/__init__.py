"""The start of a process: how many there are, what they may use, how a network lies on them."""
