"""rms_norm and layer_norm with all they take: parameters of another dtype, a residual, an offset."""

import torch


def samples() -> dict[str, tuple]:
    found: dict[str, tuple] = {}
    for name in ("rms_norm", "layer_norm"):
        x, residual, grad, grad_h = (torch.randn(3, 2, 40) for _ in range(4))
        weight, bias = torch.randn(40), torch.randn(40, dtype=torch.bfloat16)
        statistics = (torch.rand(3, 2) + 0.5, torch.randn(3, 2))[: 1 if name == "rms_norm" else 2]
        parts = [part.clone().requires_grad_() for part in (x, weight, bias, residual)]
        found[name] = (*parts, 1e-5, 1.0, True)
        found[f"{name}_quantized"] = (x, weight, bias, residual, 1e-5, 1.0, True)
        found[f"{name}_backward"] = (grad, grad_h, x, weight, *statistics, 1.0, True, torch.bfloat16)
    return found
