"""distillation_rows and linear_distillation, with their backward operators."""

import torch

SPEC = (2, 0.3, 2.0, 0.25, -100)  # jsd, beta, temperature, hard_weight, ignore_index


def samples() -> dict[str, tuple]:
    student, teacher = torch.randn(2, 3, 19), torch.randn(2, 3, 19, dtype=torch.bfloat16)
    target = torch.tensor([[0, 18, -100], [5, 6, 7]])
    x, weight, bias = torch.randn(2, 3, 8), torch.randn(19, 8), torch.randn(19)
    tensors = (x, weight, bias, torch.randn(2, 3, 5), torch.randn(19, 5), torch.randn(19), None, target)
    trained = tuple(t.clone().requires_grad_() for t in tensors[:3])
    return {
        "distillation_rows": (student.clone().requires_grad_(), teacher, target, *SPEC),
        "distillation_rows_backward": (torch.randn(2, 3), student, teacher, target, *SPEC),
        "distillation_rows_grad_": (student.clone(), teacher, target, torch.randn(2, 3), *SPEC),
        "linear_distillation": (*trained, *tensors[3:], *SPEC, 1, 7),
        "linear_distillation_backward": (torch.tensor(2.0), *tensors, *SPEC, 1, 7),
    }
