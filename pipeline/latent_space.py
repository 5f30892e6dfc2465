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


class AutoencoderProperties(Protocol):
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
class LatentSpace:
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
    def from_pixels(cls, channels: int, resolution: int) -> LatentSpace:
        """Return the space of pixels, without an autoencoder."""
        return cls(channels=channels, height=resolution, width=resolution, image_channels=channels)

    @classmethod
    def from_autoencoder(cls, autoencoder: AutoencoderProperties, resolution: int) -> LatentSpace:
        """An autoencoder's, with the scale and shift of its own configuration."""
        side = resolution // autoencoder.factor
        names = ("channels", "factor", "image_channels", "deterministic", "scale", "shift", "fingerprint")
        return cls(height=side, width=side, autoencoder=autoencoder.name, **{name: getattr(autoencoder, name) for name in names})

    @classmethod
    def from_checkpoint(cls, saved: dict[str, Any]) -> LatentSpace:
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
    def is_latent(self) -> bool:
        """Whether samples are latents."""
        return bool(self.autoencoder)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return the shape of a sample, (C, H, W)."""
        return self.channels, self.height, self.width

    @property
    def pixels(self) -> tuple[int, ...]:
        """Return the shape of an image, (C, H, W), where samples are latents; else empty, as `sampling.flow_model.FlowModel` has it."""
        return (self.image_channels, self.height * self.factor, self.width * self.factor) if self.is_latent else ()

    @property
    def resume_facts(self) -> dict[str, Any]:
        """On what a resumed run must agree; the autoencoder may have moved."""
        kept = {key: value for key, value in self.__dict__.items() if key != "autoencoder"}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in kept.items()}

    def with_statistics(self, statistics: Mapping[str, Any]) -> LatentSpace:
        """With the mean and the deviation of each channel, as `data.encode` measured them."""
        return replace(self, scale=tuple(1 / s for s in statistics["std"]), shift=tuple(statistics["mean"]))

    def with_overrides(self, scale: tuple[float, ...], shift: tuple[float, ...]) -> LatentSpace:
        """With the recipe's scale and shift, where it gives them."""
        return replace(self, scale=scale or self.scale, shift=shift or self.shift)

    def sample_posterior(self, moments: Tensor, seed: int, step: int, batch_indices: Tensor) -> Tensor:
        """A draw from posteriors: the same for (seed, step, place), whoever computes it.

        Args:
            moments: (B, 2 C, h, w), means and standard deviations; or (B, C, h, w), where deterministic. float32.
            seed, step: of the run.
            batch_indices: (B,), in the global batch.

        Returns:
            (B, C, h, w), float32, about unit size.
        """
        latents = moments
        if not self.deterministic:
            mean, std = moments.chunk(2, dim=1)
            latents = mean + std * normal(seed, Purpose.POSTERIOR, step, batch_indices, tuple(mean.shape[1:]))
        return (latents - _per_channel(self.shift, latents)) * _per_channel(self.scale, latents)

    def to_autoencoder_latents(self, z: Tensor) -> Tensor:
        """The autoencoder's own latents of a sample."""
        return z / _per_channel(self.scale, z) + _per_channel(self.shift, z)

    def decoder(self, load: Callable[[], Decoder]) -> Callable[[Tensor], Tensor]:
        """From samples, (B, C, h, w), to images, -1..1; the autoencoder is loaded when the first one comes."""
        if not self.is_latent:
            return lambda x: x
        loaded = cache(load)
        return lambda z: loaded().decode(self.to_autoencoder_latents(z))

    def __str__(self) -> str:
        if not self.is_latent:
            return f"{self.height} x {self.width} pixels, {self.channels} channel(s)"
        numbers = [", ".join(f"{v:.4g}" for v in values) for values in (self.shift, self.scale)]
        return (
            f"latents of {self.autoencoder}: {self.height} x {self.width}, {self.channels} channels, "
            f"minus ({numbers[0]}), times ({numbers[1]})"
        )


def _per_channel(values: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(1, -1, 1, 1)
