"""Whether autocast is on for a device."""

from __future__ import annotations

import torch


def autocast_enabled(device: str) -> bool:
    """torch.is_autocast_enabled, for every device type: it raises on "meta", which has no autocast.

    (torch.amp.is_autocast_available would tell, but torch.compile cannot trace it before torch 2.12.)
    """
    return device != "meta" and torch.is_autocast_enabled(device)
