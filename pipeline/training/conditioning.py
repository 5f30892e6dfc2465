"""What a network is told beside the point and the time: class or caption, taken from some samples for guidance; and sizes.

Which samples lose what is a function of (seed, step, place in the global
batch), so that resuming and the number of ranks do not change it.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from ..config.schema import Config
from ..flow import Condition, Purpose, uniform


class MicroBatch(Protocol):
    """What the stream gives: see data.stream.Batch."""

    @property
    def images(self) -> Tensor: ...
    @property
    def labels(self) -> Tensor: ...
    @property
    def places(self) -> Tensor: ...
    @property
    def sizes(self) -> Tensor: ...
    @property
    def captions(self) -> tuple[str, ...]: ...
    @property
    def text(self) -> Any: ...


class Words(Protocol):
    """Frozen text encoders: see data.words.Words."""

    @property
    def encoders(self) -> int: ...

    def told(self, batch: Any, whole: Tensor, each: Tensor) -> Condition:
        """The captions of a micro-batch, without those of `whole`, (B,), and without single encoders' of `each`, (B, encoders)."""
        ...


class Teller:
    """From a micro-batch to what the network takes beside x and t.

    Args:
        config: of the run.
        null: the class that stands for none.
        device: to put it on.
        words: the text encoders of a network that takes text.
        sizes: whether it is told the size and crop of the originals.
        unit: pixels a side of one value of a batch's images.
    """

    def __init__(self, config: Config, null: int, device: torch.device, words: Words | None, sizes: bool, unit: int) -> None:
        self.config, self.null, self.device, self.words, self.sizes, self.unit = config, null, device, words, sizes, unit

    def __call__(self, batch: MicroBatch, step: int, chance: Tensor) -> tuple[Condition, ...]:
        """Labels or text, and sizes; `chance`, (B,), uniform in (0, 1), decides who loses the condition."""
        lost = chance < self.config.train.condition_dropout
        if self.words is None:
            condition = classes(batch.labels.to(self.device, non_blocking=True), lost, self.null)
        else:
            places = batch.places.to(self.device, non_blocking=True)
            single = uniform(self.config.seed, Purpose.ENCODER_DROP, step, places, (self.words.encoders,))
            condition = self.words.told(batch, lost, single < self.config.train.encoder_dropout)
        return (condition, self.sizes_of(batch)) if self.sizes else (condition,)

    def sizes_of(self, batch: MicroBatch) -> Tensor:
        """Height and width of the originals, top and left of the crops, height and width of the images: (B, 6), pixels."""
        shape = torch.tensor(batch.images.shape[-2:]) * self.unit
        both = torch.cat([batch.sizes, shape.to(batch.sizes).expand(len(batch.sizes), 2)], dim=1)
        return both.to(self.device, torch.float32, non_blocking=True)


def classes(labels: Tensor, lost: Tensor, null: int) -> Tensor:
    """The null class in place of some samples', and of those that have none.

    Args:
        labels: (B,); negative where a sample has no class.
        lost: (B,), bool.
        null: the label that stands for none.
    """
    return torch.where(lost | (labels < 0), torch.full_like(labels, null), labels)
