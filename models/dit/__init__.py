"""DiT, the diffusion transformer with adaLN-zero, and its forms in diffusers."""
