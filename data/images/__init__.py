"""From the bytes of an image file to pixels: decoding, bands, colour, orientation, downscaling."""
