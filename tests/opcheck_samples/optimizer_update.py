"""One step of AdamW for two tensors with every kind of state, and the passes that go before it."""

import torch


def _lists(kind: str) -> tuple:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 300), (2, 17)]
    params = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    grads = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    steps = [torch.full((), 3.0) for _ in shapes]
    if kind == "float32":
        return params, grads, [torch.rand(shape, generator=generator) for shape in shapes * 2], [], [], steps
    codes = [torch.randint(-127, 128, s, dtype=torch.int8, generator=generator) for s in shapes]
    codes += [torch.randint(0, 256, s, dtype=torch.uint8, generator=generator) for s in shapes]
    scales = [torch.rand(s[0], (s[1] + 255) // 256, generator=generator) for s in shapes * 2]
    return params, grads, codes, scales, [torch.zeros_like(p) for p in params], steps


def samples() -> dict[str, tuple]:
    lr, one, zero = torch.tensor(1e-3), torch.ones(()), torch.zeros(())
    numbers = (0.9, 0.999, 1e-8, 0.01)
    tensors = [torch.randn(5), torch.randn(3, 7).bfloat16()]
    return {
        "optimizer_update_": (0, 2, *_lists("codes"), lr, *numbers, 2, 7, [], 256, torch.ones(2), one, zero),
        "optimizer_norms": (1, 0, *_lists("float32"), *numbers, 0, 256, one),
        "squared_norms": (tensors,),
        "scale_tensors_": (tensors, torch.tensor(0.5)),
    }
