"""The simple noise scale of McCandlish et al., "An Empirical Model of Large-Batch Training" (2018), appendix A."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .clip import squared_norms


class GradientNoiseScale:
    """Tells whether a larger batch still pays: below B_simple = tr(Sigma) / |G|^2 examples, doubling the batch nearly
    halves the steps; far above it, nearly nothing is gained.

    The squared norm of a gradient of B examples is |G|^2 + tr(Sigma) / B on average: two batch sizes give both.
    The small one is a micro-batch of one rank, whose gradient's norm is taken by a hook before it is accumulated or
    reduced over ranks; the large one is the step's whole batch, whose gradient is in `.grad` when update() is called.
    Nothing is kept but two scalars, and nothing is read back to the host before `value`.

        noise = GradientNoiseScale(model.parameters(), batch_size=8)
        for step in ...:
            for micro in micro_batches:
                (loss(micro) / len(micro_batches)).backward()
            noise.update()                # before clipping, optimizer.step() and zero_grad()
        print(noise.value)

    batch_size: examples of one micro-batch on one rank. decay: of the running averages of both estimates.
    averaged: True if each loss was divided by the number of micro-batches, as above; False if gradients are sums.
    group: the ranks among which `.grad` was averaged when update() is called (DistributedDataParallel); default none.
    Gradients that never pass through autograd's leaves (FSDP2's unsharded ones) are not seen: give `update_from` their
    norms instead.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        batch_size: int,
        *,
        decay: float = 0.95,
        averaged: bool = True,
        group: Any = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"GradientNoiseScale: expected batch_size to be at least 1, got {batch_size}")
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"GradientNoiseScale: expected decay to be in [0, 1), got {decay}")
        self._params = [p for p in parameters if p.requires_grad]
        self._batch_size, self._decay, self._averaged, self._group = batch_size, decay, averaged, group
        self._counts = [0] * len(self._params)
        self._squares: Tensor | None = None
        self.noise: Tensor | None = None  # running average of tr(Sigma)
        self.signal: Tensor | None = None  # running average of |G|^2
        self._handles = [p.register_hook(self._hook(i)) for i, p in enumerate(self._params)]

    def _hook(self, i: int) -> Any:
        def see(grad: Tensor) -> None:
            self._counts[i] += 1
            square = squared_norms([grad]).sum()
            self._squares = square if self._squares is None else self._squares + square

        return see

    @torch.no_grad()
    def update(self) -> None:
        """Takes the step's gradients into the averages. Needs two micro-batches, or two ranks, since the last."""
        micros = max(self._counts, default=0)
        grads = [p.grad for p in self._params if p.grad is not None]
        if self._squares is None or not grads:
            raise RuntimeError("GradientNoiseScale: expected a backward since the last update, got none")
        small, big = self._squares / micros, squared_norms(grads).sum()
        if self._averaged:
            small = small * micros**2  # the hook saw gradients divided by the number of micro-batches
        else:
            big = big / micros**2
        ranks = 1
        if self._group is not None:
            ranks = torch.distributed.get_world_size(self._group)
            small = small.clone()
            torch.distributed.all_reduce(small, group=self._group)
            small = small / ranks
        self._squares, self._counts = None, [0] * len(self._counts)
        self.update_from(small, big, self._batch_size, self._batch_size * micros * ranks)

    def update_from(
        self, small_square: Tensor | float, big_square: Tensor | float, small_batch: int, big_batch: int
    ) -> None:
        """Takes in two squared norms: the average one of gradients of small_batch examples, and that of big_batch."""
        if big_batch <= small_batch:
            raise ValueError(
                f"GradientNoiseScale: expected a batch of more than {small_batch} examples beside batches of that size "
                f"(two micro-batches or two ranks), got {big_batch}"
            )
        small, big = torch.as_tensor(small_square), torch.as_tensor(big_square)
        signal = (big_batch * big - small_batch * small) / (big_batch - small_batch)
        noise = (small - big) / (1.0 / small_batch - 1.0 / big_batch)
        keep = 0.0 if self.signal is None else self._decay
        self.signal = signal if self.signal is None else self.signal * keep + signal * (1.0 - keep)
        self.noise = noise if self.noise is None else self.noise * keep + noise * (1.0 - keep)

    @property
    def value(self) -> float:
        """B_simple in examples; NaN before the first update, negative or huge while the averages are too noisy."""
        if self.noise is None or self.signal is None:
            return float("nan")
        return float(self.noise / self.signal)

    def remove(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()
