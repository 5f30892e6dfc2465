"""Conditions of several parts are cut, repeated and stacked as their tensors would be, and guide as one label does."""

from typing import NamedTuple

import pytest
import torch

from condot.pipeline.flow import concat_conditions, guide, map_condition, num_samples, repeat_condition


class Words(NamedTuple):
    states: torch.Tensor
    mask: torch.Tensor
    pooled: torch.Tensor


def words(batch, tokens, seed=0):
    g = torch.Generator().manual_seed(seed)
    return Words(
        torch.randn(batch, tokens, 3, generator=g), torch.ones(batch, tokens, dtype=torch.bool), torch.randn(batch, 2, generator=g)
    )


def test_the_shorter_caption_is_lengthened_by_no_tokens():
    a, b = words(2, 5), words(3, 4, seed=1)
    both = concat_conditions(a, b)
    assert isinstance(both, Words) and num_samples(both) == 5
    assert torch.equal(both.states[:2], a.states) and torch.equal(both.states[2:, :4], b.states)
    assert not both.states[2:, 4:].any() and not both.mask[2:, 4:].any() and both.mask[:2].all()
    assert torch.equal(both.pooled, torch.cat([a.pooled, b.pooled]))
    swapped = concat_conditions(b, a)
    assert torch.equal(swapped.mask, both.mask[[2, 3, 4, 0, 1]])


def test_one_sample_serves_many_and_parts_keep_their_names():
    one = words(1, 4)
    many = repeat_condition(one, 6)
    assert num_samples(many) == 6 and torch.equal(many.pooled[5], one.pooled[0])
    assert map_condition(many, lambda part: part[:2]).mask.shape == (2, 4)
    assert torch.equal(repeat_condition(torch.tensor([7]), 3), torch.tensor([7, 7, 7]))


@pytest.mark.parametrize(
    "other", [torch.zeros(2), (torch.zeros(2),), tuple(words(2, 4))[:2], words(2, 4)._replace(states=torch.zeros(2, 4, 5))]
)
def test_conditions_of_different_make_are_refused(other):
    with pytest.raises(ValueError, match="one make"):
        concat_conditions(words(2, 4), other)


def test_guiding_by_text_is_the_formula():
    """A field that is linear in its condition: the guided one is u_null + w (u - u_null), in closed form."""
    text, null = words(3, 5), repeat_condition(words(1, 2, seed=1), 3)
    x, t = torch.randn(3, 2), torch.full((3,), 0.4)

    def field(x, t, c):
        return x + (c.states * c.mask[..., None]).sum((1, 2))[:, None] + c.pooled

    expected = field(x, t, null) + 2.5 * (field(x, t, text) - field(x, t, null))
    torch.testing.assert_close(guide(field, text, null, 2.5)(x, t), expected)
    torch.testing.assert_close(guide(field, text, null, 0.0)(x, t), field(x, t, null))
