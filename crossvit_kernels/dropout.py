"""Dropout masks that are a function of a seed: the same in every backend, in backward and in recomputation.

The seed is one number from torch's generator, so masks differ from call to call and `torch.manual_seed`
repeats them; nothing of the mask's size is kept. Random numbers are Philox 4x32-10 (Salmon, Moraes, Dror and
Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
"""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def draw_seed(device: torch.device | str) -> Tensor:
    """An int64 [1] from torch's generator of the device."""
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four random words from a counter of four words and a key of two, all 0 to 2^32 - 1 in int64."""
    a, b, c, d = counter
    for _ in range(10):
        # Products exceed int64, which wraps: their bits are right all the same.
        low, high = _MULTIPLIERS[0] * a, _MULTIPLIERS[1] * c
        a, b, c, d = (
            ((high >> 32) & _LOW) ^ b ^ key[0],
            high & _LOW,
            ((low >> 32) & _LOW) ^ d ^ key[1],
            low & _LOW,
        )
        key = ((key[0] + _KEY_STEPS[0]) & _LOW, (key[1] + _KEY_STEPS[1]) & _LOW)
    return a, b, c, d


def dropout_mask(
    seed: Tensor, shape: tuple[int, ...], probability: float, stream: int, dtype: torch.dtype
) -> Tensor:
    """0 with `probability`, else 1 / (1 - probability): a tensor of `shape` on the seed's device.

    Element i in row-major order is dropped where word i % 4 of Philox with the counter (i // 4, stream) and
    the seed as its key is below probability * 2^32. `stream` tells apart what is drawn from one seed.
    """
    count = 1
    for size in shape:
        count = count * size
    block = torch.arange((count + 3) // 4, device=seed.device)
    counter = (block & _LOW, block >> 32, torch.full_like(block, stream), torch.zeros_like(block))
    words = philox(counter, (seed & _LOW, (seed >> 32) & _LOW))
    kept = torch.stack(words, dim=-1).flatten()[:count] >= int(probability * 2**32)
    return kept.reshape(shape).to(dtype) * (1 / (1 - probability) if probability < 1 else 0.0)
