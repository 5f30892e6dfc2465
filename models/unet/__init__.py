"""diffusers' U-Nets behind the interface of our networks."""
