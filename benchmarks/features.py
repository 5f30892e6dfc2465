"""Features of the small pretrained networks beside the checkout (../shared/data/features), for `sample.py evaluate --features`.

    python sample.py evaluate ... --features benchmarks/features.py:squeezenet

Their figures compare runs with one another; no published figure was measured with them.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "data" / "features"


@cache
def _network(file: str, name: str, weights: str) -> Any:
    """A network of that folder, by the loader that lies there."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name).load(FOLDER / weights)


def _seen(images: Tensor, side: int) -> Tensor:
    """Images (B, 1 or 3, H, W) in -1..1 as colour pictures in 0..1 of one size, (B, 3, side, side)."""
    sized = F.interpolate(images.float(), (side, side), mode="bilinear", antialias=True)
    return (sized.clamp(-1, 1) + 1).expand(-1, 3, -1, -1) / 2


@torch.no_grad()
def squeezenet(images: Tensor) -> Tensor:
    """512 features of SqueezeNet 1.0, which knows ImageNet, at 128 pixels."""
    return _network("squeezenet.py", "SqueezeNet", "squeezenet1_0.safetensors").features(_seen(images, 128))


@torch.no_grad()
def cifar(images: Tensor) -> Tensor:
    """64 features of a ResNet-56, which knows CIFAR-10."""
    return _network("cifar_resnet.py", "CifarResNet", "cifar_resnet56.safetensors").features(_seen(images, 32))
