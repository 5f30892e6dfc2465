"""What a network is told: conditions lost once per sample, by the step's seed; sizes in pixels."""

from types import SimpleNamespace

import torch

from condot.pipeline.config.schema import Config, TrainConfig
from condot.pipeline.flow import Purpose, uniform
from condot.pipeline.training.conditioning import ConditionBuilder, drop_labels

CPU = torch.device("cpu")


def batch(batch_indices, labels=None):
    count = len(batch_indices)
    return SimpleNamespace(
        images=torch.zeros(count, 3, 4, 6, dtype=torch.uint8),
        labels=torch.arange(count) % 5 if labels is None else labels,
        batch_indices=batch_indices,
        sizes=torch.tensor([[30, 40, 1, 2]], dtype=torch.int32).expand(count, 4),
    )


class Recorder:
    """Text encoders that note who loses what."""

    encoders = 3

    def build_condition(self, batch, whole, each):
        return whole, each


def test_the_class_is_dropped_once_per_sample():
    """The null class replaces a label in the share of samples asked for, and where there is none."""
    labels, chance = torch.arange(1000) % 5, (torch.arange(1000) + 0.5) / 1000
    build_conditions = ConditionBuilder(Config(), 5, CPU, None, False, 1)
    (told,) = build_conditions(batch(torch.arange(1000), labels), 3, chance)
    assert (told == 5).sum() == 100 and torch.equal(told[100:], labels[100:])
    assert drop_labels(torch.tensor([-1, 2]), torch.tensor([False, False]), 5).tolist() == [5, 2]


def test_what_is_lost_hangs_on_the_place_and_not_on_the_rank():
    """Two halves of a global batch lose what the whole one loses; another step loses other things; encoders are lost apart."""
    config = Config(train=TrainConfig(condition_dropout=0.3, encoder_dropout=0.4))
    build_conditions = ConditionBuilder(config, 5, CPU, Recorder(), False, 1)
    batch_indices = torch.arange(4000)
    chance = uniform(0, Purpose.CONDITION_DROP, 7, batch_indices)
    ((whole, each),) = build_conditions(batch(batch_indices), 7, chance)
    parts = [build_conditions(batch(half), 7, uniform(0, Purpose.CONDITION_DROP, 7, half))[0] for half in batch_indices.split(2000)]
    assert torch.equal(torch.cat([p[0] for p in parts]), whole) and torch.equal(torch.cat([p[1] for p in parts]), each)
    assert not torch.equal(build_conditions(batch(batch_indices), 8, chance)[0][1], each)
    rates = each.double().mean(0)
    assert (rates - 0.4).abs().max() < 0.04 and abs(whole.double().mean() - 0.3) < 0.04, "five standard errors"
    columns = torch.cat([whole[:, None], each], dim=1).double()
    together = torch.corrcoef(columns.T) - torch.eye(4)
    assert together.abs().max() < 0.08, "independent of one another"


def test_sizes_are_of_the_original_the_crop_and_the_image():
    """Latents count as the pixels that they stand for."""
    build_conditions = ConditionBuilder(Config(), 5, CPU, None, True, 8)
    _, sizes = build_conditions(batch(torch.arange(2)), 0, torch.ones(2))
    assert sizes.tolist() == [[30, 40, 1, 2, 32, 48]] * 2 and sizes.dtype == torch.float32
