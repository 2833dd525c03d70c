"""Products of a chunk of tokens with a whole vocabulary, in scratch of a bounded size."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ._chunks import linear

LOGITS_BYTES = 32 << 20  # of one chunk's logits
BLOCK_BYTES = 16 << 20  # of a block of the weight in another dtype


def compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """The wider of both; float32 for 16-bit tensors on a CPU without 16-bit products, slower there 5 to 50 times."""
    if x.dtype != weight.dtype:
        return torch.promote_types(x.dtype, weight.dtype)
    if x.device.type != "cpu" or x.dtype not in (torch.bfloat16, torch.float16):
        return x.dtype
    name = "_is_avx512_bf16_supported" if x.dtype == torch.bfloat16 else "_is_amx_fp16_supported"
    supported = getattr(torch.cpu, name, None)
    return x.dtype if supported is not None and supported() else torch.float32


def chunks(rows: int, vocabulary: int, itemsize: int) -> Iterator[slice]:
    """Slices of the rows, about equal, whose logits take at most LOGITS_BYTES (or one row)."""
    most = max(1, LOGITS_BYTES // max(1, vocabulary * itemsize))
    count = -(-rows // most)
    for i in range(count):
        yield slice(rows * i // count, rows * (i + 1) // count)


class Vocabulary:
    """A weight [V, H] and a bias, seen by products in `dtype`: converted block by block where it has another."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.weight, self.dtype = weight, dtype
        self.bias = None if bias is None else bias.to(dtype)
        self.rows, self.width = weight.shape
        self.convert = weight.dtype != dtype
        self.step = self.rows
        self.scratch = None
        if self.convert:
            self.step = max(1, min(self.rows, BLOCK_BYTES // max(1, self.width * dtype.itemsize)))
            self.scratch = weight.new_empty((self.step, self.width), dtype=dtype)

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, self.rows, max(1, self.step)):
            block = slice(start, min(self.rows, start + self.step))
            part = self.weight[block]
            yield block, part if self.scratch is None else self.scratch[: part.shape[0]].copy_(part)

    def logits(self, x: Tensor, out: Tensor) -> Tensor:
        """out[:] = x @ weight.T + bias; x [n, H] and out [n, V] in dtype."""
        for block, part in self._blocks():
            linear(x, part, None if self.bias is None else self.bias[block], out[:, block])
        return out

    def grad_input(self, grad: Tensor) -> Tensor:
        """grad @ weight; grad [n, V] in dtype. Summed over blocks in float32."""
        if not self.convert:
            return grad @ self.weight
        total = grad.new_zeros((grad.shape[0], self.width), dtype=torch.promote_types(self.dtype, torch.float32))
        for block, part in self._blocks():
            if total.dtype == self.dtype:
                total.addmm_(grad[:, block], part)
            else:
                total += grad[:, block] @ part
        return total


def add_weight_gradient(total: Tensor, grad: Tensor, x: Tensor) -> None:
    """total += grad.T @ x, where total [V, H] is float32 or wider and grad [n, V], x [n, H] may be 16-bit."""
    if total.dtype == grad.dtype:
        total.addmm_(grad.t(), x)
        return
    step = max(1, BLOCK_BYTES // max(1, x.shape[1] * x.element_size()))
    for start in range(0, total.shape[0], step):
        total[start : start + step] += grad[:, start : start + step].t() @ x
