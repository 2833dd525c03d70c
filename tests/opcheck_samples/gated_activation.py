"""Two tensors forward, a packed one backward and quantised: tests/test_gated_activation.py has every other pairing."""

import torch


def samples() -> dict[str, tuple]:
    gate, up, packed, grad = torch.randn(6, 40), torch.randn(6, 40), torch.randn(6, 40), torch.randn(6, 20)
    return {
        "gated_activation": (gate.requires_grad_(), up.requires_grad_(), 4),
        "gated_activation_backward": (grad, packed, None, 2),
        "gated_activation_quantized": (packed, None, 3),
    }
