"""Frozen encoders: autoencoders of images and encoders of text, known by fingerprints."""
