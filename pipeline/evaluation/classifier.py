"""A small convolutional network that learns to tell real images' classes, on the spot: a judge of samples, and features of them.

Trained anew from the same seed on the same images, it is the same judge on the
same machine; figures by it compare runs on one data set, and are no published
figures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Network = TypeVar("Network", bound=nn.Module)
FEATURE_WIDTH = 64
"""Of the features."""
IMAGES_SEEN = 120_000
"""Images seen in training: two epochs of 60,000, within a minute on two cores at 28 x 28."""
MAX_EPOCHS = 30
BATCH_SIZE = 100


class Classifier(nn.Module):
    """Three convolutions over at most 32 x 32, then one hidden layer, whose outputs are the features.

    Args:
        channels: of the images.
        classes: how many.
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()

        def block(before: int, after: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU())

        self.one, self.two, self.three = block(channels, 32), block(32, FEATURE_WIDTH), block(FEATURE_WIDTH, FEATURE_WIDTH)
        self.hidden = nn.Sequential(nn.Dropout(0.5), nn.Linear(FEATURE_WIDTH * 16, FEATURE_WIDTH), nn.BatchNorm1d(FEATURE_WIDTH), nn.ReLU())
        self.out = nn.Linear(FEATURE_WIDTH, classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, 64) and logits (B, classes) of images (B, C, H, W) in -1..1."""
        x = images.float().contiguous(memory_format=torch.channels_last)
        while max(x.shape[-2:]) > 32:
            x = F.avg_pool2d(x, 2)
        x = self.one(x)
        x = self.two(F.max_pool2d(x, 2) if max(x.shape[-2:]) > 16 else x)
        x = self.three(F.max_pool2d(x, 2))
        features = self.hidden(F.adaptive_avg_pool2d(x, 4).flatten(1))
        return features, self.out(features)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """(N, 64), of images (N, C, H, W) in -1..1, in batches."""
        return torch.cat([self(batch)[0] for batch in images.split(512)])

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """The likeliest class of each image, (N,)."""
        return torch.cat([self(batch)[1].argmax(1) for batch in images.split(512)])


def train_classifier(images: Tensor, labels: Tensor, *, seed: int = 0) -> Classifier:
    """Learn the classes of real images.

    AdamW with a learning rate that rises and falls once (Smith and Topin,
    Super-convergence), no augmentation: what is asked for is a judge of these
    images as they are.

    Args:
        images: (N, C, H, W), -1..1, sides of 8 and more.
        labels: (N,), 0 and up.
        seed: of the weights and the order.

    Raises:
        ValueError: fewer than two classes, or images that are too small.
    """

    def loss(network: Classifier, rows: Tensor) -> Tensor:
        return F.cross_entropy(network(images[rows])[1], labels[rows], label_smoothing=0.1)

    return fit_classifier(lambda classes: Classifier(images.shape[1], classes), labels, loss, seed)


def fit_classifier(build: Callable[[int], Network], labels: Tensor, loss: Callable[[Network, Tensor], Tensor], seed: int = 0) -> Network:
    """Train a small network on labelled images, on the CPU.

    Args:
        build: gives the network for a number of classes.
        labels: of all images, (N,), 0 and up.
        loss: of the network and of the images of some rows, (B,), int64.
        seed: of the weights, the order and whatever the loss draws.

    Returns:
        The network, ready to judge, without gradients of its weights.

    Raises:
        ValueError: fewer than two classes.
    """
    classes = int(labels.max()) + 1 if len(labels) else 0
    if classes < 2:
        raise ValueError(f"{classes} class in the reference: a classifier needs two or more.")
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        network = build(classes)
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a third faster on a CPU
        order = list(_batches(len(labels)))
        optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
        ramp = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=len(order))
        for rows in order:
            loss(network, rows).backward()
            optimizer.step()
            optimizer.zero_grad()
            ramp.step()
    return network.eval().requires_grad_(False)


def _batches(count: int) -> Iterator[Tensor]:
    """Rows of each step, shuffled anew every epoch; whole batches only, for their statistics, ten or more an epoch."""
    size = max(2, min(BATCH_SIZE, count // 10))
    for _ in range(max(1, min(MAX_EPOCHS, IMAGES_SEEN // count))):
        yield from (rows for rows in torch.randperm(count).split(size) if len(rows) == size)
