"""What the network works on: pixels, or an autoencoder's latents, shifted and scaled to about unit size.

The autoencoder itself is introduced by `train.py` and `sample.py`; here is what
a run must remember of it, and the arithmetic between its latents and ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from .flow import Purpose, normal


class Decoder(Protocol):
    """What is needed of an autoencoder."""

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels, -1..1, of its own latents."""
        ...


class Latents(Protocol):
    """What is known of an autoencoder before it is built: see data.encoders.AutoencoderFacts."""

    @property
    def name(self) -> str: ...
    @property
    def channels(self) -> int: ...
    @property
    def factor(self) -> int: ...
    @property
    def image_channels(self) -> int: ...
    @property
    def deterministic(self) -> bool: ...
    @property
    def scale(self) -> tuple[float, ...]: ...
    @property
    def shift(self) -> tuple[float, ...]: ...
    @property
    def fingerprint(self) -> dict[str, Any]: ...


@dataclass(frozen=True, kw_only=True)
class Space:
    """The shape of one sample, and how it comes from moments; kept in every checkpoint.

    Raises:
        ValueError: a scale or shift that is neither one number nor one a channel.
    """

    channels: int
    height: int
    width: int
    factor: int = 1
    """Pixels a side of one value; pixels themselves have 1."""
    image_channels: int
    deterministic: bool = True
    """Whether moments are values; otherwise they are means, then deviations."""
    scale: tuple[float, ...] = (1.0,)
    shift: tuple[float, ...] = (0.0,)
    """z = (latent - shift) * scale; one number, or one a channel."""
    autoencoder: str = ""
    """Where it was found; empty for pixels."""
    fingerprint: dict[str, Any] = field(default_factory=dict)
    """Of the autoencoder."""

    def __post_init__(self) -> None:
        for name in ("scale", "shift"):
            value = getattr(self, name)
            if len(value) not in (1, self.channels):
                raise ValueError(
                    f"data.latent_{name} has {len(value)} numbers for latents of {self.channels} channels: give one, or one a channel."
                )

    @classmethod
    def of_pixels(cls, channels: int, resolution: int) -> Space:
        """No autoencoder."""
        return cls(channels=channels, height=resolution, width=resolution, image_channels=channels)

    @classmethod
    def of_latents(cls, known: Latents, resolution: int) -> Space:
        """An autoencoder's, with the scale and shift of its own configuration."""
        side = resolution // known.factor
        own = ("channels", "factor", "image_channels", "deterministic", "scale", "shift", "fingerprint")
        return cls(height=side, width=side, autoencoder=known.name, **{name: getattr(known, name) for name in own})

    @classmethod
    def of(cls, saved: dict[str, Any]) -> Space:
        """Return the space that a checkpoint keeps.

        Raises:
            ValueError: it keeps none.
        """
        try:
            space = cls(**{**saved, "scale": tuple(map(float, saved["scale"])), "shift": tuple(map(float, saved["shift"]))})
        except (TypeError, KeyError) as error:
            raise ValueError(f"a checkpoint's `space` is none ({error}): take another checkpoint.") from error
        sizes = (space.channels, space.height, space.width, space.factor, space.image_channels)
        if not all(type(size) is int and 0 < size < 2**20 for size in sizes) or not isinstance(space.autoencoder, str):
            raise ValueError(f"a checkpoint's `space` has the sizes {sizes}: take another checkpoint.")
        return space

    @property
    def latent(self) -> bool:
        """Whether samples are latents."""
        return bool(self.autoencoder)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of a sample, (C, H, W)."""
        return self.channels, self.height, self.width

    @property
    def pixels(self) -> tuple[int, ...]:
        """Of an image, (C, H, W), where samples are latents; else empty, as `generate.Source` has it."""
        return (self.image_channels, self.height * self.factor, self.width * self.factor) if self.latent else ()

    @property
    def facts(self) -> dict[str, Any]:
        """On what a resumed run must agree; the autoencoder may have moved."""
        kept = {key: value for key, value in self.__dict__.items() if key != "autoencoder"}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in kept.items()}

    def measured(self, statistics: Mapping[str, Any]) -> Space:
        """With the mean and the deviation of each channel, as `data.encode` measured them."""
        return replace(self, scale=tuple(1 / s for s in statistics["std"]), shift=tuple(statistics["mean"]))

    def given(self, scale: tuple[float, ...], shift: tuple[float, ...]) -> Space:
        """With the recipe's scale and shift, where it gives them."""
        return replace(self, scale=scale or self.scale, shift=shift or self.shift)

    def draw(self, moments: Tensor, seed: int, step: int, places: Tensor) -> Tensor:
        """A draw from posteriors: the same for (seed, step, place), whoever computes it.

        Args:
            moments: (B, 2 C, h, w), means and standard deviations; or (B, C, h, w), where deterministic. float32.
            seed, step: of the run.
            places: (B,), in the global batch.

        Returns:
            (B, C, h, w), float32, about unit size.
        """
        latents = moments
        if not self.deterministic:
            mean, std = moments.chunk(2, dim=1)
            latents = mean + std * normal(seed, Purpose.POSTERIOR, step, places, tuple(mean.shape[1:]))
        return (latents - _wide(self.shift, latents)) * _wide(self.scale, latents)

    def raw(self, z: Tensor) -> Tensor:
        """The autoencoder's own latents of a sample."""
        return z / _wide(self.scale, z) + _wide(self.shift, z)

    def decoder(self, load: Callable[[], Decoder]) -> Callable[[Tensor], Tensor]:
        """From samples, (B, C, h, w), to images, -1..1; the autoencoder is loaded when the first one comes."""
        if not self.latent:
            return lambda x: x
        loaded = cache(load)
        return lambda z: loaded().decode(self.raw(z))

    def __str__(self) -> str:
        if not self.latent:
            return f"{self.height} x {self.width} pixels, {self.channels} channel(s)"
        numbers = [", ".join(f"{v:.4g}" for v in values) for values in (self.shift, self.scale)]
        return (
            f"latents of {self.autoencoder}: {self.height} x {self.width}, {self.channels} channels, "
            f"minus ({numbers[0]}), times ({numbers[1]})"
        )


def _wide(values: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(1, -1, 1, 1)
