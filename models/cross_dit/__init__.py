"""A DiT that reads text by cross-attention (PixArt), and its forms in diffusers."""
