"""A network of somebody else: an MLP-Mixer on classes, in one file outside the house.

Source: Tolstikhin et al., MLP-Mixer: An all-MLP Architecture for Vision, section 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from condot.core.model_config import ModelConfig
from condot.core.option_ranges import IntRange
from condot.models.common.conditioning import TimeAndClassEmbedding
from condot.models.common.init import InitMethod
from condot.models.common.layers import FeedForward, patch_embed, unpatchify
from condot.models.common.spec import NetworkSpec
from condot.models.registry import NETWORKS


@dataclass(frozen=True, kw_only=True)
class ToyConfig(ModelConfig):
    """An MLP-Mixer on classes."""

    kind: Literal["toy"] = "toy"  # a network of one file
    width: Annotated[int, IntRange("[4, inf)")] = 16  # channels of a token
    depth: Annotated[int, IntRange("[1, inf)")] = 2  # blocks
    patch_size: Annotated[int, IntRange("[1, inf)")] = 2  # pixels a side of one token


class MixerBlock(nn.Module):
    """A feed-forward net over tokens, then one over channels."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.tokens, self.channels = FeedForward(tokens), FeedForward(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(nn.functional.layer_norm(x, x.shape[-1:]).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(nn.functional.layer_norm(x, x.shape[-1:]))


class Mixer(nn.Module):
    """An MLP-Mixer whose tokens begin with the time and class added."""

    conditioning = "class"
    micro_conditions = False

    def __init__(self, *, channels: int, resolution: int, num_classes: int, width: int, depth: int, patch_size: int) -> None:
        super().__init__()
        self.channels, self.resolution, self.num_classes, self.patch_size = channels, resolution, num_classes, patch_size
        self.size_multiple = resolution  # the mixing of tokens knows one size
        self.condition = TimeAndClassEmbedding(width, num_classes, "original")
        self.enter = nn.Linear(channels * patch_size**2, width)
        self.blocks = nn.ModuleList(MixerBlock((resolution // patch_size) ** 2, width) for _ in range(depth))
        self.leave = nn.Linear(width, channels * patch_size**2)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor, sizes: Tensor | None = None) -> Tensor:
        h = patch_embed(self.enter, x, self.patch_size) + self.condition(t, condition)[:, None]
        for block in self.blocks:
            h = block(h)
        return unpatchify(self.leave(torch.tanh(h)), self.patch_size, x.shape[2] // self.patch_size)


def init_rule(name: str) -> InitMethod:
    """Return how a parameter begins: the output at zero."""
    return "zero" if name.startswith("leave.") else "torch"


NETWORKS.add("toy", NetworkSpec(
    config=ToyConfig,
    network=Mixer,
    init_rule=init_rule,
    lora_targets={"feed_forward": r"blocks\.\d+\.(tokens|channels)\.(enter|leave)"},
    tiny={"num_classes": 3, "width": 16, "depth": 2, "patch_size": 2},
))  # fmt: skip
