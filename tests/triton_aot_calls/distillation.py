"""distillation_rows: every divergence with and without labels, the loss alone, the gradient alone, both in place."""

from collections.abc import Iterator

import torch


def calls() -> Iterator[tuple]:
    from pykernels.kernels.distillation import (
        distillation_rows,
        distillation_rows_backward,
        distillation_rows_grad_,
    )

    every, hopper = (80, 90, 100), (90,)

    def logits(V: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(16, V, dtype=dtype)

    target, scale = torch.empty(16, dtype=torch.int64), torch.empty(16)
    for divergence in range(4):
        for name, labels, hard in (("soft", None, 0.0), ("hard", target, 0.5)):
            spec = (divergence, 0.5, 2.0, hard, -100)
            yield (
                f"distillation {divergence} {name} in place",
                every,
                None,
                lambda labels=labels, spec=spec: distillation_rows_grad_(
                    logits(128256), logits(128256), labels, scale, *spec
                ),
            )
        yield (
            f"distillation {divergence} loss",
            hopper,
            None,
            lambda spec=spec: distillation_rows(logits(32000, torch.float32), logits(32000), target, *spec),
        )
        yield (
            f"distillation {divergence} backward, short and odd",
            hopper,
            None,
            lambda spec=spec: distillation_rows_backward(
                scale, logits(1001, torch.float16), logits(1001, torch.float32), None, *spec[:3], 0.0, -100
            ),
        )
