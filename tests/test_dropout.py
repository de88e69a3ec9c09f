"""The masks of the dropout: the generator against its published values, rates, seeds, streams."""

from __future__ import annotations

import pytest
import torch

from crossvit_kernels.dropout import draw_seed, dropout_mask, philox

# Known answers for Philox 4x32-10 from the authors' library Random123: counter, key, words.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_the_generator_is_philox(counter, key, words):
    counter, key = (tuple(torch.tensor([x]) for x in numbers) for numbers in (counter, key))
    assert tuple(x.item() for x in philox(counter, key)) == words


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_the_rate_and_the_mean(probability):
    mask = dropout_mask(torch.tensor([7]), (40, 5, 401), probability, 0, torch.float64)
    kept = mask != 0
    assert (kept.double().mean() - (1 - probability)).abs() < 0.005
    assert torch.equal(mask[kept].unique(), torch.tensor([1 / (1 - probability)], dtype=torch.float64))
    assert (mask.mean() - 1).abs() < 0.02


def test_everything_or_nothing():
    assert dropout_mask(torch.tensor([7]), (3, 5), 0.0, 0, torch.float32).eq(1).all()
    assert not dropout_mask(torch.tensor([7]), (3, 5), 1.0, 0, torch.float32).any()


def test_seeds_streams_and_positions_are_told_apart():
    def mask(seed: int, stream: int) -> torch.Tensor:
        return dropout_mask(torch.tensor([seed]), (64, 64), 0.5, stream, torch.float32)

    masks = [mask(*each) for each in ((1, 0), (2, 0), (1 + 2**32, 0), (1, 1))]
    masks += [masks[0].T, masks[0].flip(0)]
    for i, a in enumerate(masks):
        for b in masks[:i]:
            assert 0.4 < a.eq(b).float().mean() < 0.6
    assert torch.equal(mask(1, 0), masks[0])


def test_the_mask_of_more_is_that_of_less_continued():
    seed = torch.tensor([3])
    assert torch.equal(
        dropout_mask(seed, (10, 7), 0.5, 0, torch.float32)[:3],
        dropout_mask(seed, (3, 7), 0.5, 0, torch.float32),
    )


def test_seeds_come_from_the_generator():
    torch.manual_seed(1)
    first, second = draw_seed("cpu"), draw_seed("cpu")
    assert first != second
    torch.manual_seed(1)
    assert torch.equal(draw_seed("cpu"), first)
