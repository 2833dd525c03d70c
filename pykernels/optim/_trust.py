"""What an update is multiplied by because of its norm: LAMB's trust ratio and max_unorm. Nothing is read back."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import _optimizer_reference as rules
from ._plan import Bucket, Numbers


def ratio_of(bucket: Bucket, grads: list[Tensor], numbers: Numbers, grad_scale: Tensor | None) -> Tensor | None:
    """[n] float32, or None where every ratio is 1.

    LAMB (You et al., 2020): |p| / |u|, 1 where either is 0; a group turns it off with adapt=False.
    max_unorm, as in bitsandbytes: max_unorm |p| / |u| where the update's direction u (without the learning rate) is
    longer than max_unorm |p|. A parameter that is 0 is not limited, or it would stay 0.
    """
    group = bucket.group
    adapt, limit = bucket.algorithm == rules.LAMB and group["adapt"], group["max_unorm"]
    if not adapt and not limit > 0.0:
        return None
    p, u = bucket.norms(grads, numbers, grad_scale).sqrt().unbind(1)
    relative = torch.where((p > 0) & (u > 0), p / u, 1.0)
    ratio = relative if adapt else torch.ones_like(p)
    if limit > 0.0:
        ratio = torch.where((p > 0) & (u > 0), torch.minimum(ratio, relative * limit), ratio)
    return ratio
