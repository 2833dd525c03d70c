"""One call of each operator of cross_entropy and linear_cross_entropy with every tensor argument it can take."""

import torch


def samples() -> dict[str, tuple]:
    torch.manual_seed(0)
    rows, classes, k = 6, 40, 16
    logits, x = torch.randn(rows, classes), torch.randn(rows, k)
    target = torch.tensor([3, 0, 39, -100, 7, 7])
    weight, matrix, bias = torch.rand(classes), torch.randn(classes, k), torch.randn(classes)
    grad, grad_lse, lse = torch.randn(rows), torch.randn(rows), logits.logsumexp(1)
    state = torch.tensor([[-1e30, 0.0, 0.0, 0.0]]).repeat(rows, 1)
    options = (-100, 0.1, 1e-3, 5.0)

    def wanted(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(t.clone().requires_grad_() for t in tensors)

    x, matrix, bias = wanted(x, matrix, bias)
    plain = (x.detach(), matrix.detach(), target, bias.detach())
    return {
        "cross_entropy": (*wanted(logits), target, weight, *options),
        "cross_entropy_backward": (grad, grad_lse, logits, target, weight, lse, *options),
        "cross_entropy_backward_": (grad, grad_lse, logits[:, :25].clone(), target, weight, lse, *options, 10, classes),
        "cross_entropy_update_": (state, logits[:, :25].clone(), target, weight, -100, 5.0, 10),
        "linear_cross_entropy": (x, matrix, target, bias, *options),
        "linear_cross_entropy_backward": (grad, *plain, lse, *options, True, True, True),
        "linear_cross_entropy_gradients": (x, matrix, target, bias, *options, True, True, True, True),
    }
