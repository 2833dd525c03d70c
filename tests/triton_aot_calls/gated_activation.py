"""gated_activation at the tiles it is launched with: each activation, packed and not, short, long and looped rows."""

from collections.abc import Iterator

import torch

from pykernels.kernels.gated_activation import gated_activation, gated_activation_backward
from pykernels.kernels.gated_activation_quantized import gated_activation_quantized


def calls() -> Iterator[tuple]:
    every, hopper = (80, 90, 100), (90,)

    def x(M: int, K: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(M, K, dtype=dtype)

    f32 = torch.float32
    for code in (1, 2, 3, 4):
        yield f"gated {code}", every, None, lambda c=code: gated_activation(x(64, 4096), x(64, 4096), c)
        yield (
            f"gated backward {code}",
            every,
            None,
            lambda c=code: gated_activation_backward(x(64, 4096), x(64, 4096), x(64, 4096), c),
        )
        yield (
            f"gated quantized 8192 {code}",
            every,
            None,
            lambda c=code: gated_activation_quantized(x(64, 8192, f32), x(64, 8192, f32), c),
        )
    yield "relu2", every, None, lambda: gated_activation(x(64, 4096), None, 5)
    yield "relu2 backward", every, None, lambda: gated_activation_backward(x(64, 4096), x(64, 4096), None, 5)
    yield "relu2 quantized", hopper, None, lambda: gated_activation_quantized(x(64, 4096), None, 5)
    yield "gated packed", hopper, None, lambda: gated_activation(x(64, 11264, f32), None, 2)
    yield "gated packed odd", hopper, None, lambda: gated_activation(x(100, 74), None, 4)
    yield (
        "gated packed backward, expanded",
        hopper,
        None,
        lambda: gated_activation_backward(torch.empty((), dtype=f32).expand(64, 5632), x(64, 11264, f32), None, 2),
    )
    yield "gated quantized short", hopper, None, lambda: gated_activation_quantized(x(100, 74), None, 4)
    yield "gated quantized loop", every, None, lambda: gated_activation_quantized(x(8, 40000), None, 2)
