"""What several networks are made of: layers, conditioning, initial weights, kernels, positions."""
