"""The diffusion transformer with adaLN-zero: every block is shifted, scaled and gated by time and class.

Source: Peebles and Xie, Scalable Diffusion Models with Transformers, section
3.2. One embedding of time and class serves all blocks; the class is dropped by
the caller, once per sample.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .condition import Time
from .initialise import Rule, initialise
from .layers import Attention, FeedForward, modulate, patches, sincos_positions, unpatch


class Block(nn.Module):
    """Attention and feed-forward net, both modulated; the identity at the start."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = Attention(width, heads)
        self.feed_forward = FeedForward(width)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x (B, N, D), condition (B, D) after its SiLU -> (B, N, D)."""
        m = self.modulation(condition)[:, None].chunk(6, dim=2)
        x = torch.addcmul(x, m[2], self.attention(modulate(x, m[0], m[1])))
        return torch.addcmul(x, m[5], self.feed_forward(modulate(x, m[3], m[4])))


class DiT(nn.Module):
    """A class-conditional DiT.

    Args:
        channels: of an image.
        resolution: pixels a side.
        num_classes: 0 for an unconditional model.
        patch_size: pixels a side of a token.
        width: channels of a token.
        depth: blocks.
        heads: attention heads.

    Raises:
        ValueError: sizes that do not divide one another.
    """

    def __init__(self, *, channels: int, resolution: int, num_classes: int, patch_size: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        if patch_size < 1 or resolution % patch_size:
            raise ValueError(
                f"model.patch_size={patch_size} does not divide the resolution "
                f"{resolution}: use a divisor, such as {_divisor(resolution, 2)}."
            )
        if heads < 1 or width % heads or width % 4:
            raise ValueError(
                f"model.width={width} must be a multiple of 4 and of "
                f"model.heads={heads}: use {-(-width // (4 * max(heads, 1))) * 4 * max(heads, 1)}."
            )
        if depth < 1:
            raise ValueError(f"model.depth={depth}: a DiT has at least one block. Use 12.")
        self.channels, self.resolution, self.num_classes, self.patch_size = channels, resolution, num_classes, patch_size
        self.time = Time(width, "diffusers")
        self.classes = nn.Embedding(num_classes + 1, width)
        self.enter = nn.Linear(channels * patch_size**2, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.modulation = nn.Linear(width, 2 * width)
        self.leave = nn.Linear(width, channels * patch_size**2)
        self._positions: dict[tuple[int, int, torch.device, torch.dtype], Tensor] = {}
        if not self.enter.weight.is_meta:
            initialise(self)

    def rule(self, name: str) -> Rule:
        """How a parameter begins: the linear maps Xavier's way; every modulation and the output at zero, so that the network does."""
        if name.endswith("bias") or "modulation" in name or name.startswith("leave."):
            return "zero"
        return "normal" if name.startswith(("time.", "classes.")) else "xavier"

    @property
    def multiple(self) -> int:
        """The sides of an image are multiples of it."""
        return self.patch_size

    def positions_of(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """The positions of a grid of tokens, (rows * columns, D), as `like` is; kept once made."""
        key = rows, columns, like.device, like.dtype
        if key not in self._positions:
            self._positions[key] = sincos_positions(self.enter.out_features, rows, columns).to(like)
        return self._positions[key]

    def forward(self, x: Tensor, t: Tensor, labels: Tensor, sizes: Tensor | None = None) -> Tensor:
        """The prediction.

        Args:
            x: (B, channels, H, W), sides multiples of the patch size; `resolution` is the usual one.
            t: (B,), 0 (noise) to 1 (data).
            labels: (B,), int64, 0 .. num_classes; num_classes is none.

        Returns:
            The shape of x.
        """
        condition = F.silu(self.time(t) + self.classes(labels))
        rows, columns = x.shape[2] // self.patch_size, x.shape[3] // self.patch_size
        h = self.enter(patches(x, self.patch_size))
        h = h + self.positions_of(rows, columns, h)
        for block in self.blocks:
            h = block(h, condition)
        shift, scale = self.modulation(condition)[:, None].chunk(2, dim=2)
        return unpatch(self.leave(modulate(h, shift, scale)), self.patch_size, rows)


def _divisor(n: int, at_least: int) -> int:
    return next(d for d in range(min(at_least, n), n + 1) if n % d == 0)
