"""From a trained field to images: sampling, restoring, animating, and the likelihood of images."""
