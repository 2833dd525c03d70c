"""Autocast for operators whose scales must stay float32, so that torch.library.register_autocast cannot serve."""

import torch


def autocast(x: torch.Tensor) -> torch.Tensor:
    """x in the autocast dtype of its device where autocast is on, as torch.nn.functional.linear would cast it."""
    if not torch._C._is_any_autocast_enabled():  # 20 times cheaper to ask than the device's own switch
        return x
    device = x.device.type
    if not torch.amp.is_autocast_available(device):  # meta
        return x
    if torch.is_autocast_enabled(device) and x.dtype.is_floating_point and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device))
    return x
