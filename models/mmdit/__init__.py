"""MM-DiT, Stable Diffusion 3's transformer, and its forms in diffusers."""
