"""What a network is conditioned on beside the point and the time: class or caption, taken from some samples for guidance; and sizes.

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
    def batch_indices(self) -> Tensor: ...
    @property
    def sizes(self) -> Tensor: ...
    @property
    def captions(self) -> tuple[str, ...]: ...
    @property
    def text(self) -> Any: ...


class SupportsTextConditions(Protocol):
    """Frozen text encoders: see data.words.TextConditioner."""

    @property
    def encoders(self) -> int: ...

    def build_condition(self, batch: Any, drop_all: Tensor, drop_encoders: Tensor) -> Condition:
        """The captions of a micro-batch, without those of `drop_all`, (B,), and single encoders' of `drop_encoders`, (B, encoders)."""
        ...


class ConditionBuilder:
    """From a micro-batch to what the network takes beside x and t.

    Args:
        config: of the run.
        null_class: the class that stands for none.
        device: to put it on.
        text_conditioner: the text encoders of a network that takes text.
        sizes: whether it takes the size and crop of the originals.
        pixels_per_value: pixels a side of one value of a batch's images.
    """

    def __init__(
        self,
        config: Config,
        null_class: int,
        device: torch.device,
        text_conditioner: SupportsTextConditions | None,
        sizes: bool,
        pixels_per_value: int,
    ) -> None:
        self.config, self.null_class, self.device, self.text_conditioner, self.sizes, self.pixels_per_value = (
            config,
            null_class,
            device,
            text_conditioner,
            sizes,
            pixels_per_value,
        )

    def __call__(self, batch: MicroBatch, step: int, chance: Tensor) -> tuple[Condition, ...]:
        """Labels or text, and sizes; `chance`, (B,), uniform in (0, 1), decides who loses the condition."""
        dropped = chance < self.config.train.condition_dropout
        if self.text_conditioner is None:
            condition = drop_labels(batch.labels.to(self.device, non_blocking=True), dropped, self.null_class)
        else:
            batch_indices = batch.batch_indices.to(self.device, non_blocking=True)
            encoder_chance = uniform(self.config.seed, Purpose.ENCODER_DROP, step, batch_indices, (self.text_conditioner.encoders,))
            condition = self.text_conditioner.build_condition(batch, dropped, encoder_chance < self.config.train.encoder_dropout)
        return (condition, self.size_condition(batch)) if self.sizes else (condition,)

    def size_condition(self, batch: MicroBatch) -> Tensor:
        """Height and width of the originals, top and left of the crops, height and width of the images: (B, 6), pixels."""
        shape = torch.tensor(batch.images.shape[-2:]) * self.pixels_per_value
        both = torch.cat([batch.sizes, shape.to(batch.sizes).expand(len(batch.sizes), 2)], dim=1)
        return both.to(self.device, torch.float32, non_blocking=True)


def drop_labels(labels: Tensor, dropped: Tensor, null_class: int) -> Tensor:
    """The null class in place of some samples', and of those that have none.

    Args:
        labels: (B,); negative where a sample has no class.
        dropped: (B,), bool.
        null_class: the label that stands for none.
    """
    return torch.where(dropped | (labels < 0), torch.full_like(labels, null_class), labels)
